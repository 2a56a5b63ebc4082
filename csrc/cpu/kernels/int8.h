// Products with frozen weights of int8.
//
// Weights are integers from -128 to 127 with a scale per column of the panel. A row of the lhs is
// quantised when it is loaded: to integers from -kMaxValue to kMaxValue with a scale of its own.
// Sums are integers of 32 bits, which cannot overflow within a chain. So they are exact, and are
// scaled once at the end of a chain.
//
// How rows are quantised depends on what the instruction set multiplies: pairs of 16-bit integers
// (below), or four 8-bit integers at once (int8_quads.h). A word of k is what a lane of 32 bits
// holds of a row.
//
// An lhs row is [word of k] of Op::Number, then Trailer. A panel is [word of k][vector][lane]
// [element of the word] of int8, then [vector][lane] scales, float.
#pragma once

#include "cpu/kernels/product.h"

namespace rnnfast::cpu::RNNFAST_TARGET::int8 {

inline constexpr int lanes = kLanes<float>;
using Sums = VectorOf<float>::integer;
typedef int16_t Pairs __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

// What follows the integers of an lhs row.
struct Trailer {
  float scale;
  int32_t sum;  // of the integers in the first chain
  // The row of floats if it has a NaN or an infinity, which integers cannot represent; else null.
  const float* not_finite;
};
RNNFAST_INLINE Trailer trailer_of(const void* row, int64_t words) {
  Trailer trailer;
  __builtin_memcpy(&trailer, static_cast<const char*>(row) + words * 4, sizeof(trailer));
  return trailer;
}

// Rows of 16-bit integers, of which an instruction multiplies pairs and adds the two products to a
// 32-bit sum. So rows have 13 bits at the cost of 8: a chain has 4096 terms of at most
// kMaxValue * 128.
struct Int16Pairs {
  using Number = int16_t;
  using Weights = Pairs;  // a vector of words
  static constexpr int kPerWord = 2;
  static constexpr float kMaxValue = 4095;
  static constexpr int64_t kChainWords = 2048;
  static constexpr uint8_t kFlippedBits = 0;
  static_assert(2 * kChainWords * int64_t(kMaxValue) * 128 < int64_t(1) << 31);

