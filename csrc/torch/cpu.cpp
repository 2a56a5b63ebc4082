// The CPU kernels behind the ops.
#include <ATen/Parallel.h>
#include <sys/mman.h>
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

// Asks for huge pages in freshly allocated memory. Large buffers come from the kernel anew in every
// call, and what it does for 4 KiB pages one by one can take as long as the forward itself.
void prefer_huge_pages(const at::Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20, kLeast = 2 * kHugePage;
  if (!t.defined() || t.nbytes() < kLeast) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + t.nbytes()) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may be refused
#endif
}

at::Tensor workspace(size_t bytes) {
  at::Tensor memory = at::empty({int64_t(bytes)}, at::TensorOptions().dtype(at::kByte));
  prefer_huge_pages(memory);
  return memory;
}

}  // namespace

void CpuDevice::forward(const CellInfo& cell, LayerInputs in, LayerOutputs& out, bool save) {
  const cpu::KernelTable& table = cpu::kernel_table();
  if (!table.strided) in.x = in.x.contiguous();
  for (const at::Tensor* result : {&out.y, &out.gates, &out.cells}) prefer_huge_pages(*result);
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
  for (const at::Tensor* result : {&grads.x, &grads.w_ih, &grads.w_hh}) prefer_huge_pages(*result);
  const cpu::Kernels& kernels = table.kernels[int(cell.kind)][int(dtype_of(in.x))];
  const BackwardArgs args = backward_args(grad_out, in, out, grads);
  const cpu::Plan plan = kernels.plan_backward(args.size, this_machine());
  const at::Tensor memory = workspace(kernels.backward_workspace(args.size, plan));
  kernels.backward(args, plan, memory.data_ptr());
}

}  // namespace rnnfast
