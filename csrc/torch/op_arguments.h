// The arguments of the ops rnnfast::<cell> and rnnfast::<cell>_backward in the order of their
// schemas, which depend on the cell.
#pragma once

#include <ATen/core/stack.h>

#include "torch/layer.h"

namespace rnnfast {

// The names of a cell's ops and of those that do the same in plain PyTorch (rnnfast/autograd.py).
std::string backward_name(const std::string& op);
std::string reference_name(const std::string& op);

std::string forward_schema(const CellInfo& cell, const std::string& name);
std::string backward_schema(const CellInfo& cell, const std::string& name);

struct ForwardCall {
  LayerInputs in;  // not checked
  bool save, recompute;

  // Where `save` stands among the arguments.
  static size_t place_of_save(const CellInfo& cell) { return cell.tensors() + 1; }
};
ForwardCall read_forward(const CellInfo& cell, at::ArrayRef<c10::IValue> arguments);
// Pushes the results of the forward.
void push_outputs(const CellInfo& cell, const LayerOutputs& out, torch::jit::Stack& stack);

// What the backward takes, not checked.
struct BackwardCall {
  LayerGradOutputs grad_out;
  LayerInputs in;
  LayerOutputs out;
  // Which gradients are wanted: an entry for each of kDifferentiable that the cell has, where the
  // last ones may be missing.
  c10::SmallVector<bool, 8> mask;
};
BackwardCall read_backward(const CellInfo& cell, at::ArrayRef<c10::IValue> arguments);
torch::jit::Stack backward_arguments(const CellInfo& cell, const BackwardCall& call);
// Whether a call with these inputs has an entry in the mask for this member of LayerInputs.
bool has_input(const CellInfo& cell, const LayerInputs& in, at::Tensor LayerInputs::* member);
// Pushes the gradients that the backward returns.
void push_grads(const CellInfo& cell, const LayerGrads& grads, torch::jit::Stack& stack);

}  // namespace rnnfast
