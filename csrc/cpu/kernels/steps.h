// Steps of a single sequence: the product with W_hh and the cell in one function.
//
// A step of a few dozen units takes a few hundred cycles, most of which wait for results: a step
// needs the h of the step before. Calls, and results that go through memory, would add to that.
#pragma once

#include "cpu/kernels/cell_tile.h"
#include "cpu/kernels/int8.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

// A product of one row that is called. Inlined, GCC 12 would keep the sums of tiles that convert
// weights in memory.
template <TileFunction kTile>
__attribute__((noinline)) void call(int64_t K, const void* lhs, const void* panel, const void* bias,
                                    void* out, int64_t chain) {
  kTile(1, K, &lhs, panel, bias, out, 0, {.chain = chain});
}

// The product of one row of K elements with a panel of NR vectors, for weights that an Op of
// product.h reads.
template <class Op>
struct RowProduct {
  static constexpr bool kConverts = false;
  template <int NR, class A>
  RNNFAST_INLINE static void multiply(int64_t K, const void* lhs, const void* panel, const A* bias,
                                      A* out, int64_t chain) {
    if constexpr (std::is_same_v<Op, DenseOperand<A>>)
      tile<Op, NR, 1>(1, K, &lhs, panel, bias, out, 0, {.chain = chain});
    else
      call<tile<Op, NR, 1>>(K, lhs, panel, bias, out, chain);
  }
  RNNFAST_INLINE static void load(const Steps&, const void*) {}
};
// The same for frozen weights of int8.
template <class Op>
struct Int8RowProduct {
  static constexpr bool kConverts = true;
  template <int NR, class A>
  RNNFAST_INLINE static void multiply(int64_t K, const void* lhs, const void* panel, const A* bias,
                                      A* out, int64_t chain) {
    call<int8::tile<Op, NR, 1>>(K, lhs, panel, bias, out, chain);
  }
  RNNFAST_INLINE static void load(const Steps& s, const void* h) {
    int8::load_lhs<Op>(s.lhs, h, s.H);
  }
};

// What is done in one step with a panel of V vectors of units. from_x is null if it is to be
// computed from x.
template <class Cell, class Product, int V, class A>
RNNFAST_INLINE void step_panel(const Steps& s, int64_t p, const ForwardRow& row, const void* lhs,
                               const A* from_x, const void* x) {
  constexpr int lanes = kLanes<A>, G = Cell::kGates;
  constexpr int64_t units = kUnitVectors<Cell> * lanes, width = G * units;
  alignas(RNNFAST_VECTOR_BYTES) A from_h[G * V * lanes] = {}, projected[G * V * lanes] = {};
  if constexpr (!Product::kConverts)
    if (!from_x)
      Product::template multiply<G * V>(s.I, x, in_row<char>(s.w_ih, p * s.w_ih_panel_bytes),
                                        in_row<A>(s.b_ih, p * width), projected, s.chain);
  Product::template multiply<G * V>(s.H, lhs, in_row<char>(s.weights, p * s.panel_bytes),
                                    in_row<A>(s.bias, p * width), from_h, s.chain);
  const ForwardTile t{.H = s.H,
                      .first_unit = p * units,
                      .units = smaller(units, s.H - p * units),
                      .rows = &row,
                      .count = 1,
                      .from_x = from_x ? from_x + p * width : projected,
                      .x_stride = 0,
                      .from_h = from_h,
                      .h_stride = 0,
                      .parameters = s.parameters};
  forward_rows<Cell, A, A, 1, V, false, true>(t, 0);
}

// A StepsFunction for tensors of A.
template <class Cell, class A, class Product>
__attribute__((flatten)) void steps(const Steps& s) {
  constexpr int lanes = kLanes<A>, U = kUnitVectors<Cell>;
  for (int64_t step = 0; step < s.count; ++step) {
    const auto place = [step](void* first, int64_t stride) {
      return first ? in_row<A>(first, step * stride) : nullptr;
    };
    A* const h = static_cast<A*>(s.h[(step + 1) & 1]);
    const ForwardRow row{.h_prev = s.h[step & 1],
                         .c_prev = s.c,
                         .h = h,
                         .c = s.c,
                         .saved = place(s.saved, s.saved_stride),
                         .c_copy = place(s.c_copy, s.c_copy_stride)};
    Product::load(s, row.h_prev);
    const void* lhs = Product::kConverts ? s.lhs : row.h_prev;
    const A* from_x = s.from_x ? in_row<A>(s.from_x, step * s.from_x_stride) : nullptr;
    const void* x = s.from_x ? nullptr : in_row<A>(s.x, step * s.x_stride);
    // Panels are walked in alternating directions: a step begins with those that the last step left
    // in cache.
    for (int64_t i = 0; i < s.panels; ++i) {
      const int64_t p = step % 2 ? s.panels - 1 - i : i;
      if (U == 1 || p + 1 < s.panels)
        step_panel<Cell, Product, U>(s, p, row, lhs, from_x, x);
      else
        as_constant(s.last_vectors, [&]<int V>() __attribute__((always_inline)) {
          step_panel<Cell, Product, V>(s, p, row, lhs, from_x, x);
        });
    }
    A* y = in_row<A>(s.y, step * s.y_stride);
    for (int64_t i = 0; i < s.H; i += lanes) store(y + i, load(h + i), s.H - i);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
