// Products of floats on AMX tiles in split precision: each float is the sum of three bfloat16.
//
// A float has 24 bits and a bfloat16 has 8, so a = a0 + a1 + a2 exactly: each term is the rounded
// remainder of those before it. Of the nine products of terms, six can affect the last bit of a
// float. They are summed with a0 b0 last: a0 b2, a0 b1, a1 b1, a1 b0, a2 b0, a0 b0. Each product is
// exact, and AMX sums in float. (Henry, Tang, Heinecke: Leveraging the bfloat16 artificial
// intelligence datatype for higher-precision computations, 2019.)
//
// Infinities, NaN, and numbers that round to infinity as a bfloat16 cannot be split: their products
// are NaN. Terms below 2^-126 are taken as zero.
//
// A step is 32 elements of k. An lhs row is [step][term][32 bfloat16]; a panel is
// [step][vector][term][16 pairs of k][lane].
#pragma once

#include "cpu/kernels/amx.h"
#include "cpu/kernels/pack.h"

namespace rnnfast::cpu::RNNFAST_TARGET::bf16x3 {

using V = Vec<float>;
inline constexpr int kTerms = 3, lanes = kLanes<float>;
inline constexpr int64_t kStep = 2 * lanes;
// Sizes in memory, counted in floats: a step of an lhs row; a step of a panel per vector and term.
inline constexpr int64_t kRowStep = kTerms * lanes;
inline constexpr int64_t kBlock = lanes * lanes;
inline constexpr auto kShapes =
    amx::all_shapes<kTerms>(std::make_integer_sequence<int, amx::kTileRows>());

struct Decoded {
  V low, high;
};
RNNFAST_INLINE Decoded decoded(V words) {
  const __m512i bits = __m512i(words);
  const auto half = [](__m256i one) __attribute__((always_inline)) {
    return V(_mm512_slli_epi32(_mm512_cvtepu16_epi32(one), 16));
  };
  return {half(_mm512_castsi512_si256(bits)), half(_mm512_extracti64x4_epi64(bits, 1))};
}

// The terms of 32 consecutive numbers.
struct Words {
  V term[kTerms];
};
RNNFAST_INLINE Words split(V first, V second) {
  Words words;
  unrolled<kTerms>([&](auto p) __attribute__((always_inline)) {
    words.term[p] = bit_cast<V>(_mm512_cvtne2ps_pbh(__m512(second), __m512(first)));
    const auto [low, high] = decoded(words.term[p]);
    first -= low;
    second -= high;
  });
  return words;
}
// Whether all numbers could be split.
RNNFAST_INLINE bool finite(const Words& words) {
  const __m512i infinite = _mm512_set1_epi16(0x7f80);
  const __m512i exponents = _mm512_and_si512(__m512i(words.term[0]), infinite);
  return _mm512_cmpeq_epi16_mask(exponents, infinite) == 0;
}
// Pairs element i with element 16 + i.
RNNFAST_INLINE V in_pairs(V words) {
  alignas(64) static constexpr auto kOrder = [] {
    std::array<uint16_t, 2 * lanes> order{};
    for (int i = 0; i < lanes; ++i)
      order[size_t(2 * i)] = uint16_t(i), order[size_t(2 * i + 1)] = uint16_t(lanes + i);
    return order;
  }();
  return V(_mm512_permutexvar_epi16(_mm512_load_si512(&kOrder), __m512i(words)));
}

inline bool load_lhs(void* to, const void* from, int64_t K) {
  const auto source = static_cast<const float*>(from);
  auto result = static_cast<float*>(to);
  bool all_finite = true;
  for (int64_t k = 0; k < K; k += kStep, result += kRowStep) {
    const Words words = split(load(source + k, K - k),
                              K - k > lanes ? load(source + k + lanes, K - k - lanes) : V{});
    for (int p = 0; p < kTerms; ++p) store(result + p * lanes, words.term[p]);
    all_finite = all_finite && finite(words);
  }
  return all_finite;
}

inline bool pack_gates(const GateShape& shape, const void* w, int64_t K, int64_t panel, void* to) {
  const GateColumns columns{shape, panel, lanes};
  const int vectors = columns.vectors();
  const int64_t pitch = vectors * kTerms * kBlock;
  bool all_finite = true;
  for (int j = 0; j < vectors; ++j) {
    float* block = static_cast<float*>(to) + j * kTerms * kBlock;
    const float* from = static_cast<const float*>(w) + columns.row(j) * K;
    for (int64_t k = 0; k < K; k += kStep, block += pitch) {
      V squares[kTerms][lanes];
      for (int i = 0; i < lanes; ++i) {
        const float* row = from + i * K + k;
        const Words words =
            i < columns.units(j)
                ? split(load(row, K - k), K - k > lanes ? load(row + lanes, K - k - lanes) : V{})
                : Words{};
        all_finite = all_finite && finite(words);
        for (int p = 0; p < kTerms; ++p) squares[p][i] = words.term[p];
      }
      for (int p = 0; p < kTerms; ++p) {
        transpose<float>(squares[p]);
        for (int i = 0; i < lanes; ++i) store(block + p * kBlock + i * lanes, squares[p][i]);
      }
    }
  }
  return all_finite;
}

inline void pack_columns(const void* const* rows, int64_t count, int64_t column, int64_t columns,
                         int vectors, void* to) {
  float* panel = static_cast<float*>(to);
  for (int64_t k = 0; k < count; k += kStep, panel += vectors * kTerms * kBlock) {
    for (int i = 0; i < lanes; ++i) {
      const int64_t at = k + 2 * i;
      const auto even = static_cast<const float*>(at < count ? rows[at] : nullptr);
      const auto odd = static_cast<const float*>(at + 1 < count ? rows[at + 1] : nullptr);
      for (int j = 0; j < vectors; ++j) {
        const int64_t first = column + j * lanes, left = columns - first;
        const Words words =
            split(even ? load(even + first, left) : V{}, odd ? load(odd + first, left) : V{});
        for (int p = 0; p < kTerms; ++p)
          store(panel + (j * kTerms + p) * kBlock + i * lanes, in_pairs(words.term[p]));
      }
    }
  }
}

inline void transpose_lhs(const void* const* rows, int64_t count, int64_t begin, int64_t end,
                          void* to, int64_t pitch) {
  for (int64_t k = 0; k < count; k += kStep) {
    const float* from[kStep];
    for (int64_t i = 0; i < kStep; ++i)
      from[i] = k + i < count ? static_cast<const float*>(rows[k + i]) : nullptr;
    for (int64_t m = begin; m < end; m += lanes) {
      V squares[2][lanes];
      for (int64_t i = 0; i < kStep; ++i)
        squares[i / lanes][i % lanes] = from[i] ? load(from[i] + m, end - m) : V{};
      for (V(&square)[lanes] : squares) transpose<float>(square);
      const int64_t n = smaller(lanes, end - m);
      for (int64_t i = 0; i < n; ++i) {
        float* result = reinterpret_cast<float*>(static_cast<char*>(to) + (m - begin + i) * pitch) +
                        k / kStep * kRowStep;
        const Words words = split(squares[0][i], squares[1][i]);
        for (int p = 0; p < kTerms; ++p) store(result + p * lanes, words.term[p]);
      }
    }
  }
}

inline void sum_lhs(const void* lhs, int64_t pitch, int64_t count, int64_t depth, void* sums) {
  constexpr int64_t kChain = 16 * lanes;  // as in kernels/pack.h
  for (int64_t m = 0; m < count; m += lanes) {
    const int64_t n = smaller(lanes, count - m);
    V of_rows[lanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      const auto row =
          reinterpret_cast<const float*>(static_cast<const char*>(lhs) + (m + i) * pitch);
      for (int64_t k = 0; k < depth; k += kChain) {
        V sum{};
        for (int64_t at = k; at < smaller(depth, k + kChain); at += kStep)
          for (int p = 0; p < kTerms; ++p) {
            const auto [low, high] = decoded(load(row + at / kStep * kRowStep + p * lanes));
            sum += low + high;
          }
        of_rows[i] += sum;
      }
    }
    store(static_cast<float*>(sums) + m, lane_sums<float>(of_rows), n);
  }
}

// With one group of rows, the registers hold all terms of the lhs; with two, one term at a time.
template <int R>
using Registers = amx::Registers<R, R == 1 ? kTerms : R>;
template <int R>
inline constexpr int kRounds = R == 1 ? 3 : 6;  // rounds of multiplications in a step

// The other work of a product: prefetching after each round, and deferred work after each step. If
// there are too many lines per round, none is prefetched, as that would take longer than it saves.
class Between {
 public:
  RNNFAST_INLINE Between(const TileOptions& options, int64_t steps, int rounds)
      : next_(static_cast<const char*>(options.prefetch)), interleaved_(options.deferred, steps) {
    constexpr int64_t kMaxLines = 8;
    const int64_t bytes = (steps > 0 ? steps : 1) * rounds * kLineBytes;
    lines_ = next_ ? (options.prefetch_bytes + bytes - 1) / bytes : 0;
    if (lines_ > kMaxLines) lines_ = 0;
  }
  RNNFAST_INLINE void round() {
    for (int64_t i = 0; i < lines_; ++i, next_ += kLineBytes) __builtin_prefetch(next_, 0, 2);
  }
  RNNFAST_INLINE void step() { interleaved_.step(); }

