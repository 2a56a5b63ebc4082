// The derivatives of the ops and their autocast: what lies between torch's dispatcher and the
// kernels of ops.cpp. Calls of modules do not come this way if they are plain, see call.cpp.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "cells/all.h"
#include "torch/layer.h"

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
IValue value_or_none(const Tensor& t) { return t.defined() ? IValue(t) : IValue(); }
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

  size_t after_tensors() const { return cell.has_cell ? 7 : 6; }
  IValue& save() { return arguments[after_tensors() + 1]; }
  LayerInputs inputs() const {
    auto next = arguments.begin();
    const auto take = [&] { return tensor_or_none(*next++); };
    LayerInputs in;
    in.x = take(), in.h0 = take();
    if (cell.has_cell) in.c0 = take();
    in.w_ih = take(), in.w_hh = take(), in.b_ih = take(), in.b_hh = take();
    in.reverse = (next++)->toBool();
    next += 2;  // save, recompute
    in.lengths = take(), in.reset = take();
    if (cell.has_cell) in.w_hr = take();
    return in;
  }
};

// The autograd node of rnnfast::<cell>. Its forward is the op with save=True; what the caller did
// not ask to save is kept for the backward all the same, but not returned.
class OpFunction : public torch::autograd::Function<OpFunction> {
 public:
  static constexpr bool is_traceable = true;  // by torch's compiled autograd

  // Returns the results of the op.
  static List run(Call& call) {
    const LayerInputs in = call.inputs();
    List results =
        apply(call, in, optional(in.x), optional(in.h0), optional(in.c0), optional(in.w_ih),
              optional(in.w_hh), optional(in.b_ih), optional(in.b_hh), optional(in.w_hr));
    const size_t at_gates = call.cell.has_cell ? 3 : 2;
    results.insert(results.begin() + int64_t(at_gates), call.gates);
    if (call.cell.has_cell && results.size() == at_gates + 1) results.push_back(call.no_cells);
    return results;
  }

  template <class... Inputs>
  static List forward(torch::autograd::AutogradContext* context, Call& call, const LayerInputs& in,
                      const Inputs&...) {
    const bool save = call.save().toBool();
    call.save() = true;
    run_below_autograd(call.op, call.keys, &call.arguments);
    const auto result = [&](size_t i) { return call.arguments[i].toTensor(); };
    const size_t at_gates = call.cell.has_cell ? 3 : 2;
    const Tensor gates = result(at_gates);
    const Tensor cells = call.cell.has_cell ? result(at_gates + 1) : Tensor();
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
    if (cell.has_cell) grad_out.c_n = grads[2];
    if (grads.size() > 3) grad_out.cells = grads[3];
    List found = call_backward(cell, grad_out, in, out, wanted);
    std::move(found.begin(), found.end(), results.begin() + kBefore);
    return results;
  }
};

// The kernel of rnnfast::<cell> for the dispatch key Autograd.
template <CellKind kind>
void differentiate(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const CellInfo& cell = cell_info(kind);
  const auto arguments = arguments_of(op, *stack);
  switch (way_of(arguments, keys)) {
    case Way::kNot:
      return run_below_autograd(op, keys, stack);
    case Way::kReference: {
      static const OperatorHandle reference = find_op(reference_name(cell.name));
      return reference.callBoxed(stack);
    }
    case Way::kBackward: {
      Call call{op, keys, cell, arguments.vec()};
      torch::jit::drop(*stack, arguments.size());
      for (Tensor& result : OpFunction::run(call)) stack->emplace_back(std::move(result));
    }
  }
}

// The same of rnnfast::<cell>_backward, whose derivatives are all left to plain PyTorch.
template <CellKind kind>
void differentiate_backward(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  if (way_of(arguments_of(op, *stack), keys) == Way::kNot)
    return run_below_autograd(op, keys, stack);
  static const OperatorHandle reference =
      find_op(reference_name(std::string(cell_info(kind).name) + "_backward"));
  reference.callBoxed(stack);
}

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

template <at::DeviceType device>
void cast_all(torch::Library& library) {
  for (int kind = 0; kind < kCells; ++kind)
    library.impl(cell_info(CellKind(kind)).name,
                 torch::CppFunction::makeFromBoxedFunction<&cast<device>>());
}

}  // namespace

List call_backward(const CellInfo& cell, const LayerGradOutputs& grad_out, const LayerInputs& in,
                   const LayerOutputs& out, const Wanted& wanted) {
  const bool any = grad_out.y.defined() || grad_out.h_n.defined() || grad_out.c_n.defined() ||
                   grad_out.cells.defined();
  if (!any) return List(wanted.size());
  static const auto ops = [] {
    std::vector<OperatorHandle> found;
    for (int kind = 0; kind < kCells; ++kind)
      found.push_back(find_op(std::string(cell_info(CellKind(kind)).name) + "_backward"));
    return found;
  }();
  const auto exists = [&](size_t i) {
    const auto member = kDifferentiable[i];
    if (member == &LayerInputs::c0) return cell.has_cell;
    return member != &LayerInputs::w_hr || in.w_hr.defined();
  };
  c10::List<bool> mask;
  for (size_t i = 0; i < wanted.size(); ++i)
    if (exists(i)) mask.push_back(wanted[i]);

  Stack stack{value_or_none(grad_out.y), value_or_none(grad_out.h_n)};
  if (cell.has_cell) stack.push_back(value_or_none(grad_out.c_n));
  for (size_t i = 0; i + 1 < kDifferentiable.size(); ++i)  // w_hr, the last, stands at the end
    if (exists(i)) stack.push_back(value_or_none(in.*kDifferentiable[i]));
  torch::jit::push(stack, out.y, out.gates);
  if (cell.has_cell) stack.emplace_back(out.cells);
  torch::jit::push(stack, in.reverse, mask, value_or_none(in.lengths), value_or_none(in.reset));
  if (cell.has_cell) torch::jit::push(stack, value_or_none(in.w_hr), value_or_none(grad_out.cells));
  ops[size_t(cell.kind)].callBoxed(&stack);

  List grads(wanted.size());
  for (size_t i = 0, next = 0; i < wanted.size(); ++i) {
    if (!exists(i)) continue;
    if (wanted[i]) grads[i] = stack[next].toTensor();
    ++next;
  }
  return grads;
}

TORCH_LIBRARY_IMPL(rnnfast, Autograd, library) {
#define RNNFAST_DIFFERENTIATE(Cell)                                                             \
  library.impl(Cell::kName,                                                                     \
               torch::CppFunction::makeFromBoxedFunction<&differentiate<CellKind::k##Cell>>()); \
  library.impl(                                                                                 \
      (std::string(Cell::kName) + "_backward").c_str(),                                         \
      torch::CppFunction::makeFromBoxedFunction<&differentiate_backward<CellKind::k##Cell>>());
  RNNFAST_FOR_EACH_CELL(RNNFAST_DIFFERENTIATE)
#undef RNNFAST_DIFFERENTIATE
}

TORCH_LIBRARY_IMPL(rnnfast, AutocastCPU, library) { cast_all<at::kCPU>(library); }
TORCH_LIBRARY_IMPL(rnnfast, AutocastCUDA, library) { cast_all<at::kCUDA>(library); }

}  // namespace rnnfast
