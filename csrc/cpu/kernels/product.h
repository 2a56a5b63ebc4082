// The register-tiled product on vectors (a TileFunction, see microkernels.h).
//
// A tile of MR rows by NR vectors of columns, or half of its columns at a time, is accumulated in
// registers. Every element is summed over k in the same order in any tile, so results do not depend
// on how rows and columns are split across threads.
#pragma once

#include "cpu/kernels/convert.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

// How a product reads its operands, word by word. Here a word is one element of the compute type;
// pairs of bfloat16 are in kernels/bf16_pairs.h.
template <class A>
struct DenseOperand {
  using Compute = A;
  using Element = A;  // E, the type of lhs rows
  using Weight = A;  // the type of a lane of a panel
  using Word = A;
  static constexpr int kPerWord = 1;

  RNNFAST_INLINE static Vec<A> multiply_add(Vec<A> sum, Word lhs, Vec<A> rhs) {
    return fma(broadcast<Vec<A>>(lhs), rhs, sum);
  }
  // Loads up to a vector of words along k, with zeros beyond `elements`.
  template <class T>
  RNNFAST_INLINE static Vec<A> load_words(const T* from, int64_t elements) {
    return load(from, elements);
  }
  // Loads one word of k for a vector of columns, from kPerWord rows of which null ones are zeros.
  template <class T>
  RNNFAST_INLINE static Vec<A> load_columns(const T* const* rows, int64_t columns) {
    return rows[0] ? load(rows[0], columns) : Vec<A>{};
  }
};

// Panels of a half type W, which are converted in registers. For frozen weights.
template <class W>
struct NarrowOperand : DenseOperand<float> {
  using Weight = W;
};

template <class Op>
RNNFAST_INLINE int64_t words(int64_t elements) {
  return (elements + Op::kPerWord - 1) / Op::kPerWord;
}
template <class Op>
RNNFAST_INLINE typename Op::Word load_word(const typename Op::Element* from) {
  typename Op::Word word;
  __builtin_memcpy(&word, from, sizeof(word));
  return word;
}

// MR for NR = 1 to 4.
inline constexpr int kRegisterRows[] = {RNNFAST_REGISTERS == 32 ? 8 : 6,
                                        RNNFAST_REGISTERS == 32 ? 8 : 6,
                                        RNNFAST_REGISTERS == 32 ? 8 : 4, 6};

// How a tile of MR rows by NR vectors is computed. Accumulators, one rhs vector and one broadcast
// must fit the register file. If those of all columns do not, the tile goes through the panel
// twice, with half of the columns each time. Six rows by twice two vectors need half the bandwidth
// of L2 that three rows by four vectors need.
template <int NR, int MR>
struct TileShape {
  static constexpr bool kHalves = MR * NR + 2 > RNNFAST_REGISTERS;
  static constexpr int kVectors = kHalves ? NR / 2 : NR;  // at a time
  // Words of k in an iteration of the loop. With one word the loop takes 23 instructions in the six
  // cycles of its multiply-adds, nearly all that a core that issues four a cycle can do.
  static constexpr int kWords = RNNFAST_REGISTERS == 16 && kVectors == 2 && MR > 3 ? 4 : 1;
  // GCC would read weights from memory for each row, which is better only if registers are full.
  static constexpr bool kKeepsWeights = MR > 1 && (MR + 1) * kVectors < RNNFAST_REGISTERS;
  static constexpr bool kFetches = MR > 2;  // else the tile waits for its own panel anyway
  static_assert(!kHalves || (NR % 2 == 0 && MR * kVectors + 2 <= RNNFAST_REGISTERS));
};

// Prefetches the memory that the options name, spread over `calls` calls: at most one line in each.
// If there is nothing to prefetch, it prefetches `harmless`, which avoids a branch.
class Prefetcher {
 public:
  RNNFAST_INLINE Prefetcher(const TileOptions& options, int64_t calls, const void* harmless)
      : next_(static_cast<const char*>(options.prefetch ? options.prefetch : harmless)),
        step_(options.prefetch_pitch > 0 ? options.prefetch_pitch
              : calls > 0 ? smaller(kLineBytes, (options.prefetch_bytes + calls - 1) / calls)
                          : 0) {}
  RNNFAST_INLINE void fetch() {
    __builtin_prefetch(next_, 0, 2);
    next_ += step_;
  }

