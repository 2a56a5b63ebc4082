// The ops: their schemas, checks, allocation and registration. Kernels are called through a Device
// (CpuDevice or CudaDevice).
#include <torch/library.h>

#include "cells/all.h"
#include "torch/layer.h"

namespace rnnfast {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;
using Mask = c10::List<bool>;

Tensor given(Optional tensor) { return tensor.value_or(Tensor()); }

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
  LayerOutputs out = allocate_outputs(cell, in, save && !recompute, save);
  if (!is_empty(in)) {
    Device::forward(cell, in, out);
  } else {
    out.h_n.copy_(in.h0);
    if (cell.has_cell) out.c_n.copy_(in.c0);
  }
  return out;
}

template <class Device>
LayerGrads backward(const CellInfo& cell, LayerGradOutputs grad_out, const LayerInputs& in,
                    LayerOutputs out, const Mask& mask) {
  c10::SmallVector<bool, 8> wanted;
  for (const bool one : mask) wanted.push_back(one);
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
    set(grads.w_hr, {});
  }
  finish_grads(in, grads);
  return grads;
}

// Cells with one state.
template <class Device, CellKind kind>
struct OneState {
  static std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, const Tensor& h0,
                                                const Tensor& w_ih, const Tensor& w_hh,
                                                Optional b_ih, Optional b_hh, bool reverse,
                                                bool save, bool recompute, Optional lengths,
                                                Optional reset) {
    const CellInfo& cell = cell_info(kind);
    const LayerInputs in =
        check_inputs(cell, x, h0, {}, w_ih, w_hh, b_ih, b_hh, {}, reverse, lengths, reset);
    LayerOutputs out = forward<Device>(cell, in, save, recompute);
    return {out.y, out.h_n, out.gates};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(
      Optional grad_y, Optional grad_h_n, const Tensor& x, const Tensor& h0, const Tensor& w_ih,
      const Tensor& w_hh, Optional b_ih, Optional b_hh, const Tensor& y, const Tensor& gates,
      bool reverse, Mask mask, Optional lengths, Optional reset) {
    const CellInfo& cell = cell_info(kind);
    const LayerInputs in =
        check_inputs(cell, x, h0, {}, w_ih, w_hh, b_ih, b_hh, {}, reverse, lengths, reset);
    LayerGrads g =
        backward<Device>(cell, {.y = given(grad_y), .h_n = given(grad_h_n), .c_n = {}, .cells = {}},
                         in, {.y = y, .h_n = {}, .c_n = {}, .gates = gates, .cells = {}}, mask);
    return {g.x, g.h0, g.w_ih, g.w_hh, g.b_ih, g.b_hh};
  }
};

// Cells with a second state c.
template <class Device, CellKind kind>
struct TwoStates {
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run(
      const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh,
      Optional b_ih, Optional b_hh, bool reverse, bool save, bool recompute, Optional lengths,
      Optional reset, Optional w_hr) {
    const CellInfo& cell = cell_info(kind);
    const LayerInputs in =
        check_inputs(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, lengths, reset);
    LayerOutputs out = forward<Device>(cell, in, save, recompute);
    return {out.y, out.h_n, out.c_n, out.gates, out.cells};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(
      Optional grad_y, Optional grad_h_n, Optional grad_c_n, const Tensor& x, const Tensor& h0,
      const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh, Optional b_ih, Optional b_hh,
      const Tensor& y, const Tensor& gates, const Tensor& cells, bool reverse, Mask mask,
      Optional lengths, Optional reset, Optional w_hr, Optional grad_cells) {
    const CellInfo& cell = cell_info(kind);
    const LayerInputs in =
        check_inputs(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, lengths, reset);
    LayerGrads g =
        backward<Device>(cell,
                         {.y = given(grad_y),
                          .h_n = given(grad_h_n),
                          .c_n = given(grad_c_n),
                          .cells = given(grad_cells)},
                         in, {.y = y, .h_n = {}, .c_n = {}, .gates = gates, .cells = cells}, mask);
    return {g.x, g.h0, g.c0, g.w_ih, g.w_hh, g.b_ih, g.b_hh, g.w_hr};
  }
};

std::string schema(const CellInfo& cell, const std::string& name) {
  const std::string c0 = cell.has_cell ? "Tensor c0, " : "";
  const std::string w_hr = cell.has_cell ? ", Tensor? w_hr=None" : "";
  const std::string results = cell.has_cell
                                  ? "(Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
                                  : "(Tensor y, Tensor h_n, Tensor gates)";
  return name + "(Tensor x, Tensor h0, " + c0 +
         "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool reverse, bool save, "
         "bool recompute=False, Tensor? lengths=None, Tensor? reset=None" +
         w_hr + ") -> " + results;
}

std::string backward_schema(const CellInfo& cell, const std::string& name) {
  const std::string grad_c_n = cell.has_cell ? "Tensor? grad_c_n, " : "";
  const std::string c0 = cell.has_cell ? "Tensor c0, " : "";
  const std::string cells = cell.has_cell ? "Tensor cells, " : "";
  const std::string grad_c0 = cell.has_cell ? "Tensor grad_c0, " : "";
  const std::string more = cell.has_cell ? ", Tensor? w_hr=None, Tensor? grad_cells=None" : "";
  const std::string grad_w_hr = cell.has_cell ? ", Tensor grad_w_hr" : "";
  return name + "(Tensor? grad_y, Tensor? grad_h_n, " + grad_c_n + "Tensor x, Tensor h0, " + c0 +
         "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor y, Tensor gates, " + cells +
         "bool reverse, bool[] mask, Tensor? lengths=None, Tensor? reset=None" + more +
         ") -> (Tensor grad_x, Tensor grad_h0, " + grad_c0 +
         "Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh" + grad_w_hr + ")";
}

template <class Device, class Cell, CellKind kind>
void implement(torch::Library& library) {
  using Op = std::conditional_t<Cell::kHasCell, TwoStates<Device, kind>, OneState<Device, kind>>;
  library.impl(Cell::kName, TORCH_FN(Op::run));
  library.impl((std::string(Cell::kName) + "_backward").c_str(), TORCH_FN(Op::run_backward));
}

template <class Device>
void implement_all(torch::Library& library) {
#define RNNFAST_IMPLEMENT(Cell) implement<Device, Cell, CellKind::k##Cell>(library);
  RNNFAST_FOR_EACH_CELL(RNNFAST_IMPLEMENT)
#undef RNNFAST_IMPLEMENT
}

}  // namespace

std::string reference_name(const std::string& op) { return "_" + op + "_reference"; }

// Each op has another beside it with the same schema, which rnnfast/autograd.py implements in plain
// PyTorch. It runs where the kernels cannot be differentiated, see autograd.cpp.
TORCH_LIBRARY(rnnfast, library) {
  for (int kind = 0; kind < kCells; ++kind) {
    const CellInfo& cell = cell_info(CellKind(kind));
    const std::string forward = cell.name, backward = forward + "_backward";
    for (const std::string& name : {forward, reference_name(forward)})
      library.def(schema(cell, name).c_str());
    for (const std::string& name : {backward, reference_name(backward)})
      library.def(backward_schema(cell, name).c_str());
  }
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, library) { implement_all<CpuDevice>(library); }

#ifdef RNNFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(rnnfast, CUDA, library) { implement_all<CudaDevice>(library); }
#endif

}  // namespace rnnfast
