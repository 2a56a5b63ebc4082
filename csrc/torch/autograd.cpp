// The derivatives of the ops and their autocast: what lies between torch's dispatcher and the
// kernels of ops.cpp. Calls of modules do not come this way if they are plain, see call.cpp.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "torch/op_arguments.h"
#include "torch/user_cells.h"

namespace rnnfast {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;
using List = torch::autograd::variable_list;

OperatorHandle find_op(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("rnnfast::" + name).c_str(), "");
}

// The arguments of the call that is on top of the stack.
at::ArrayRef<IValue> arguments_of(const OperatorHandle& op, const Stack& stack) {
  return torch::jit::last(stack, op.schema().arguments().size());
}

Tensor tensor_or_none(const IValue& value) {
  return value.isTensor() ? value.toTensor() : Tensor();
}
std::optional<Tensor> optional(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
}

void run_below_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// How a call is differentiated.
enum class Way {
  kNot,
  kBackward,   // by the kernels' backward
  kReference,  // by running plain PyTorch: forward-mode AD and torch.func's transforms need it
};

Way way_of(at::ArrayRef<IValue> arguments, c10::DispatchKeySet keys) {
  bool requires_grad = false;
  for (const IValue& value : arguments) {
    const Tensor t = tensor_or_none(value);
    if (!t.defined()) continue;
    if (t._fw_grad(/*level=*/0).defined()) return Way::kReference;
    requires_grad = requires_grad || t.requires_grad();
  }
  if (!requires_grad || !at::GradMode::is_enabled()) return Way::kNot;
  // this key is there where a transform of torch.func differentiates the call
  return keys.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ? Way::kReference
                                                                   : Way::kBackward;
}

// A call of rnnfast::<cell>: its arguments, which stand in the order of its schema.
struct Call {
  const OperatorHandle& op;
  const c10::DispatchKeySet keys;
  const CellInfo& cell;
  Stack arguments;
  Tensor gates{}, no_cells{};  // results that have no gradient

  IValue& save() { return arguments[ForwardCall::place_of_save(cell)]; }
  LayerInputs inputs() const { return read_forward(cell, arguments).in; }
};

// The autograd node of rnnfast::<cell>. Its forward is the op with save=True; what the caller did
// not ask to save is kept for the backward all the same, but not returned.
class OpFunction : public torch::autograd::Function<OpFunction> {
 public:
  static constexpr bool is_traceable = true;  // by torch's compiled autograd

  // Returns the results of the op.
  static List run(Call& call) {
    const LayerInputs in = call.inputs();
    List results = apply(call, in, optional(in.x), optional(in.h0), optional(in.c0),
                         optional(in.w_ih), optional(in.w_hh), optional(in.b_ih), optional(in.b_hh),
                         optional(in.w_hr), optional(in.parameters));
    const size_t at_gates = call.cell.has_c() ? 3 : 2;
    results.insert(results.begin() + int64_t(at_gates), call.gates);
    if (call.cell.has_c() && results.size() == at_gates + 1) results.push_back(call.no_cells);
    return results;
  }

  template <class... Inputs>
  static List forward(torch::autograd::AutogradContext* context, Call& call, const LayerInputs& in,
                      const Inputs&...) {
    const bool save = call.save().toBool();
    call.save() = true;
    run_below_autograd(call.op, call.keys, &call.arguments);
    const auto result = [&](size_t i) { return call.arguments[i].toTensor(); };
    const size_t at_gates = call.cell.has_c() ? 3 : 2;
    const Tensor gates = result(at_gates);
    const Tensor cells = call.cell.has_c() ? result(at_gates + 1) : Tensor();
    List saved{in.lengths, in.reset, result(0), gates, cells};
    for (const auto member : kDifferentiable) saved.push_back(in.*member);
    context->saved_data["cell"] = int64_t(call.cell.kind);
    context->saved_data["reverse"] = in.reverse;
    context->set_materialize_grads(false);
    context->save_for_backward(std::move(saved));

    List results;
    for (size_t i = 0; i < at_gates; ++i) results.push_back(result(i));
    call.gates = save ? gates : at::empty({0}, gates.options());
    if (save && cells.defined()) results.push_back(cells);
    if (!save && cells.defined()) call.no_cells = at::empty({0}, cells.options());
    return results;
  }

  static List backward(torch::autograd::AutogradContext* context, const List& grads) {
    constexpr size_t kBefore = 2;  // of the arguments of `forward`, `call` and `in`
    List results(kBefore + kDifferentiable.size());
    const CellInfo& cell = cell_info(CellKind(context->saved_data["cell"].toInt()));
    const List saved = context->get_saved_variables();
    LayerInputs in;
    in.reverse = context->saved_data["reverse"].toBool();
    in.lengths = saved[0], in.reset = saved[1];
    LayerOutputs out;
    out.y = saved[2], out.gates = saved[3], out.cells = saved[4];
    Wanted wanted{};
    size_t edge = 0;  // absent inputs have no edge in the graph
    for (size_t i = 0; i < kDifferentiable.size(); ++i) {
      const Tensor& input = in.*kDifferentiable[i] = saved[5 + i];
      wanted[i] = input.defined() && context->needs_input_grad(edge++);
    }
    LayerGradOutputs grad_out;
    grad_out.y = grads[0], grad_out.h_n = grads[1];
    if (cell.has_c()) grad_out.c_n = grads[2];
    if (grads.size() > 3) grad_out.cells = grads[3];
    List found = call_backward(cell, grad_out, in, out, wanted);
    std::move(found.begin(), found.end(), results.begin() + kBefore);
    return results;
  }
};

