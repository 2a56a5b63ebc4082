// The CPU kernels behind the ops.
#include <ATen/Parallel.h>
#include <unistd.h>

#include "cpu/sequence.h"
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

void CpuDevice::forward(const CellInfo& cell, const LayerInputs& in, LayerOutputs& out, bool save) {
  const cpu::ForwardArgs args{
      .size = in.sizes(),
      .reverse = in.reverse,
      .save = save,
      .x = in.x.data_ptr(),
      .x_stride_t = in.x.stride(0),
      .x_stride_b = in.x.stride(1),
      .h0 = in.h0.data_ptr(),
      .c0 = data_or_null(in.c0),
      .w_ih = in.w_ih.data_ptr(),
      .w_hh = in.w_hh.data_ptr(),
      .b_ih = data_or_null(in.b_ih),
      .b_hh = data_or_null(in.b_hh),
      .y = out.y.data_ptr(),
      .h_n = out.h_n.data_ptr(),
      .c_n = data_or_null(out.c_n),
      .gates = data_or_null(out.gates),
      .cells = data_or_null(out.cells),
  };
  const cpu::Kernels& kernels = cpu::kernels(cell.kind, dtype_of(in.x));
  const cpu::Plan plan = kernels.plan_forward(args.size, this_machine());
  const at::Tensor memory = workspace(kernels.forward_workspace(args.size, plan));
  kernels.forward(args, plan, memory.data_ptr());
}

void CpuDevice::backward(const CellInfo& cell, const LayerGradOutputs& grad_out,
                         const LayerInputs& in, const LayerOutputs& out, LayerGrads& grads) {
  const cpu::BackwardArgs args{
      .size = in.sizes(),
      .reverse = in.reverse,
      .grad_y = data_or_null(grad_out.y),
      .grad_y_stride_t = grad_out.y.defined() ? grad_out.y.stride(0) : 0,
      .grad_y_stride_b = grad_out.y.defined() ? grad_out.y.stride(1) : 0,
      .grad_h_n = data_or_null(grad_out.h_n),
      .grad_c_n = data_or_null(grad_out.c_n),
      .x = in.x.data_ptr(),
      .x_stride_t = in.x.stride(0),
      .x_stride_b = in.x.stride(1),
      .h0 = in.h0.data_ptr(),
      .c0 = data_or_null(in.c0),
      .w_ih = in.w_ih.data_ptr(),
      .w_hh = in.w_hh.data_ptr(),
      .y = out.y.data_ptr(),
      .gates = out.gates.data_ptr(),
      .cells = data_or_null(out.cells),
      .grad_x = data_or_null(grads.x),
      .grad_h0 = data_or_null(grads.h0),
      .grad_c0 = data_or_null(grads.c0),
      .grad_w_ih = data_or_null(grads.w_ih),
      .grad_w_hh = data_or_null(grads.w_hh),
      .grad_b_ih = data_or_null(grads.b_ih),
      .grad_b_hh = data_or_null(grads.b_hh),
  };
  const cpu::Kernels& kernels = cpu::kernels(cell.kind, dtype_of(in.x));
  const cpu::Plan plan = kernels.plan_backward(args.size, this_machine());
  const at::Tensor memory = workspace(kernels.backward_workspace(args.size, plan));
  kernels.backward(args, plan, memory.data_ptr());
}

}  // namespace rnnfast