 private:
  const char* next_;
  int64_t lines_;
  amx::Interleaved interleaved_;
};

// As amx::block: R groups of rows by C vectors of columns; the panel has NR vectors.
template <int R, int C, int NR>
RNNFAST_INLINE void block(int rows, int64_t steps, const amx::Lhs& lhs, const float* panel,
                          const float* bias, float* out, int64_t stride, bool add,
                          Between& between) {
  using In = Registers<R>;
  const auto sums = [&](auto f) __attribute__((always_inline)) {
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      unrolled<C>([&](auto c) __attribute__((always_inline)) { f(r, c); });
    });
  };
  sums([&](auto r, auto c) __attribute__((always_inline)) {
    if (!add && bias)
      amx::load_tile<In::sums(r, c)>(bias + c * lanes, 0);
    else
      amx::clear_tile<In::sums(r, c)>();
  });
  const char* from = lhs.rows;
  for (int64_t step = 0; step < steps; ++step) {
    const auto load_left = [&](auto i, int term) __attribute__((always_inline)) {
      const int group = R == 1 ? 0 : int(i);
      amx::load_tile<In::lhs(i)>(from + term * kLineBytes + group * amx::kRows * lhs.stride,
                                 lhs.stride);
    };
    const auto load_right = [&](auto c, int term) __attribute__((always_inline)) {
      amx::load_tile<In::rhs(c)>(panel + (c * kTerms + term) * kBlock, kLineBytes);
    };
    if constexpr (R == 1) {
      unrolled<kTerms>([&](auto p) __attribute__((always_inline)) { load_left(p, p); });
      unrolled<kTerms>([&](auto round) __attribute__((always_inline)) {
        unrolled<C>([&](auto c) __attribute__((always_inline)) {
          load_right(c, kTerms - 1 - round);
          unrolled<round + 1>([&](auto i) __attribute__((always_inline)) {
            constexpr int term = round < 2 ? i : (i + 1) % kTerms;
            amx::multiply_pairs<In::sums(0, c), In::lhs(term), In::rhs(c)>();
          });
        });
        between.round();
      });
    } else {
      // The order of the six products: each shares a term with the one before, which stays loaded.
      constexpr int kLhs[] = {0, 0, 1, 1, 2, 0}, kRhs[] = {2, 1, 1, 0, 0, 0};
      unrolled<kRounds<R>>([&](auto round) __attribute__((always_inline)) {
        constexpr bool kFirst = round == 0;
        constexpr int kBefore = kFirst ? 0 : round - 1;
        if (kFirst || kLhs[round] != kLhs[kBefore])
          unrolled<R>([&](auto r) __attribute__((always_inline)) { load_left(r, kLhs[round]); });
        unrolled<C>([&](auto c) __attribute__((always_inline)) {
          if (kFirst || kRhs[round] != kRhs[kBefore]) load_right(c, kRhs[round]);
          unrolled<R>([&](auto r) __attribute__((always_inline)) {
            amx::multiply_pairs<In::sums(r, c), In::lhs(r), In::rhs(c)>();
          });
        });
        between.round();
      });
    }
    between.step();
    from += kRowStep * int64_t(sizeof(float));
    panel += NR * kTerms * kBlock;
  }
  constexpr int64_t kPitch = C * lanes;
  alignas(64) float part[R * amx::kRows * kPitch];
  const int64_t pitch = add ? kPitch : stride;
  float* to = add ? part : out;
  sums([&](auto r, auto c) __attribute__((always_inline)) {
    amx::store_tile<In::sums(r, c)>(to + r * amx::kRows * pitch + c * lanes,
                                    pitch * int64_t(sizeof(float)));
  });
  for (int i = 0; add && i < rows; ++i)
    for (int c = 0; c < C; ++c) {
      float* sum = out + i * stride + c * lanes;
      store(sum, load(sum) + load(part + i * kPitch + c * lanes));
    }
}