  // Converts a vector of pairs of weights to 16 bits.
  RNNFAST_INLINE static Pairs load_weights(const int8_t* p) {
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
  // What a sum starts from, in the words [begin, end) of a row.
  RNNFAST_INLINE static int32_t first_sum(const Number*, const Trailer&, int64_t, int64_t) {
    return 0;
  }
  // sum[i] + the sum of the products of the elements of `word` and of b[i]
  RNNFAST_INLINE static Sums multiply_add(Sums sum, int32_t word, Pairs b) {
    const Pairs a = Pairs(word - Sums{});
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
};

// Quantises a row of float.
template <class Op>
bool load_lhs(void* to, const void* from, int64_t K) {
  using V = Vec<float>;
  using Number = typename Op::Number;
  typedef Number Numbers __attribute__((vector_size(lanes * sizeof(Number))));
  const auto source = static_cast<const float*>(from);
  V largest{}, zero{};  // zero stays 0 in every lane that has met finite numbers only
  for (int64_t k = 0; k < K; k += lanes) {
    const V value = load(source + k, K - k), size = value < 0 ? -value : value;
    largest = maximum(size, largest);
    zero = fma(value, V{}, zero);
  }
  float max = 0;
  bool finite = true;
  for (int i = 0; i < lanes; ++i) {
    max = largest[i] > max ? largest[i] : max;
    finite = finite && zero[i] == 0;
  }
  constexpr float kSmallest = 0x1p-100f;  // rows of smaller numbers become zeros
  const float factor = finite && max > kSmallest ? Op::kMaxValue / max : 0;
  const int64_t words = (K + Op::kPerWord - 1) / Op::kPerWord, count = words * Op::kPerWord;
  auto result = static_cast<Number*>(to);
  // Adding kMagic rounds to the nearest integer, which is then in the low bits.
  constexpr float kMagic = 0x1.8p23f;
  Sums sums{};
  const auto quantised = [&](int64_t k) __attribute__((always_inline)) {
    const V value = finite ? load(source + k, K - k) : V{};
    const Sums bits = Sums(fma(value, broadcast<V>(factor), broadcast<V>(kMagic)));
    const Sums integers = bits - Sums(broadcast<V>(kMagic));
    if (k < Op::kChainWords * Op::kPerWord) sums += integers;
    return __builtin_convertvector(integers, Numbers);
  };
  int64_t k = 0;
  for (; k + lanes <= K; k += lanes) {
    const Numbers values = quantised(k);
    __builtin_memcpy(result + k, &values, sizeof(values));
  }
  if (k < count) {
    const Numbers values = quantised(k);
    __builtin_memcpy(result + k, &values, size_t(count - k) * sizeof(Number));
  }
  Trailer trailer{finite ? max / Op::kMaxValue : 0, 0, finite ? nullptr : source};
  for (int i = 0; i < lanes; ++i) trailer.sum += sums[i];
  __builtin_memcpy(result + count, &trailer, sizeof(trailer));
  return true;
}

// Computes a row of a tile as products of floats are, for an lhs row with a NaN or an infinity.
template <class Op, int NR>
__attribute__((noinline)) void multiply_floats(const float* row, int64_t K, const int8_t* panel,
                                               const float* scales, const float* bias, float* out,
                                               bool add) {
  constexpr int word = Op::kPerWord;
  for (int column = 0; column < NR * lanes; ++column) {
    float sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int8_t stored = panel[(k / word * NR * lanes + column) * word + k % word];
      sum += row[k] * float(int8_t(stored ^ Op::kFlippedBits));
    }
    const float rest = add ? out[column] : bias ? bias[column] : 0;
    out[column] = rest + sum * scales[column];
  }
}

// The TileFunction.
template <class Op, int NR, int MR>
void tile(int, int64_t K, const void* const* lhs, const void* packed, const void* bias, void* out,
          int64_t stride, const TileOptions& options) {
  using V = Vec<float>;
  using Shape = TileShape<NR, MR>;
  using Number = typename Op::Number;
  constexpr int kVectors = Shape::kVectors, kUnrolled = RNNFAST_REGISTERS == 16 ? 4 : 1;
  constexpr int kPerWord = Op::kPerWord, kPitch = NR * lanes * kPerWord;
  const int64_t words = (K + kPerWord - 1) / kPerWord;
  const auto weights = static_cast<const int8_t*>(packed);
  const auto scales = reinterpret_cast<const float*>(weights + words * kPitch);
  Prefetcher prefetcher(options, words / kUnrolled, packed);
  const Number* row[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) row[i] = static_cast<const Number*>(lhs[i]);
  for (int first = 0; first < NR; first += kVectors) {
    const int8_t* panel = weights + first * lanes * kPerWord;
    for (int64_t begin = 0; begin == 0 || begin < words; begin += Op::kChainWords) {
      const int64_t end = smaller(words, begin + Op::kChainWords);
      Sums sum[MR][kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const int32_t first_sum = Op::first_sum(row[i], trailer_of(row[i], words), begin, end);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = first_sum - Sums{};
      }
      const auto add_word = [&](int64_t k, const int8_t* from) __attribute__((always_inline)) {
        typename Op::Weights b[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) b[j] = Op::load_weights(from + j * lanes * kPerWord);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
          int32_t word;
          __builtin_memcpy(&word, row[i] + kPerWord * k, sizeof(word));
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            sum[i][j] = Op::multiply_add(sum[i][j], word, b[j]);
            // GCC would compute all products before the sums, which then do not fit the registers.
            keep_in_register(sum[i][j]);
          }
        }
      };
      int64_t k = begin;
      for (; k + kUnrolled <= end; k += kUnrolled, panel += kUnrolled * kPitch) {
        if (Shape::kFetches) prefetcher.fetch();
#pragma GCC unroll 4
        for (int word = 0; word < kUnrolled; ++word) add_word(k + word, panel + word * kPitch);
      }
      for (; k < end; ++k, panel += kPitch) add_word(k, panel);
      const bool add = options.add || begin > 0;
      float* to = static_cast<float*>(out) + first * lanes;
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i, to += stride) {
        const V row_scale = broadcast<V>(trailer_of(row[i], words).scale);
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
    if (const float* row_of_floats = trailer_of(lhs[i], words).not_finite)
      multiply_floats<Op, NR>(row_of_floats, K, weights, scales,
                              static_cast<const float*>(options.add ? nullptr : bias),
                              static_cast<float*>(out) + i * stride, options.add);
}

template <class Op>
constexpr WeightFormat make_format() {
  WeightFormat format{};
  format.name = Op::kPerWord == 2 ? "int8" : "int8 quads";
  format.step = format.word = Op::kPerWord;
  format.row_step_bytes = Op::kPerWord * int(sizeof(typename Op::Number));
  format.row_extra_bytes = sizeof(Trailer);
  format.panel_step_bytes = Op::kPerWord * lanes;
  format.panel_extra_bytes = lanes * int(sizeof(float));
  format.flipped_bits = Op::kFlippedBits;
  format.converts_lhs = true;
  format.row_cycles = 1;
  format.min_rows = 1;
  format.weight_bytes = Op::kPerWord;
  format.chain = Op::kChainWords;
  for_each_tile([&]<int NR, int MR>() {
    format.tile_rows[NR - 1] = kRegisterRows[NR - 1];
    format.tiles[NR - 1][MR - 1] = tile<Op, NR, MR>;
  });
  format.load_lhs = load_lhs<Op>;
  return format;
}
template <class Op>
inline constexpr WeightFormat kFormat = make_format<Op>();

}  // namespace rnnfast::cpu::RNNFAST_TARGET::int8
