// The ops: their schemas, checks, allocation and registration. Kernels are called through a Device
// (CpuDevice or CudaDevice).
#include <torch/library.h>

#include "torch/op_arguments.h"
#include "torch/user_cells.h"

namespace rnnfast {
namespace {

using at::Tensor;
using torch::jit::Stack;

bool is_empty(const LayerInputs& in) { return in.x.size(0) == 0 || in.h0.numel() == 0; }

template <class Device>
void check_sequences(const CellInfo& cell, const LayerInputs& in) {
  TORCH_CHECK(!in.frozen(), "rnnfast::", cell.name,
              ": expected weights of the type of x, got bytes; rnnfast::frozen_layer takes packed "
              "weights");
  const bool plain =
      !in.lengths.defined() && !in.reset.defined() && !in.w_hr.defined() && !in.has_tokens();
  TORCH_CHECK(plain || Device::complete(), "rnnfast::", cell.name,
              ": lengths, reset, w_hr and tokens have no kernels on this device");
}

template <class Device>
LayerOutputs forward(const CellInfo& cell, const LayerInputs& in, bool save, bool recompute) {
  TORCH_CHECK(!recompute || Device::complete(), "rnnfast::", cell.name,
              ": recompute=True has no kernels on this device");
  check_sequences<Device>(cell, in);
  const bool save_gates = save && !(recompute && cell.recomputes);
  LayerOutputs out = allocate_outputs(cell, in, save_gates, save);
  if (!is_empty(in)) {
    Device::forward(cell, in, out);
  } else {
    out.h_n.copy_(in.h0);
    if (cell.has_c()) out.c_n.copy_(in.c0);
  }
  return out;
}

template <class Device>
LayerGrads backward(const CellInfo& cell, LayerGradOutputs grad_out, const LayerInputs& in,
                    LayerOutputs out, at::ArrayRef<bool> wanted) {
  const LayerFormat format = format_of(in);
  check_saved(cell, format, out);
  check_grad_outputs(cell, format, grad_out);
  check_sequences<Device>(cell, in);
  LayerGrads grads = allocate_grads(cell, in, wanted);
  if (!is_empty(in)) {
    Device::backward(cell, grad_out, in, out, grads);
  } else {
    const auto set = [](Tensor& grad, const Tensor& value) {
      if (!grad.defined()) return;
      value.defined() ? (void)grad.copy_(value) : (void)grad.zero_();
    };
    set(grads.x, {}), set(grads.h0, grad_out.h_n), set(grads.c0, grad_out.c_n);
    set(grads.w_ih, {}), set(grads.w_hh, {}), set(grads.b_ih, {}), set(grads.b_hh, {});
    set(grads.w_hr, {}), set(grads.parameters, {});
  }
  finish_grads(in, grads);
  return grads;
}

// The kernel of rnnfast::<cell> on a device.
template <class Device>
class ForwardKernel final : public c10::OperatorKernel {
 public:
  explicit ForwardKernel(const CellInfo& cell) : cell_(cell) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const size_t count = op.schema().arguments().size();
    const ForwardCall call = read_forward(cell_, torch::jit::last(*stack, count));
    const LayerInputs in = check_inputs(cell_, call.in);
    const LayerOutputs out = forward<Device>(cell_, in, call.save, call.recompute);
    torch::jit::drop(*stack, count);
    push_outputs(cell_, out, *stack);
  }

 private:
  const CellInfo& cell_;
};

// The kernel of rnnfast::<cell>_backward on a device.
template <class Device>
class BackwardKernel final : public c10::OperatorKernel {
 public:
  explicit BackwardKernel(const CellInfo& cell) : cell_(cell) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const size_t count = op.schema().arguments().size();
    const BackwardCall call = read_backward(cell_, torch::jit::last(*stack, count));
    const LayerInputs in = check_inputs(cell_, call.in);
    const LayerGrads grads = backward<Device>(cell_, call.grad_out, in, call.out, call.mask);
    torch::jit::drop(*stack, count);
    push_grads(cell_, grads, *stack);
  }

 private:
  const CellInfo& cell_;
};

template <class Device>
void implement(torch::Library& library, const CellInfo& cell) {
  const std::string forward = cell.name;
  library.impl(forward.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                    std::make_unique<ForwardKernel<Device>>(cell)));
  library.impl(backward_name(forward).c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                                   std::make_unique<BackwardKernel<Device>>(cell)));
}

// Each op has another beside it with the same schema, which rnnfast/autograd.py implements in plain
// PyTorch. It runs where the kernels cannot be differentiated, see autograd.cpp.
void define(torch::Library& library, const CellInfo& cell) {
  const std::string forward = cell.name, backward = backward_name(forward);
  for (const std::string& name : {forward, reference_name(forward)})
    library.def(forward_schema(cell, name).c_str());
  for (const std::string& name : {backward, reference_name(backward)})
    library.def(backward_schema(cell, name).c_str());
}

}  // namespace

void add_ops(const CellInfo& cell) {
  // never freed: an op lives as long as its library
  auto& all =
      *new torch::Library(torch::Library::FRAGMENT, "rnnfast", std::nullopt, __FILE__, __LINE__);
  auto& on_cpu = *new torch::Library(torch::Library::IMPL, "rnnfast", c10::DispatchKey::CPU,
                                     __FILE__, __LINE__);
  define(all, cell);
  implement<CpuDevice>(on_cpu, cell);
  add_autograd(cell);
}

TORCH_LIBRARY(rnnfast, library) {
  for (int kind = 0; kind < kCellKinds; ++kind) define(library, cell_info(CellKind(kind)));
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, library) {
  for (int kind = 0; kind < kCellKinds; ++kind)
    implement<CpuDevice>(library, cell_info(CellKind(kind)));
}

#ifdef RNNFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(rnnfast, CUDA, library) {
  for (int kind = 0; kind < kCellKinds; ++kind)
    implement<CudaDevice>(library, cell_info(CellKind(kind)));
}
#endif

}  // namespace rnnfast
