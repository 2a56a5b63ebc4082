// Products of bfloat16 pairs (AVX512-BF16): one instruction multiplies the two elements of a pair
// and adds both products to a float. A word of k is a pair. States and gate gradients are read as
// bfloat16, without conversion.
#pragma once

#include "cpu/kernels/product.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

struct PairOperand {
  using Compute = float;
  using Element = bf16;
  using Weight = float;  // the bits of a pair
  using Word = int32_t;
  static constexpr int kPerWord = 2;

  RNNFAST_INLINE static Vec<float> multiply_add(Vec<float> sum, Word lhs, Vec<float> rhs) {
    return Vec<float>(
        _mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_epi32(lhs)), __m512bh(rhs)));
  }
  RNNFAST_INLINE static Vec<float> load_words(const bf16* from, int64_t elements) {
    if (elements < kPerWord * kLanes<float>) return load_first<Vec<float>>(from, elements);
    return load(reinterpret_cast<const float*>(from));
  }
  RNNFAST_INLINE static Vec<float> load_columns(const bf16* const* rows, int64_t columns) {
    const auto bits = [columns](const bf16* row) {
      return widen(row ? load_bits(row, columns) : HalfBits{});
    };
    return bit_cast<Vec<float>>(bits(rows[0]) | bits(rows[1]) << 16);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_TARGET