// The kernel of rnnfast::<cell> for the dispatch key Autograd.
class Differentiate final : public c10::OperatorKernel {
 public:
  explicit Differentiate(const CellInfo& cell) : cell_(cell) {}
  void operator()(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto arguments = arguments_of(op, *stack);
    switch (way_of(arguments, keys)) {
      case Way::kNot:
        return run_below_autograd(op, keys, stack);
      case Way::kReference:
        return find_op(reference_name(cell_.name)).callBoxed(stack);
      case Way::kBackward: {
        Call call{op, keys, cell_, arguments.vec()};
        torch::jit::drop(*stack, arguments.size());
        for (Tensor& result : OpFunction::run(call)) stack->emplace_back(std::move(result));
      }
    }
  }

 private:
  const CellInfo& cell_;
};

// The same of rnnfast::<cell>_backward, whose derivatives are all left to plain PyTorch.
class DifferentiateBackward final : public c10::OperatorKernel {
 public:
  explicit DifferentiateBackward(const CellInfo& cell) : cell_(cell) {}
  void operator()(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    if (way_of(arguments_of(op, *stack), keys) == Way::kNot)
      return run_below_autograd(op, keys, stack);
    find_op(reference_name(backward_name(cell_.name))).callBoxed(stack);
  }

 private:
  const CellInfo& cell_;
};

// The kernel for autocast: floating-point tensors but float64 are cast, as the modules cast them.
template <at::DeviceType device>
void cast(const OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard once(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device)));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) value = at::autocast::cached_cast(type, value.toTensor(), device);
  }
  op.callBoxed(stack);
}

void differentiate_ops(torch::Library& library, const CellInfo& cell) {
  library.impl(cell.name,
               torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Differentiate>(cell)));
  library.impl(
      backward_name(cell.name).c_str(),
      torch::CppFunction::makeFromBoxedFunctor(std::make_unique<DifferentiateBackward>(cell)));
}

template <at::DeviceType device>
void cast_op(torch::Library& library, const CellInfo& cell) {
  library.impl(cell.name, torch::CppFunction::makeFromBoxedFunction<&cast<device>>());
}

template <class F>
void for_built_in_cells(F&& f) {
  for (int kind = 0; kind < kCellKinds; ++kind) f(cell_info(CellKind(kind)));
}

}  // namespace

List call_backward(const CellInfo& cell, const LayerGradOutputs& grad_out, const LayerInputs& in,
                   const LayerOutputs& out, const Wanted& wanted) {
  const bool any = grad_out.y.defined() || grad_out.h_n.defined() || grad_out.c_n.defined() ||
                   grad_out.cells.defined();
  if (!any) return List(wanted.size());
  BackwardCall call{grad_out, in, out, {}};
  for (size_t i = 0; i < wanted.size(); ++i)
    if (has_input(cell, in, kDifferentiable[i])) call.mask.push_back(wanted[i]);
  Stack stack = backward_arguments(cell, call);
  find_op(backward_name(cell.name)).callBoxed(&stack);

  List grads(wanted.size());
  for (size_t i = 0, next = 0; i < wanted.size(); ++i) {
    if (!has_input(cell, in, kDifferentiable[i])) continue;
    if (wanted[i]) grads[i] = stack[next].toTensor();
    ++next;
  }
  return grads;
}

void add_autograd(const CellInfo& cell) {
  const auto library = [](c10::DispatchKey key) -> torch::Library& {
    return *new torch::Library(torch::Library::IMPL, "rnnfast", key, __FILE__, __LINE__);
  };
  differentiate_ops(library(c10::DispatchKey::Autograd), cell);
  cast_op<at::kCPU>(library(c10::DispatchKey::AutocastCPU), cell);
  cast_op<at::kCUDA>(library(c10::DispatchKey::AutocastCUDA), cell);
}

TORCH_LIBRARY_IMPL(rnnfast, Autograd, library) {
  for_built_in_cells([&](const CellInfo& cell) { differentiate_ops(library, cell); });
}
TORCH_LIBRARY_IMPL(rnnfast, AutocastCPU, library) {
  for_built_in_cells([&](const CellInfo& cell) { cast_op<at::kCPU>(library, cell); });
}
TORCH_LIBRARY_IMPL(rnnfast, AutocastCUDA, library) {
  for_built_in_cells([&](const CellInfo& cell) { cast_op<at::kCUDA>(library, cell); });
}

}  // namespace rnnfast
