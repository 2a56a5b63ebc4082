#include "torch/op_arguments.h"

namespace rnnfast {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

IValue value_or_none(const Tensor& t) { return t.defined() ? IValue(t) : IValue(); }

// Reads arguments one after the other.
class Reader {
 public:
  explicit Reader(at::ArrayRef<IValue> arguments) : next_(arguments.begin()) {}
  Tensor tensor() {
    const IValue& value = *next_++;
    return value.isTensor() ? value.toTensor() : Tensor();
  }
  bool flag() { return (next_++)->toBool(); }
  c10::SmallVector<bool, 8> flags() {
    c10::SmallVector<bool, 8> all;
    for (const bool one : (next_++)->toBoolList()) all.push_back(one);
    return all;
  }
  // x, states, weights and biases
  void tensors(const CellInfo& cell, LayerInputs& in) {
    in.x = tensor(), in.h0 = tensor();
    if (cell.has_c()) in.c0 = tensor();
    in.w_ih = tensor(), in.w_hh = tensor(), in.b_ih = tensor(), in.b_hh = tensor();
  }

 private:
  at::ArrayRef<IValue>::iterator next_;
};

std::string tensors_schema(const CellInfo& cell) {
  return std::string("Tensor x, Tensor h0, ") + (cell.has_c() ? "Tensor c0, " : "") +
         "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, ";
}
std::string last_schema(const CellInfo& cell) {
  return std::string(", Tensor? lengths=None, Tensor? reset=None") +
         (cell.may_project() ? ", Tensor? w_hr=None" : "") +
         (cell.parameters > 0 ? ", Tensor? parameters=None" : "");
}

}  // namespace

std::string backward_name(const std::string& op) { return op + "_backward"; }
std::string reference_name(const std::string& op) { return "_" + op + "_reference"; }

std::string forward_schema(const CellInfo& cell, const std::string& name) {
  return name + "(" + tensors_schema(cell) + "bool reverse, bool save, bool recompute=False" +
         last_schema(cell) + ") -> (Tensor y, Tensor h_n, " +
         (cell.has_c() ? "Tensor c_n, Tensor gates, Tensor cells)" : "Tensor gates)");
}

std::string backward_schema(const CellInfo& cell, const std::string& name) {
  const bool c = cell.has_c();
  return name + "(Tensor? grad_y, Tensor? grad_h_n, " + (c ? "Tensor? grad_c_n, " : "") +
         tensors_schema(cell) + "Tensor y, Tensor gates, " + (c ? "Tensor cells, " : "") +
         "bool reverse, bool[] mask" + last_schema(cell) + (c ? ", Tensor? grad_cells=None" : "") +
         ") -> (Tensor grad_x, Tensor grad_h0, " + (c ? "Tensor grad_c0, " : "") +
         "Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh" +
         (cell.may_project() ? ", Tensor grad_w_hr" : "") +
         (cell.parameters > 0 ? ", Tensor grad_parameters" : "") + ")";
}

ForwardCall read_forward(const CellInfo& cell, at::ArrayRef<IValue> arguments) {
  Reader reader(arguments);
  ForwardCall call;
  reader.tensors(cell, call.in);
  call.in.reverse = reader.flag();
  call.save = reader.flag(), call.recompute = reader.flag();
  call.in.lengths = reader.tensor(), call.in.reset = reader.tensor();
  if (cell.may_project()) call.in.w_hr = reader.tensor();
  if (cell.parameters > 0) call.in.parameters = reader.tensor();
  return call;
}

void push_outputs(const CellInfo& cell, const LayerOutputs& out, Stack& stack) {
  torch::jit::push(stack, out.y, out.h_n);
  if (cell.has_c()) stack.emplace_back(out.c_n);
  stack.emplace_back(out.gates);
  if (cell.has_c()) stack.emplace_back(out.cells);
}

BackwardCall read_backward(const CellInfo& cell, at::ArrayRef<IValue> arguments) {
  Reader reader(arguments);
  BackwardCall call;
  call.grad_out.y = reader.tensor(), call.grad_out.h_n = reader.tensor();
  if (cell.has_c()) call.grad_out.c_n = reader.tensor();
  reader.tensors(cell, call.in);
  call.out.y = reader.tensor(), call.out.gates = reader.tensor();
  if (cell.has_c()) call.out.cells = reader.tensor();
  call.in.reverse = reader.flag();
  call.mask = reader.flags();
  call.in.lengths = reader.tensor(), call.in.reset = reader.tensor();
  if (cell.may_project()) call.in.w_hr = reader.tensor();
  if (cell.parameters > 0) call.in.parameters = reader.tensor();
  if (cell.has_c()) call.grad_out.cells = reader.tensor();
  return call;
}

Stack backward_arguments(const CellInfo& cell, const BackwardCall& call) {
  const auto& [grad_out, in, out, mask] = call;
  Stack stack{value_or_none(grad_out.y), value_or_none(grad_out.h_n)};
  if (cell.has_c()) stack.push_back(value_or_none(grad_out.c_n));
  torch::jit::push(stack, in.x, in.h0);
  if (cell.has_c()) stack.emplace_back(in.c0);
  torch::jit::push(stack, in.w_ih, in.w_hh, value_or_none(in.b_ih), value_or_none(in.b_hh));
  torch::jit::push(stack, out.y, out.gates);
  if (cell.has_c()) stack.emplace_back(out.cells);
  c10::List<bool> wanted;
  for (const bool one : mask) wanted.push_back(one);
  torch::jit::push(stack, in.reverse, wanted, value_or_none(in.lengths), value_or_none(in.reset));
  if (cell.may_project()) stack.push_back(value_or_none(in.w_hr));
  if (cell.parameters > 0) stack.push_back(value_or_none(in.parameters));
  if (cell.has_c()) stack.push_back(value_or_none(grad_out.cells));
  return stack;
}

bool has_input(const CellInfo& cell, const LayerInputs& in, Tensor LayerInputs::* member) {
  if (member == &LayerInputs::c0) return cell.has_c();
  if (member == &LayerInputs::w_hr) return in.w_hr.defined();
  return member != &LayerInputs::parameters || in.parameters.defined();
}

void push_grads(const CellInfo& cell, const LayerGrads& grads, Stack& stack) {
  torch::jit::push(stack, grads.x, grads.h0);
  if (cell.has_c()) stack.emplace_back(grads.c0);
  torch::jit::push(stack, grads.w_ih, grads.w_hh, grads.b_ih, grads.b_hh);
  if (cell.may_project()) stack.emplace_back(grads.w_hr);
  if (cell.parameters > 0) stack.emplace_back(grads.parameters);
}

}  // namespace rnnfast