 private:
  const char* next_;
  int64_t step_;
};

// Adds one word of k to the sums.
template <class Op, class Shape, int MR, int NR>
RNNFAST_INLINE void add_word(Vec<typename Op::Compute> (&sum)[MR][NR],
                             const typename Op::Element* const (&row)[MR], int64_t k,
                             const typename Op::Weight* panel) {
  using A = typename Op::Compute;
  Vec<A> b[NR];
#pragma GCC unroll 4
  for (int j = 0; j < NR; ++j) {
    b[j] = load(panel + j * kLanes<A>);
    if (Shape::kKeepsWeights) keep_in_register(b[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    const auto value = load_word<Op>(row[i] + k * Op::kPerWord);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) sum[i][j] = Op::multiply_add(sum[i][j], value, b[j]);
  }
}

// The TileFunction. The panel is [word of k][vector][lane] of Op::Weight; or, in place, some
// columns of a matrix of A, whose rows are options.pitch elements apart.
template <class Op, int NR, int MR, bool kInPlace = false>
void tile(int, int64_t K, const void* const* lhs, const void* packed, const void* bias, void* out,
          int64_t stride, const TileOptions& options) {
  using A = typename Op::Compute;
  using Shape = TileShape<NR, MR>;
  constexpr int lanes = kLanes<A>, kVectors = Shape::kVectors, kWords = Shape::kWords;
  const int64_t pitch = kInPlace ? options.pitch : NR * lanes;
  const int64_t depth = words<Op>(K);
  Prefetcher prefetcher(options, depth, packed);
  const typename Op::Element* row[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) row[i] = static_cast<const typename Op::Element*>(lhs[i]);
  for (int first = 0; first < NR; first += kVectors) {
    const auto* panel = static_cast<const typename Op::Weight*>(packed) + first * lanes;
    for (int64_t begin = 0; begin == 0 || begin < depth; begin += options.chain) {
      const int64_t end = smaller(depth, begin + options.chain);
      Vec<A> sum[MR][kVectors] = {};
      int64_t k = begin;
      if constexpr (kWords > 1) {
        for (; k + kWords <= end; k += kWords, panel += kWords * pitch) {
#pragma GCC unroll 4
          for (int i = 0; i < kWords * kVectors / NR; ++i) prefetcher.fetch();
#pragma GCC unroll 4
          for (int word = 0; word < kWords; ++word)
            add_word<Op, Shape>(sum, row, k + word, panel + word * pitch);
        }
      }
      for (; k < end; ++k, panel += pitch) {
        if (Shape::kFetches && kWords == 1) prefetcher.fetch();
        add_word<Op, Shape>(sum, row, k, panel);
      }
      const bool add = options.add || begin > 0;
      const A* add_bias =
          begin == 0 && bias ? static_cast<const A*>(bias) + first * lanes : nullptr;
      A* to = static_cast<A*>(out) + first * lanes;
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i, to += stride) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          Vec<A> value = sum[i][j];
          if (add_bias) value += load(add_bias + j * lanes);
          if (add) value += load(to + j * lanes);
          store(to + j * lanes, value);
        }
      }
    }
  }
}

// Calls f<NR, MR>() for every size of a tile.
template <class F>
constexpr void for_each_tile(F&& f) {
  [&]<int... J>(std::integer_sequence<int, J...>) {
    const auto of_width = [&]<int NR>() {
      [&]<int... I>(std::integer_sequence<int, I...>) {
        (f.template operator()<NR, I + 1>(), ...);
      }(std::make_integer_sequence<int, kRegisterRows[NR - 1]>());
    };
    (of_width.template operator()<J + 1>(), ...);
  }(std::make_integer_sequence<int, kMaxTileVectors>());
}

// kInPlace: whether products can read weights in place, because S is A.
template <class Op, bool kInPlace>
constexpr void fill_tiles(WeightFormat& format) {
  for_each_tile([&]<int NR, int MR>() {
    format.tile_rows[NR - 1] = kRegisterRows[NR - 1];
    format.tiles[NR - 1][MR - 1] = tile<Op, NR, MR>;
    if constexpr (kInPlace && NR == kMaxTileVectors)
      format.in_place[MR - 1] = tile<Op, NR, MR, true>;
  });
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
