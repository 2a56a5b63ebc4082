// A cell's functions on tensors of a half type S: what they read is converted to float first, what
// they write is converted after, a few rows at a time in L1.
#pragma once

#include "cpu/kernels/convert.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

inline constexpr int kStageUnits = 4 * kLanes<float>;  // a panel's, at most
inline constexpr int kStageBlocks = 8;                 // saved or gradient blocks, at most

template <class T>
RNNFAST_INLINE auto shifted(T* row, int64_t elements) {
  using Float = std::conditional_t<std::is_const_v<T>, const float, float>;
  return row ? static_cast<Float*>(row) + elements : nullptr;
}

template <class S, class E>
void stage_forward(const CellFunctions& cell, const ForwardTile& t) {
  constexpr int kRows = 6;
  alignas(64) float h_prev[kRows][kStageUnits], h[kRows][kStageUnits];
  alignas(64) float saved[kRows][kStageBlocks * kStageUnits];
  ForwardRow rows[kRows];
  ForwardTile part = t;
  part.H = kStageUnits;
  part.first_unit = 0;
  part.rows = rows;
  const int64_t at = t.first_unit;
  for (int first = 0; first < t.count; first += kRows) {
    part.count = int(smaller(kRows, t.count - first));
    for (int i = 0; i < part.count; ++i) {
      const ForwardRow& row = t.rows[first + i];
      if (cell.cell.direct)
        convert_row<float, E>(h_prev[i], static_cast<const E*>(row.h_prev) + at, t.units);
      rows[i] = {.h_prev = h_prev[i],
                 .c_prev = shifted(row.c_prev, at),
                 .h = row.h ? h[i] : nullptr,
                 .c = shifted(row.c, at),
                 .saved = row.saved ? saved[i] : nullptr,
                 .c_copy = shifted(row.c_copy, at)};
    }
    cell.forward(cell, part);
    for (int i = 0; i < part.count; ++i) {
      const ForwardRow& row = t.rows[first + i];
      if (row.h) round_row<E, S>(static_cast<E*>(row.h) + at, h[i], t.units);
      for (int k = 0; row.saved && k < cell.cell.saved; ++k)
        convert_row<S, float>(static_cast<S*>(row.saved) + k * t.H + at, saved[i] + k * kStageUnits,
                              t.units);
    }
    part.from_x = shifted(part.from_x, kRows * t.x_stride);
    part.from_h = shifted(part.from_h, kRows * t.h_stride);
  }
}

template <class S, class E>
void stage_backward(const CellFunctions& cell, const BackwardTile& t) {
  alignas(64) float saved[kStageBlocks * kStageUnits], d_gates[kStageBlocks * kStageUnits];
  alignas(64) float h[kStageUnits], h_prev[kStageUnits], grad_y[kStageUnits], output[kStageUnits];
  BackwardRow one;
  BackwardTile part = t;
  part.H = kStageUnits;
  part.first_unit = 0;
  part.rows = &one;
  part.count = 1;
  const int64_t at = t.first_unit;
  const auto load_row = [&](float* to, const void* from) -> const float* {
    if (!from) return nullptr;
    convert_row<float, S>(to, static_cast<const S*>(from) + at, t.units);
    return to;
  };
  for (int i = 0; i < t.count; ++i) {
    const BackwardRow& row = t.rows[i];
    for (int k = 0; k < cell.cell.saved; ++k)
      convert_row<float, S>(saved + k * kStageUnits,
                            static_cast<const S*>(row.saved) + k * t.H + at, t.units);
    one = {.saved = saved,
           .h = cell.cell.reads_h ? load_row(h, row.h) : nullptr,
           .h_prev = cell.cell.direct ? load_row(h_prev, row.h_prev) : nullptr,
           .c = shifted(row.c, at),
           .c_prev = shifted(row.c_prev, at),
           .grad_c = shifted(row.grad_c, at),
           .grad_y = load_row(grad_y, row.grad_y),
           .d_h_rest = shifted(row.d_h_rest, at),
           .takes_weights = row.takes_weights,
           .cut = row.cut,
           .d_gates = d_gates,
           .d_c = shifted(row.d_c, at),
           .d_h_direct = shifted(row.d_h_direct, at),
           .output = row.output ? output : nullptr};
    part.from_weights = shifted(t.from_weights, i * t.weights_stride);
    cell.backward(cell, part);
    for (int k = 0; k < cell.cell.grad_blocks; ++k)
      convert_row<E, float>(static_cast<E*>(row.d_gates) + k * t.H + at, d_gates + k * kStageUnits,
                            t.units);
    if (row.output) convert_row<S, float>(static_cast<S*>(row.output) + at, output, t.units);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
