// Products without packing, for when it would not pay: dot products with rows of the weights, and
// outer products of few rows.
#pragma once

#include "cpu/kernels/pack.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

inline constexpr int kDotRows = 3;

// Adds to sum[r][i], lane by lane, the products of row i of w and lhs[r] for k in [begin, end).
// Eight rows of w are read at a time, so that their addresses fit in registers; or four, if the
// sums of eight do not. Beyond the last of the `rows` rows of w, the last one is read again.
template <int R, class S, class E>
RNNFAST_INLINE void dot_rows(const S* w, int64_t pitch, int rows, int64_t begin, int64_t end,
                             const void* const* lhs,
                             Vec<Compute<S>> (&sum)[R][kLanes<Compute<S>>]) {
  using A = Compute<S>;
  constexpr int lanes = kLanes<A>, kMost = R > 1 && RNNFAST_REGISTERS == 16 ? 4 : 8;
  constexpr int kGroup = lanes < kMost ? lanes : kMost;
#pragma GCC unroll 2
  for (int first = 0; first < lanes; first += kGroup) {
    const S* from[kGroup];
    for (int i = 0; i < kGroup; ++i) from[i] = w + smaller(first + i, rows - 1) * pitch;
    const auto add = [&](int64_t k, auto... left) __attribute__((always_inline)) {
      Vec<A> value[R];
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) value[r] = load(static_cast<const E*>(lhs[r]) + k, left...);
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i) {
        Vec<A> weights = load(from[i] + k, left...);
        if (R > 1) keep_in_register(weights);
#pragma GCC unroll 3
        for (int r = 0; r < R; ++r) sum[r][first + i] = fma(value[r], weights, sum[r][first + i]);
      }
    };
    int64_t k = begin;
    for (; k + lanes <= end; k += lanes) add(k);
    if (k < end) add(k, end - k);
  }
}

// R rows of the lhs times up to a vector of rows of w. Not inlined, so that the loop has all
// registers for addresses.
template <int R, class S, class E>
__attribute__((noinline)) void dots_of_vector(const S* w, int64_t K, int rows,
                                              const void* const* lhs, const Compute<S>* bias,
                                              Compute<S>* out, int64_t stride) {
  using A = Compute<S>;
  // Each lane has its own chain of additions, as long as a tile's at most.
  constexpr int64_t kPart = kChain * kLanes<A>;
  for (int64_t k = 0; k == 0 || k < K; k += kPart) {
    Vec<A> sum[R][kLanes<A>] = {};
    dot_rows<R, S, E>(w, K, rows, k, smaller(K, k + kPart), lhs, sum);
    for (int r = 0; r < R; ++r) {
      A* to = out + r * stride;
      store(to, lane_sums<A>(sum[r]) + load(k == 0 ? bias : to));
    }
  }
}

template <class S, class E>
void dots(const GateShape& shape, int rows, int64_t K, const void* const* lhs, const void* w,
          int64_t panel, const void* bias, void* out, int64_t stride) {
  using A = Compute<S>;
  constexpr int lanes = kLanes<A>;
  const GateColumns columns{shape, panel, lanes};
  const int vectors = columns.vectors();
  const auto of_vector = rows == 1   ? dots_of_vector<1, S, E>
                         : rows == 2 ? dots_of_vector<2, S, E>
                                     : dots_of_vector<3, S, E>;
  for (int j = 0; j < vectors; ++j)
    of_vector(static_cast<const S*>(w) + columns.row(j) * K, K,
              int(smaller(lanes, columns.units(j))), lhs, static_cast<const A*>(bias) + j * lanes,
              static_cast<A*>(out) + j * lanes, stride);
}

template <class S, class E>
void outer_few(const void* const* lhs, const void* const* rhs, int count, int64_t begin,
               int64_t rows, int64_t columns, void* to, bool add) {
  using A = Compute<S>;
  constexpr int lanes = kLanes<A>;
  as_constant(count, [&]<int R>() {
    const S* values[R];
    for (int r = 0; r < R; ++r) values[r] = static_cast<const S*>(rhs[r]);
    for (int64_t m = 0; m < rows; m += lanes) {
      const int64_t n = smaller(lanes, rows - m);
      alignas(64) A factors[R][lanes];
      for (int r = 0; r < R; ++r)
        store(factors[r], load(static_cast<const E*>(lhs[r]) + begin + m, n));
      for (int64_t i = 0; i < n; ++i) {
        A* row = static_cast<A*>(to) + (m + i) * columns;
        const auto sum_at = [&](int64_t at, auto... rest) __attribute__((always_inline)) {
          Vec<A> sum = add ? load(row + at, rest...) : Vec<A>{};
          unrolled<R>([&](auto r) __attribute__((always_inline)) {
            sum = fma(broadcast<Vec<A>>(factors[r][i]), load(values[r] + at, rest...), sum);
          });
          store(row + at, sum, rest...);
        };
        int64_t at = 0;
        for (; at + lanes <= columns; at += lanes) sum_at(at);
        if (at < columns) sum_at(at, columns - at);
      }
    }
  });
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