template <int R, int NR>
RNNFAST_INLINE void columns(int rows, int64_t steps, const amx::Lhs& lhs, const float* panel,
                            const float* bias, float* out, int64_t stride,
                            const TileOptions& options) {
  constexpr int kMax = Registers<R>::kMaxColumns, kBlocks = (NR + kMax - 1) / kMax;
  Between between(options, steps * kBlocks, kRounds<R>);
  unrolled<kBlocks>([&](auto i) __attribute__((always_inline)) {
    constexpr int first = i * kMax, count = NR - first < kMax ? NR - first : kMax;
    const int64_t at = first * lanes;
    block<R, count, NR>(rows, steps, lhs, panel + first * kTerms * kBlock,
                        bias ? bias + at : nullptr, out + at, stride, options.add, between);
  });
}

// A TileFunction. lhs rows must be at equal distances, and options.chain counts steps.
template <int NR>
void product(int rows, int64_t K, const void* const* lhs, const void* packed, const void* bias,
             void* out, int64_t stride, const TileOptions& options) {
  const int64_t distance =
      rows > 1 ? static_cast<const char*>(lhs[1]) - static_cast<const char*>(lhs[0]) : 0;
  amx::Lhs from{static_cast<const char*>(lhs[0]), distance};
  amx::use(kShapes[size_t(rows - 1)]);
  const auto panel = static_cast<const float*>(packed);
  const int64_t all = (K + kStep - 1) / kStep;
  TileOptions part = options;
  for (int64_t step = 0; step == 0 || step < all; step += options.chain) {
    const int64_t count = smaller(options.chain, all - step);
    const auto at = panel + step * NR * kTerms * kBlock;
    const auto first_bias = static_cast<const float*>(step == 0 ? bias : nullptr);
    rows > amx::kRows
        ? columns<2, NR>(rows, count, from, at, first_bias, static_cast<float*>(out), stride, part)
        : columns<1, NR>(rows, count, from, at, first_bias, static_cast<float*>(out), stride, part);
    from.rows += count * kRowStep * int64_t(sizeof(float));
    part.add = true;
    part.prefetch = nullptr;
  }
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET::bf16x3
