// Products of bfloat16 pairs on Intel's AMX tiles, and what they share with those of int8.
//
// Each of the eight tile registers holds up to 16 rows of 64 bytes: the sums of 16 rows times a
// vector of columns; 16 words of k of 16 lhs rows; or 16 words of k of a vector of columns, in the
// layout of a panel.
#pragma once

#include "cpu/kernels/amx_instructions.h"
#include "cpu/kernels/bf16_pairs.h"

namespace rnnfast::cpu::RNNFAST_TARGET::amx {

inline constexpr int kRows = 16, kWords = 16;
inline constexpr int kTileRows = 2 * kRows;

// The use of the registers, for R = 1 or 2 groups of up to 16 rows and L registers for the lhs.
template <int R, int L = R>
struct Registers {
  static constexpr int kMaxColumns = R == 1 ? 4 : 2;
  static constexpr int sums(int group, int column) { return group * kMaxColumns + column; }
  static constexpr int lhs(int i) { return 4 + i; }
  static constexpr int rhs(int column) { return 4 + L + column % (4 - L); }
};

// The shapes of the registers, in the layout of the instruction ldtilecfg.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // For a tile of `of_rows` rows. With a single group of rows the lhs has `lhs_registers`
  // registers.
  constexpr Shapes(int of_rows, int lhs_registers) {
    for (int i = 0; i < 8; ++i) row_bytes[i] = kLineBytes, rows[i] = kWords;
    if (of_rows > kRows) {
      set<2>(0, kRows);
      set<2>(1, of_rows - kRows);
    } else {
      set<1>(0, of_rows);
      for (int i = 1; i < lhs_registers; ++i) rows[Registers<1>::lhs(i)] = uint8_t(of_rows);
    }
  }

 private:
  template <int R>
  constexpr void set(int group, int of_rows) {
    rows[Registers<R>::lhs(group)] = uint8_t(of_rows);
    for (int c = 0; c < Registers<R>::kMaxColumns; ++c)
      rows[Registers<R>::sums(group, c)] = uint8_t(of_rows);
  }
};
static_assert(sizeof(Shapes) == 64);

// The shapes for tiles of 1, 2, ... rows.
template <int kLhsRegisters, int... I>
constexpr std::array<Shapes, sizeof...(I)> all_shapes(std::integer_sequence<int, I...>) {
  return {Shapes(I + 1, kLhsRegisters)...};
}
inline constexpr auto kShapes = all_shapes<1>(std::make_integer_sequence<int, kTileRows>());

// Between `enter` and `leave` a thread uses its tile registers only for these products. So shapes
// are set only when they change; setting them takes as long as a dozen tile multiplications.
inline thread_local const Shapes* current_shapes = nullptr;
inline void enter() { current_shapes = nullptr; }
inline void leave() { release(); }
RNNFAST_INLINE void use(const Shapes& shapes) {
  if (&shapes == current_shapes) return;
  configure(&shapes);
  current_shapes = &shapes;
}

// Spreads deferred work evenly over the steps of a product.
class Interleaved {
 public:
  RNNFAST_INLINE Interleaved(Deferred* deferred, int64_t steps)
      : deferred_(deferred),
        pieces_(deferred && steps > 0 ? (deferred->left + steps - 1) / steps : 0) {}
  RNNFAST_INLINE void step() {
    if (pieces_ > 0 && deferred_->left > 0) deferred_->some(*deferred_, pieces_);
  }

 private:
  Deferred* deferred_;
  int64_t pieces_;
};

// How the words of two registers are multiplied and added to the sums of a third.
struct Pairs {
  template <int kSums, int kLhs, int kRhs>
  RNNFAST_INLINE static void multiply_add() {
    multiply_pairs<kSums, kLhs, kRhs>();
  }
};

// lhs rows, `stride` bytes apart.
struct Lhs {
  const char* rows;
  int64_t stride;
};

// out (=, or += if add) bias + the sums over `steps` times kWords words of k. It computes R groups
// of rows by C vectors of columns; the panel has NR vectors. If `add` is true, bias is ignored.
// Sums and bias have 32 bits, whatever their type.
template <class Op, int R, int C, int NR>
RNNFAST_INLINE void block(int64_t steps, const Lhs& lhs, const float* panel, const float* bias,
                          float* out, int64_t stride, bool add, Prefetcher& prefetcher,
                          Interleaved& interleaved) {
  using In = Registers<R>;
  constexpr int lanes = kLanes<float>;
  constexpr int64_t kPanelStride = NR * kLineBytes;
  const int64_t out_stride = stride * int64_t(sizeof(float));
  const auto sums = [&](auto f) __attribute__((always_inline)) {
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      unrolled<C>([&](auto c) __attribute__((always_inline)) {
        f(r, c, out + r * kRows * stride + c * lanes);
      });
    });
  };
  sums([&](auto r, auto c, float* at) __attribute__((always_inline)) {
    if (add)
      load_tile<In::sums(r, c)>(at, out_stride);
    else if (bias)
      load_tile<In::sums(r, c)>(bias + c * lanes, 0);
    else
      clear_tile<In::sums(r, c)>();
  });
  const char* from = lhs.rows;
  for (int64_t step = 0; step < steps; ++step, from += kLineBytes, panel += kWords * NR * lanes) {
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      load_tile<In::lhs(r)>(from + r * kRows * lhs.stride, lhs.stride);
    });
    unrolled<C>([&](auto c) __attribute__((always_inline)) {
      load_tile<In::rhs(c)>(panel + c * lanes, kPanelStride);
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        Op::template multiply_add<In::sums(r, c), In::lhs(r), In::rhs(c)>();
      });
    });
    for (int i = 0; i < kWords * C / NR; ++i) prefetcher.fetch();
    interleaved.step();
  }
  sums([&](auto r, auto c, float* at)
           __attribute__((always_inline)) { store_tile<In::sums(r, c)>(at, out_stride); });
}

