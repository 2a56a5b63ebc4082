// The cell functions on a tile (see cpu/cell.h), built from the formulas in cells/. S is the
// storage type and E the type of states and gate gradients. Values are converted in registers when
// they are loaded and stored.
#pragma once

#include "cells/all.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/math.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

// Vectors of units in a panel of weights; see GateShape::unit_vectors.
template <class Cell>
inline constexpr int kUnitVectors = Cell::kGates == 1 ? 4 : 1;

// A cell whose h may be projected: the backward can compute it again.
template <class Cell>
concept Projectable = requires(Wide<Vec<float>, 1> v) { Cell::template output<Math>(&v, v); };

template <class T>
RNNFAST_INLINE const T* in_row(const void* row, int64_t at) {
  return static_cast<const T*>(row) + at;
}
template <class T>
RNNFAST_INLINE T* in_row(void* row, int64_t at) {
  return static_cast<T*>(row) + at;
}

// R rows by U vectors of units, with interleaved instructions. kWhole: the units fill the vectors.
// kPadded: rows of states are read and written in whole vectors.
template <class Cell, class S, class E, int R, int U, bool kWhole, bool kPadded = false>
RNNFAST_INLINE void forward_rows(const ForwardTile& t, int first) {
  using A = Compute<S>;
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, G = Cell::kGates, N = R * U;
  const auto left = [&](int i) { return kWhole ? lanes : t.units - i % U * lanes; };
  const auto of_state = [&](int i) { return kPadded ? lanes : left(i); };
  // Only the last block of c has room for whole vectors at its end.
  const auto of_c = [&](int i, int k) { return k + 1 == Cell::kCells ? of_state(i) : left(i); };
  const auto of_whole_c = [&](int i, int k) { return k + 1 == Cell::kCells ? lanes : left(i); };
  // one more, since arrays cannot be empty
  Wide<V, N> from_x[G], from_h[G], h_prev{}, h, parameters[Cell::kParameters + 1],
      c[Cell::kCells + 1] = {}, saved[Cell::kSaved + 1];
  unrolled<N>([&](auto i) __attribute__((always_inline)) {
    const ForwardRow& row = t.rows[first + i / U];
    const int64_t at = t.first_unit + i % U * lanes;
    unrolled<G>([&](auto g) __attribute__((always_inline)) {
      const int64_t gate = (g * kUnitVectors<Cell> + i % U) * lanes;
      from_x[g].v[i] = load(in_row<A>(t.from_x, (first + i / U) * t.x_stride + gate));
      from_h[g].v[i] = load(in_row<A>(t.from_h, (first + i / U) * t.h_stride + gate));
    });
    if (Cell::kDirect) h_prev.v[i] = load(in_row<E>(row.h_prev, at), of_state(i));
    unrolled<Cell::kCells>([&](auto k) __attribute__((always_inline)) {
      if (row.c_prev) c[k].v[i] = load(in_row<A>(row.c_prev, k * t.H + at), of_c(i, k));
    });
    unrolled<Cell::kParameters>([&](auto k) __attribute__((always_inline)) {
      parameters[k].v[i] = load(in_row<A>(t.parameters, k * t.H + at), left(i));
    });
  });
  Cell::template forward<Math>(from_x, from_h, h_prev, parameters, c, h, saved);
  unrolled<N>([&](auto i) __attribute__((always_inline)) {
    const ForwardRow& row = t.rows[first + i / U];
    const int64_t at = t.first_unit + i % U * lanes;
    if (row.h) store_state<S>(in_row<E>(row.h, at), h.v[i], of_state(i));
    unrolled<Cell::kCells>([&](auto k) __attribute__((always_inline)) {
      if (row.c) store(in_row<A>(row.c, k * t.H + at), c[k].v[i], of_whole_c(i, k));
      if (row.c_copy) store(in_row<A>(row.c_copy, k * t.H + at), c[k].v[i], left(i));
    });
    if (row.saved)
      unrolled<Cell::kSaved>([&](auto k) __attribute__((always_inline)) {
        store(in_row<S>(row.saved, k * t.H + at), saved[k].v[i], left(i));
      });
  });
}

