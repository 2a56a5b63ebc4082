// The functions of one cell for tensors of one type, from the formulas of the cell. This is all
// that a cell of a user compiles.
#pragma once

#include "cpu/kernels/cell_tile.h"
#include "cpu/kernels/steps.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

template <class C>
constexpr Cell cell_numbers() {
  Cell cell{.gates = C::kGates,
            .saved = C::kSaved,
            .grad_blocks = C::kGradBlocks,
            .cells = C::kCells,
            .parameters = C::kParameters,
            .direct = C::kDirect,
            .reads_h = C::kReadsH,
            .norm_eps = 0,
            .recurrent = true,
            .input_gate = {}};
  for (int j = 0; j < C::kGates; ++j) cell.input_gate[j] = C::input_gate(j);
  return cell;
}

// For tensors of S, with products by Op.
template <class C, class S, class Op>
constexpr CellFunctions make_cell() {
  using E = typename Op::Element;
  CellFunctions functions{.cell = cell_numbers<C>(),
                          .forward = cell_forward<C, S, E>,
                          .backward = cell_backward<C, S, E>,
                          .steps = {}};
  if constexpr (std::is_same_v<S, Compute<S>>)
    functions.steps[int(WeightType::kFloat32)] = steps<C, S, RowProduct<Op>>;
  return functions;
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