template <class Op, int R, int NR>
void columns(int64_t steps, const Lhs& lhs, const float* panel, const float* bias, float* out,
             int64_t stride, bool add, const TileOptions& options) {
  constexpr int kMax = Registers<R>::kMaxColumns;
  constexpr int kBlocks = (NR + kMax - 1) / kMax;
  Prefetcher prefetcher(options, steps * kWords, lhs.rows);
  Interleaved interleaved(options.deferred, steps * kBlocks);
  unrolled<kBlocks>([&](auto i) __attribute__((always_inline)) {
    constexpr int first = i * kMax, count = NR - first < kMax ? NR - first : kMax;
    const int64_t at = first * kLanes<float>;
    block<Op, R, count, NR>(steps, lhs, panel + at, bias ? bias + at : nullptr, out + at, stride,
                            add, prefetcher, interleaved);
  });
}

// The product over whole steps of kWords words of k, for up to kTileRows rows.
template <class Op, int NR>
RNNFAST_INLINE void whole_steps(int rows, int64_t steps, const Lhs& lhs, const float* panel,
                                const float* bias, float* out, int64_t stride, bool add,
                                const TileOptions& options) {
  use(kShapes[size_t(rows - 1)]);
  rows > kRows ? columns<Op, 2, NR>(steps, lhs, panel, bias, out, stride, add, options)
               : columns<Op, 1, NR>(steps, lhs, panel, bias, out, stride, add, options);
}

RNNFAST_INLINE bool at_equal_distances(const void* const* rows, int count) {
  const auto distance = [&](int i) {
    return static_cast<const char*>(rows[i]) - static_cast<const char*>(rows[i - 1]);
  };
  for (int i = 2; i < count; ++i)
    if (distance(i) != distance(1)) return false;
  return true;
}

// The same for rows at any distances: if these are unequal, the rows are copied first.
template <class Op, int NR>
RNNFAST_INLINE void multiply_steps(int rows, int64_t steps, const void* const* lhs,
                                   const float* panel, const float* bias, float* out,
                                   int64_t stride, bool add, const TileOptions& options) {
  if (at_equal_distances(lhs, rows)) {
    const int64_t distance =
        rows > 1 ? static_cast<const char*>(lhs[1]) - static_cast<const char*>(lhs[0]) : 0;
    return whole_steps<Op, NR>(rows, steps, {static_cast<const char*>(lhs[0]), distance}, panel,
                               bias, out, stride, add, options);
  }
  constexpr int64_t kSteps = 16;  // steps copied at a time
  alignas(64) char copy[kTileRows][kSteps * kLineBytes];
  for (int64_t step = 0; step < steps; step += kSteps) {
    const int64_t count = smaller(kSteps, steps - step);
    for (int i = 0; i < rows; ++i)
      __builtin_memcpy(copy[i], static_cast<const char*>(lhs[i]) + step * kLineBytes,
                       size_t(count * kLineBytes));
    whole_steps<Op, NR>(rows, count, {copy[0], kSteps * kLineBytes},
                        panel + step * kWords * NR * kLanes<float>, step == 0 ? bias : nullptr, out,
                        stride, add || step > 0, options);
  }
}

// A TileFunction. Words of k that do not fill a step are multiplied by the vector kernels.
template <int NR>
void product(int rows, int64_t K, const void* const* lhs, const void* packed, const void* bias,
             void* out, int64_t stride, const TileOptions& options) {
  const int64_t depth = words<PairOperand>(K), steps = depth / kWords, rest = depth % kWords;
  const auto panel = static_cast<const float*>(packed);
  const auto sums = static_cast<float*>(out);
  const auto given_bias = static_cast<const float*>(bias);
  constexpr int64_t kWordFloats = NR * kLanes<float>;
  if (steps > 0)
    multiply_steps<Pairs, NR>(rows, steps, lhs, panel, given_bias, sums, stride, options.add,
                              options);
  if (rest == 0 && steps > 0) return;
  TileOptions of_rest{.chain = options.chain, .add = options.add || steps > 0};
  constexpr int kHeight = kRegisterRows[NR - 1];
  static constexpr auto kTiles = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array<TileFunction, sizeof...(I)>{tile<PairOperand, NR, I + 1>...};
  }(std::make_integer_sequence<int, kHeight>());
  for (int first = 0; first < rows; first += kHeight) {
    const int count = int(smaller(kHeight, rows - first));
    const void* from[kHeight];
    for (int i = 0; i < count; ++i)
      from[i] = static_cast<const char*>(lhs[first + i]) + steps * kLineBytes;
    kTiles[size_t(count - 1)](
        count, rest * PairOperand::kPerWord, from, panel + steps * kWords * kWordFloats,
        steps > 0 ? nullptr : given_bias, sums + first * stride, stride, of_rest);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET::amx