template <class Cell, class S, class E>
void cell_forward(const ForwardTile& t) {
  constexpr int lanes = kLanes<Compute<S>>;
  const auto all_rows = [&]<int U>() __attribute__((always_inline)) {
    constexpr int kRows = U == 1 ? 3 : U == 2 ? 2 : 1;  // rows computed together
    int i = 0;
    if (t.units >= U * lanes) {
      for (; i + kRows <= t.count; i += kRows) forward_rows<Cell, S, E, kRows, U, true>(t, i);
      if (kRows > 2 && i + 2 == t.count) forward_rows<Cell, S, E, 2, U, true>(t, i), i += 2;
      if (kRows > 1 && i + 1 == t.count) forward_rows<Cell, S, E, 1, U, true>(t, i), i += 1;
    }
    for (; i < t.count; ++i) forward_rows<Cell, S, E, 1, U, false>(t, i);
  };
  if constexpr (kUnitVectors<Cell> == 1)
    all_rows.template operator()<1>();
  else
    as_constant(int((t.units + lanes - 1) / lanes), all_rows);
}

// Computes two vectors of units of a row at a time.
template <class Cell, class S, class E>
void cell_backward(const BackwardTile& t) {
  using A = Compute<S>;
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, D = Cell::kGradBlocks, N = 2;
  for (int r = 0; r < t.count; ++r) {
    const BackwardRow& row = t.rows[r];
    const A* from_weights = t.from_weights && row.takes_weights
                                ? in_row<A>(t.from_weights, r * t.weights_stride)
                                : nullptr;
    for (int64_t first = 0; first < t.units; first += N * lanes) {
      // one more, since arrays cannot be empty
      Wide<V, N> saved[Cell::kSaved + 1] = {}, d_gates[D + Cell::kParameters], h{}, h_prev{},
                                      c[Cell::kCells + 1] = {}, c_prev[Cell::kCells + 1] = {},
                                      parameters[Cell::kParameters + 1] = {}, d_h{},
                                      d_c[Cell::kCells + 1] = {}, d_h_direct{};
      unrolled<N>([&](auto i) __attribute__((always_inline)) {
        const int64_t in_tile = first + i * lanes, unit = t.first_unit + in_tile;
        const int64_t left = t.units - in_tile;
        if (i > 0 && left <= 0) return;
        const auto of_d_c = [&](int k) { return k + 1 == Cell::kCells ? lanes : left; };
        unrolled<Cell::kSaved>([&](auto k) __attribute__((always_inline)) {
          saved[k].v[i] = load(in_row<S>(row.saved, k * t.H + unit), left);
        });
        if (Cell::kReadsH) h.v[i] = load(in_row<S>(row.h, unit), left);
        if (Cell::kDirect) h_prev.v[i] = load(in_row<S>(row.h_prev, unit), left);
        unrolled<Cell::kCells>([&](auto k) __attribute__((always_inline)) {
          const int64_t at = k * t.H + unit;
          c[k].v[i] = load(in_row<A>(row.c, at), left);
          c_prev[k].v[i] = load(in_row<A>(row.c_prev, at), left);
          d_c[k].v[i] = load(in_row<A>(row.d_c, at), of_d_c(k));
          if (row.grad_c) d_c[k].v[i] += load(in_row<A>(row.grad_c, at), left);
        });
        unrolled<Cell::kParameters>([&](auto k) __attribute__((always_inline)) {
          parameters[k].v[i] = load(in_row<A>(t.parameters, k * t.H + unit), left);
        });
        if (row.grad_y) d_h.v[i] += load(in_row<S>(row.grad_y, unit), left);
        if (from_weights) d_h.v[i] += load(from_weights + in_tile);
        if (row.d_h_rest) d_h.v[i] += load(in_row<A>(row.d_h_rest, unit));
      });
      Cell::template backward<Math>(saved, h, h_prev, c, c_prev, parameters, d_h, d_c, d_h_direct,
                                    d_gates);
      Wide<V, N> output;
      if constexpr (Projectable<Cell>)
        if (row.output) output = Cell::template output<Math>(saved, c[0]);
      unrolled<N>([&](auto i) __attribute__((always_inline)) {
        const int64_t in_tile = first + i * lanes, unit = t.first_unit + in_tile;
        const int64_t left = t.units - in_tile;
        if (i > 0 && left <= 0) return;
        const auto of_d_c = [&](int k) { return k + 1 == Cell::kCells ? lanes : left; };
        if (Projectable<Cell> && row.output) store(in_row<S>(row.output, unit), output.v[i], left);
        unrolled<D + Cell::kParameters>([&](auto k) __attribute__((always_inline)) {
          store(in_row<E>(row.d_gates, k * t.H + unit), d_gates[k].v[i], left);
        });
        unrolled<Cell::kCells>([&](auto k) __attribute__((always_inline)) {
          store(in_row<A>(row.d_c, k * t.H + unit), row.cut ? V{} : d_c[k].v[i], of_d_c(k));
        });
        if (Cell::kDirect) store(in_row<A>(row.d_h_direct, unit), row.cut ? V{} : d_h_direct.v[i]);
      });
    }
  }
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
