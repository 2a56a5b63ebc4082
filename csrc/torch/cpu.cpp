// The CPU kernels behind the ops.
#include <ATen/Parallel.h>
#include <unistd.h>

#include "cpu/kernels.h"
#include "torch/layer.h"

namespace rnnfast {

cpu::Machine this_machine() {
  static const int64_t l2 = [] {
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return bytes > 0 ? int64_t(bytes) : int64_t(1) << 20;
  }();
  return {at::get_num_threads(), l2};
}

namespace {

at::Tensor workspace(size_t bytes) {
  return at::empty({int64_t(bytes)}, at::TensorOptions().dtype(at::kByte));
}

}  // namespace

void CpuDevice::forward(const CellInfo& cell, LayerInputs in, LayerOutputs& out, bool save) {
  const cpu::KernelTable& table = cpu::kernel_table();
  if (!table.strided) in.x = in.x.contiguous();
  const cpu::Kernels& kernels = table.kernels[int(cell.kind)][int(dtype_of(in.x))];
  const ForwardArgs args = forward_args(in, out, save);
  const cpu::Plan plan = kernels.plan_forward(args.size, this_machine());
  const at::Tensor memory = workspace(kernels.forward_workspace(args.size, plan));
  kernels.forward(args, plan, memory.data_ptr());
}

void CpuDevice::backward(const CellInfo& cell, LayerGradOutputs grad_out, LayerInputs in,
                         const LayerOutputs& out, LayerGrads& grads) {
  const cpu::KernelTable& table = cpu::kernel_table();
  if (!table.strided) {
    in.x = in.x.contiguous();
    if (grad_out.y.defined()) grad_out.y = grad_out.y.contiguous();
  }
  const cpu::Kernels& kernels = table.kernels[int(cell.kind)][int(dtype_of(in.x))];
  const BackwardArgs args = backward_args(grad_out, in, out, grads);
  const cpu::Plan plan = kernels.plan_backward(args.size, this_machine());
  const at::Tensor memory = workspace(kernels.backward_workspace(args.size, plan));
  kernels.backward(args, plan, memory.data_ptr());
}

}  // namespace rnnfast
