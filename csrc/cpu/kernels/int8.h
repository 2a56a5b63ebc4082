// Products with frozen weights of int8.
//
// Weights are integers from -127 to 127 with a scale per column of the panel. A row of the lhs is
// quantised when it is loaded: to integers from -kMaxValue to kMaxValue with a scale of its own. An
// instruction multiplies pairs of 16-bit integers and adds the two products to a 32-bit sum. So the
// rows have 13 bits at the cost of 8, and no sum overflows: a chain has 4096 terms of at most
// kMaxValue * 127. Integer sums are exact, and are scaled once at the end of a chain.
//
// An lhs row is [pair of k] of int16, then Trailer. A panel is [pair of k][vector][lane][2] of
// int8, then [vector][lane] scales, float.
#pragma once

#include "cpu/kernels/product.h"

namespace rnnfast::cpu::RNNFAST_TARGET::int8 {

inline constexpr int lanes = kLanes<float>;
using Sums = VectorOf<float>::integer;
typedef int16_t Pairs __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

inline constexpr int64_t kChainPairs = 2048;
inline constexpr float kMaxValue = 4095;
static_assert(2 * kChainPairs * int64_t(kMaxValue) * 127 < int64_t(1) << 31);

// What follows the integers of an lhs row.
struct Trailer {
  float scale;
  // The row of floats if it has a NaN or an infinity, which integers cannot represent; else null.
  const float* not_finite;
};
RNNFAST_INLINE Trailer trailer_of(const void* row, int64_t pairs) {
  Trailer trailer;
  __builtin_memcpy(&trailer, static_cast<const char*>(row) + pairs * 4, sizeof(trailer));
  return trailer;
}

// A vector of pairs of weights, converted to 16 bits.
RNNFAST_INLINE Pairs load_weights(const int8_t* p) {
#if RNNFAST_VECTOR_BYTES == 64
  return Pairs(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif RNNFAST_VECTOR_BYTES == 32
  return Pairs(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__x86_64__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return Pairs(_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8));
#else
  typedef int8_t Bytes __attribute__((vector_size(8)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Pairs);
#endif
}

// sum[i] + a[2i] b[2i] + a[2i + 1] b[2i + 1]
RNNFAST_INLINE Sums multiply_add(Sums sum, Pairs a, Pairs b) {
#if RNNFAST_VECTOR_BYTES == 64
  return sum + Sums(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif RNNFAST_VECTOR_BYTES == 32
  return sum + Sums(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif defined(__x86_64__)
  return sum + Sums(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
  // In each lane of 32 bits: the low half, with its sign, and the high half.
  const auto low = [](Pairs p) { return (Sums(p) << 16) >> 16; };
  const auto high = [](Pairs p) { return Sums(p) >> 16; };
  return sum + low(a) * low(b) + high(a) * high(b);
#endif
}

RNNFAST_INLINE Pairs broadcast_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return Pairs(pair - Sums{});
}

// Quantises a row of float.
inline bool load_lhs(void* to, const void* from, int64_t K) {
  using V = Vec<float>;
  const auto source = static_cast<const float*>(from);
  V largest{}, zero{};  // zero stays 0 in every lane that has met finite numbers only
  for (int64_t k = 0; k < K; k += lanes) {
    const V value = load(source + k, K - k), size = value < 0 ? -value : value;
    largest = size > largest ? size : largest;
    zero = fma(value, V{}, zero);
  }
  float max = 0;
  bool finite = true;
  for (int i = 0; i < lanes; ++i) {
    max = largest[i] > max ? largest[i] : max;
    finite = finite && zero[i] == 0;
  }
  constexpr float kSmallest = 0x1p-100f;  // rows of smaller numbers become zeros
  const float factor = finite && max > kSmallest ? kMaxValue / max : 0;
  const int64_t pairs = (K + 1) / 2;
  auto result = static_cast<int16_t*>(to);
  // Adding kMagic rounds to the nearest integer, which is then in the low bits.
  constexpr float kMagic = 0x1.8p23f;
  const auto quantised = [&](int64_t k) __attribute__((always_inline)) {
    const V value = finite ? load(source + k, K - k) : V{};
    const Sums bits = Sums(fma(value, broadcast<V>(factor), broadcast<V>(kMagic)));
    // The low 16 bits are all that there is of an integer and its sign.
    return narrow(VecU32(bits - Sums(broadcast<V>(kMagic))) & 0xffff);
  };
  int64_t k = 0;
  for (; k + lanes <= K; k += lanes) {
    const HalfBits values = quantised(k);
    __builtin_memcpy(result + k, &values, sizeof(values));
  }
  if (k < 2 * pairs) {
    const HalfBits values = quantised(k);
    __builtin_memcpy(result + k, &values, size_t(2 * pairs - k) * sizeof(int16_t));
  }
  const Trailer trailer{finite ? max / kMaxValue : 0, finite ? nullptr : source};
  __builtin_memcpy(result + 2 * pairs, &trailer, sizeof(trailer));
  return true;
}

// Computes a row of a tile as products of floats are, for an lhs row with a NaN or an infinity.
template <int NR>
__attribute__((noinline)) void multiply_floats(const float* row, int64_t K, const int8_t* panel,
                                               const float* scales, const float* bias, float* out,
                                               bool add) {
  for (int column = 0; column < NR * lanes; ++column) {
    float sum = 0;
    for (int64_t k = 0; k < K; ++k)
      sum += row[k] * float(panel[(k / 2 * NR * lanes + column) * 2 + k % 2]);
    const float rest = add ? out[column] : bias ? bias[column] : 0;
    out[column] = rest + sum * scales[column];
  }
}

// The TileFunction.
template <int NR, int MR>
void tile(int, int64_t K, const void* const* lhs, const void* packed, const void* bias, void* out,
          int64_t stride, const TileOptions& options) {
  using V = Vec<float>;
  using Shape = TileShape<NR, MR>;
  constexpr int kVectors = Shape::kVectors, kUnrolled = RNNFAST_REGISTERS == 16 ? 4 : 1;
  constexpr int kPitch = NR * lanes * 2;
  const int64_t pairs = (K + 1) / 2;
  const auto weights = static_cast<const int8_t*>(packed);
  const auto scales = reinterpret_cast<const float*>(weights + pairs * NR * lanes * 2);
  Prefetcher prefetcher(options, pairs / kUnrolled, packed);
  const int16_t* row[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) row[i] = static_cast<const int16_t*>(lhs[i]);
  for (int first = 0; first < NR; first += kVectors) {
    const int8_t* panel = weights + first * lanes * 2;
    for (int64_t begin = 0; begin == 0 || begin < pairs; begin += kChainPairs) {
      const int64_t end = smaller(pairs, begin + kChainPairs);
      Sums sum[MR][kVectors] = {};
      const auto add_pair = [&](int64_t k, const int8_t* from) __attribute__((always_inline)) {
        Pairs b[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) b[j] = load_weights(from + j * lanes * 2);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
          const Pairs a = broadcast_pair(row[i] + 2 * k);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            sum[i][j] = multiply_add(sum[i][j], a, b[j]);
            // GCC would compute all products before the sums, which then do not fit the registers.
            keep_in_register(sum[i][j]);
          }
        }
      };
      int64_t k = begin;
      for (; k + kUnrolled <= end; k += kUnrolled, panel += kUnrolled * kPitch) {
        if (Shape::kFetches) prefetcher.fetch();
#pragma GCC unroll 4
        for (int word = 0; word < kUnrolled; ++word) add_pair(k + word, panel + word * kPitch);
      }
      for (; k < end; ++k, panel += kPitch) add_pair(k, panel);
      const bool add = options.add || begin > 0;
      float* to = static_cast<float*>(out) + first * lanes;
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i, to += stride) {
        const V row_scale = broadcast<V>(trailer_of(row[i], pairs).scale);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          const int at = j * lanes;
          const V rest = add    ? load(to + at)
                         : bias ? load(static_cast<const float*>(bias) + first * lanes + at)
                                : V{};
          store(to + at, fma(__builtin_convertvector(sum[i][j], V),
                             load(scales + first * lanes + at) * row_scale, rest));
        }
      }
    }
  }
  for (int i = 0; i < MR; ++i)
    if (const float* row_of_floats = trailer_of(lhs[i], pairs).not_finite)
      multiply_floats<NR>(row_of_floats, K, weights, scales,
                          static_cast<const float*>(options.add ? nullptr : bias),
                          static_cast<float*>(out) + i * stride, options.add);
}

constexpr WeightFormat make_format() {
  WeightFormat format{};
  format.name = "int8";
  format.step = format.word = 2;
  format.row_step_bytes = 2 * sizeof(int16_t);
  format.row_extra_bytes = sizeof(Trailer);
  format.panel_step_bytes = 2 * lanes;
  format.panel_extra_bytes = lanes * int(sizeof(float));
  format.converts_lhs = true;
  format.row_cycles = 1;
  format.min_rows = 1;
  format.weight_bytes = 2;
  format.chain = kChainPairs;
  for_each_tile([&]<int NR, int MR>() {
    format.tile_rows[NR - 1] = kRegisterRows[NR - 1];
    format.tiles[NR - 1][MR - 1] = tile<NR, MR>;
  });
  format.load_lhs = load_lhs;
  return format;
}
inline constexpr WeightFormat kFormat = make_format();

}  // namespace rnnfast::cpu::RNNFAST_TARGET::int8
