// Products with frozen weights of int8 on AMX tiles. The formats of rows and panels are those of
// VNNI (int8_quads.h), and so are the results.
#pragma once

#include "cpu/kernels/amx.h"
#include "cpu/kernels/int8_quads.h"

namespace rnnfast::cpu::RNNFAST_TARGET::amx {

struct Quads {
  template <int kSums, int kLhs, int kRhs>
  RNNFAST_INLINE static void multiply_add() {
    multiply_quads<kSums, kLhs, kRhs>();
  }
};

// A TileFunction. The tiles compute the sums of whole steps of kWords words, as integers. The
// vector units add the rest of the words, and scale the sums.
template <int NR>
void int8_product(int rows, int64_t K, const void* const* lhs, const void* packed, const void* bias,
                  void* out, int64_t stride, const TileOptions& options) {
  using V = Vec<float>;
  using Op = int8::Int8Quads;
  constexpr int lanes = kLanes<float>, width = NR * lanes;
  const int64_t words = (K + Op::kPerWord - 1) / Op::kPerWord;
  const auto weights = static_cast<const int8_t*>(packed);
  const auto scales = reinterpret_cast<const float*>(weights + words * width * Op::kPerWord);
  alignas(64) int32_t sums[kTileRows][width];
  for (int64_t begin = 0; begin == 0 || begin < words; begin += Op::kChainWords) {
    const int64_t end = smaller(words, begin + Op::kChainWords);
    const int64_t steps = (end - begin) / kWords, whole = begin + steps * kWords;
    const int8_t* panel = weights + begin * width * Op::kPerWord;
    const void* from[kTileRows];
    for (int i = 0; i < rows; ++i)
      from[i] = static_cast<const int8_t*>(lhs[i]) + begin * Op::kPerWord;
    if (steps > 0)
      multiply_steps<Quads, NR>(rows, steps, from, reinterpret_cast<const float*>(panel), nullptr,
                                reinterpret_cast<float*>(sums[0]), width, false, options);
    else
      __builtin_memset(sums, 0, size_t(rows) * sizeof(sums[0]));
    const bool add = options.add || begin > 0;
    for (int i = 0; i < rows; ++i) {
      const auto row = static_cast<const int8_t*>(lhs[i]);
      const int8::Trailer trailer = int8::trailer_of(row, words);
      const int32_t first = Op::first_sum(row, trailer, begin, end);
      float* to = static_cast<float*>(out) + i * stride;
      for (int j = 0; j < NR; ++j) {
        int8::Sums sum;
        __builtin_memcpy(&sum, sums[i] + j * lanes, sizeof(sum));
        sum += first;
        for (int64_t k = whole; k < end; ++k) {
          int32_t word;
          __builtin_memcpy(&word, row + k * Op::kPerWord, sizeof(word));
          const int8_t* b = weights + (k * width + j * lanes) * Op::kPerWord;
          sum = Op::multiply_add(sum, word, Op::load_weights(b));
        }
        const int at = j * lanes;
        const V rest = add    ? load(to + at)
                       : bias ? load(static_cast<const float*>(bias) + at)
                              : V{};
        store(to + at, fma(__builtin_convertvector(sum, V),
                           load(scales + at) * broadcast<V>(trailer.scale), rest));
      }
    }
  }
  for (int i = 0; i < rows; ++i)
    if (const float* row_of_floats = int8::trailer_of(lhs[i], words).not_finite)
      int8::multiply_floats<Op, NR>(row_of_floats, K, weights, scales,
                                    static_cast<const float*>(options.add ? nullptr : bias),
                                    static_cast<float*>(out) + i * stride, options.add);
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET::amx
