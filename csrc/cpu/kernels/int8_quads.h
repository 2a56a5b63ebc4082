// Products with frozen weights of int8 by VNNI: an instruction multiplies four unsigned 8-bit
// integers by four signed ones, and adds the four products to a 32-bit sum, without saturation.
//
// The unsigned ones are the weights, stored with 128 added. What this adds to a sum depends on the
// row alone, and is taken off where the sum starts. Sums may wrap around on the way: only the
// result has to fit 32 bits.
#pragma once

#include "cpu/kernels/int8.h"

namespace rnnfast::cpu::RNNFAST_TARGET::int8 {

typedef int8_t Bytes __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

#if !defined(RNNFAST_MULTIPLY_QUADS)
#if RNNFAST_VECTOR_BYTES == 64
#define RNNFAST_MULTIPLY_QUADS(sum, a, b) _mm512_dpbusd_epi32(__m512i(sum), __m512i(a), __m512i(b))
#else
#define RNNFAST_MULTIPLY_QUADS(sum, a, b) \
  _mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(a), __m256i(b))
#endif
#endif

struct Int8Quads {
  using Number = int8_t;
  using Weights = Bytes;
  static constexpr int kPerWord = 4;
  static constexpr float kMaxValue = 127;
  static constexpr int64_t kChainWords = 32768;
  static constexpr uint8_t kFlippedBits = 0x80;  // adds 128
  static_assert(kPerWord * kChainWords * int64_t(kMaxValue) * 128 < int64_t(1) << 31);

  RNNFAST_INLINE static Bytes load_weights(const int8_t* p) {
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return bytes;
  }
  RNNFAST_INLINE static int32_t first_sum(const Number* row, const Trailer& trailer, int64_t begin,
                                          int64_t end) {
    if (begin == 0) return -128 * trailer.sum;
    int32_t sum = 0;
    for (int64_t k = kPerWord * begin; k < kPerWord * end; ++k) sum += row[k];
    return -128 * sum;
  }
  RNNFAST_INLINE static Sums multiply_add(Sums sum, int32_t word, Bytes b) {
    return Sums(RNNFAST_MULTIPLY_QUADS(sum, b, word - Sums{}));
  }
};

}  // namespace rnnfast::cpu::RNNFAST_TARGET::int8
