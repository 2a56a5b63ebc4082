// Packed, register-tiled matrix products. Included inside an instruction set's namespace.
//
// A product is cut into tiles of up to kTileRows<NR> rows by NR vectors of columns, accumulated in
// registers. The left side is given as row pointers (so rows may come from anywhere), contiguous
// along the summed index k. The right side is packed into panels: panel[word of k][NR * lanes].
// Every element is summed over k in the same order whatever the tile, so results do not depend on
// how rows and columns are dealt to threads.

// How products read their operands. The sum over k goes word by word; a word has the size of the
// compute type and is one element of that type.
template <class S>
struct Operand {
  using A = Compute<S>;
  using Element = A;  // of left sides
  using Word = A;
  static constexpr int kPerWord = 1;

  RNNFAST_HD static Vec<A> multiply_add(Vec<A> sum, Word left, Vec<A> right) {
    return sum + left * right;
  }
  // up to a vector of words along k, zeros beyond `elements`
  template <class T>
  RNNFAST_HD static Vec<A> load_words(const T* from, int64_t elements) {
    return load(from, elements);
  }
  // one word of k for a vector of columns, from kPerWord rows along k; null for zeros
  template <class T>
  RNNFAST_HD static Vec<A> load_columns(const T* const* rows, int64_t columns) {
    return rows[0] ? load(rows[0], columns) : Vec<A>{};
  }
};

#if defined(RNNFAST_BF16_DOT)
// Here a word is a pair of bfloat16, whose products one instruction adds to a float.
template <>
struct Operand<bf16> {
  using A = float;
  using Element = bf16;
  using Word = int32_t;
  static constexpr int kPerWord = 2;

  RNNFAST_HD static Vec<A> multiply_add(Vec<A> sum, Word left, Vec<A> right) {
    return Vec<A>(
        _mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_epi32(left)), __m512bh(right)));
  }
  RNNFAST_HD static Vec<A> load_words(const bf16* from, int64_t elements) {
    if (elements < kPerWord * kLanes<A>) return load_first<Vec<A>>(from, elements);
    return load(reinterpret_cast<const float*>(from));
  }
  RNNFAST_HD static Vec<A> load_columns(const bf16* const* rows, int64_t columns) {
    const auto bits = [columns](const bf16* row) {
      return __builtin_convertvector(row ? load_bits(row, columns) : HalfBits{}, VecU32);
    };
    return bit_cast<Vec<A>>(bits(rows[0]) | bits(rows[1]) << 16);
  }
};
#endif

template <class Op>
constexpr int64_t words(int64_t elements) {
  return ceil_div(elements, Op::kPerWord);
}
template <class Op>
RNNFAST_HD typename Op::Word load_word(const typename Op::Element* from) {
  typename Op::Word word;
  __builtin_memcpy(&word, from, sizeof(word));
  return word;
}

// Stores values that products read as a left side and that are no more exact than S holds: a state,
// which the next step sees as it is given out. May write whole vectors.
template <class S>
RNNFAST_HD void store_rounded(typename Operand<S>::Element* to, Vec<Compute<S>> v, int64_t n) {
  if constexpr (std::is_same_v<S, typename Operand<S>::Element>) {
    store(to, v, Operand<S>::kPerWord == 1 ? kLanes<Compute<S>> : n);
  } else {
    S rounded[kLanes<Compute<S>>];
    store(rounded, v);
    store(to, load(rounded));
  }
}

// Accumulators, one right-hand vector and one broadcast must fit the register file.
template <int NR>
inline constexpr int kRegisterRows = NR == 4   ? (RNNFAST_REGISTERS == 32 ? 6 : 3)
                                     : NR == 3 ? (RNNFAST_REGISTERS == 32 ? 8 : 4)
                                               : (RNNFAST_REGISTERS == 32 ? 8 : 6);
#if defined(RNNFAST_AMX)
template <class Op>
inline constexpr bool kInMatrixUnit = Op::kPerWord > 1;
inline constexpr int kMaxTileRows = 32;
#else
template <class Op>
inline constexpr bool kInMatrixUnit = false;
inline constexpr int kMaxTileRows = 8;
#endif
template <class Op, int NR>
inline constexpr int kTileRows = kInMatrixUnit<Op> ? 32 : kRegisterRows<NR>;
template <class Op>  // for a vector of columns and a word of k
inline constexpr double kRowCycles = kInMatrixUnit<Op> ? 1. / 16 : 1;

// Whether products may take each number as a sum of several of fewer bits, for the matrix unit, and
// how (cpu/parts.h).
template <class Op>
inline constexpr bool kHasParts = false;
template <class Op>
struct Parts;

// One chain of more words than this would lose more bits than torch's products do; a longer product
// is summed in parts: of kChain terms in products with weights, of kLongChain in those over many
// rows. Torch's own chains are shorter where vectors are.
inline constexpr int64_t kChain = RNNFAST_REGISTERS == 32 ? 256 : 128, kLongChain = 64;

// Memory that a tile fetches into L2 while it is computed: what is needed soon and lies in L3,
// where the hardware's own prefetching comes too late.
struct Ahead {
  const void* from = nullptr;
  int64_t bytes = 0;

  // the part of the next panel, null if there is none, that falls to a tile of some of the rows
  static Ahead part_of(const void* panel, int64_t bytes, int64_t first, int count, int64_t rows) {
    if (!panel) return {};
    return {static_cast<const char*>(panel) + bytes * first / rows, bytes * count / rows};
  }
};
// The same line by line, up to one with each of so many words of k; `harmless` where there is
// nothing to fetch.
class Fetching {
 public:
  Fetching(const Ahead& ahead, int64_t words, const void* harmless)
      : next_(static_cast<const char*>(ahead.from ? ahead.from : harmless)),
        step_(std::min(kLineBytes, ceil_div(ahead.bytes, std::max<int64_t>(words, 1)))) {}
  RNNFAST_HD void fetch() {
    __builtin_prefetch(next_, 0, 2);
    next_ += step_;
  }

 private:
  const char* next_;
  int64_t step_;
};

// Work for vectors in small pieces, which the matrix unit does not wait for: it goes on between the
// steps of a tile.
class Errand {
 public:
  int64_t left() const { return left_; }
  void some(int64_t pieces) {
    for (; pieces > 0 && left_ > 0; --pieces, --left_) do_next();
  }
  void finish() { some(left_); }

 protected:
  ~Errand() = default;
  virtual void do_next() = 0;
  int64_t left_ = 0;  // pieces
};

// What is done while a tile is computed; the errand only in the matrix unit, and perhaps not all.
struct Meanwhile {
  Ahead ahead = {};
  Errand* errand = nullptr;

  // an equal share of the errand's pieces for each of so many times
  int64_t pieces(int64_t times) const {
    return errand ? ceil_div(errand->left(), std::max<int64_t>(times, 1)) : 0;
  }
};

// out[i * row_stride + j * lanes + lane] (=, or += if kAdd) bias[j][lane] + sum_k a[i][k]
// panel[k][j][lane], k counting words
template <class Op, int NR, int MR, bool kAdd, int64_t kPart>
void tile(int64_t K, const typename Op::Element* const* a, const typename Op::A* panel,
          const typename Op::A* bias, typename Op::A* out, int64_t row_stride, const Ahead& ahead) {
  using A = typename Op::A;
  constexpr int lanes = kLanes<A>;
  constexpr bool kFetches = MR > 2;  // lower tiles wait for their own panel anyway
  // GCC would read weights from memory for each row, which is right only where registers are full.
  constexpr bool kKeepsWeights = MR > 1 && MR * NR + NR < RNNFAST_REGISTERS;
  Fetching fetching(ahead, K, panel);
  const typename Op::Element* row[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) row[i] = a[i];
  for (int64_t begin = 0; begin == 0 || begin < K; begin += kPart) {
    const int64_t end = K < begin + kPart ? K : begin + kPart;
    Vec<A> sum[MR][NR] = {};
    for (int64_t k = begin; k < end; ++k, panel += NR * lanes) {
      Vec<A> b[NR];
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) {
        b[j] = load(panel + j * lanes);
        if (kKeepsWeights) keep_in_register(b[j]);
      }
      if (kFetches) fetching.fetch();
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const auto value = load_word<Op>(row[i] + k * Op::kPerWord);
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) sum[i][j] = Op::multiply_add(sum[i][j], value, b[j]);
      }
    }
    const bool add = kAdd || begin > 0, add_bias = bias && begin == 0;
    A* to = out;
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i, to += row_stride) {
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) {
        Vec<A> value = sum[i][j];
        if (add_bias) value += load(bias + j * lanes);
        if (add) value += load(to + j * lanes);
        store(to + j * lanes, value);
      }
    }
  }
}

template <class Op>
using TileFunction = void (*)(int64_t, const typename Op::Element* const*, const typename Op::A*,
                              const typename Op::A*, typename Op::A*, int64_t, const Ahead&);

template <class Op, int NR, bool kAdd, int64_t kPart, int... MR>
constexpr std::array<TileFunction<Op>, sizeof...(MR)> tile_table(
    std::integer_sequence<int, MR...>) {
  return {tile<Op, NR, MR + 1, kAdd, kPart>...};
}
template <class Op, int NR, bool kAdd = false, int64_t kPart = kChain>
inline constexpr auto kTiles =
    tile_table<Op, NR, kAdd, kPart>(std::make_integer_sequence<int, kRegisterRows<NR>>());

// Calls f(first row, number of rows) for tiles of nearly equal height.
template <class F>
RNNFAST_HD void for_row_tiles(int64_t rows, int tile_rows, F&& f) {
  const int64_t tiles = ceil_div(rows, tile_rows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
    f(begin, int(end - begin));
  }
}

#if defined(RNNFAST_AMX)
#include "cpu/amx.h"
#include "cpu/parts.h"
using ProductUnit = matrix_unit::Use;
#else
struct ProductUnit {};
#endif

// A tile of up to kTileRows rows.
template <class Op, int NR, bool kAdd = false, int64_t kPart = kChain>
RNNFAST_HD void multiply_tile(int rows, int64_t K, const typename Op::Element* const* a,
                              const typename Op::A* panel, const typename Op::A* bias,
                              typename Op::A* out, int64_t row_stride, const Meanwhile& meanwhile) {
#if defined(RNNFAST_AMX)
  if constexpr (kInMatrixUnit<Op>)
    return matrix_unit::product<NR, kAdd>(rows, K, a, panel, bias, out, row_stride, meanwhile);
#endif
  kTiles<Op, NR, kAdd, kPart>[rows - 1](K, a, panel, bias, out, row_stride, meanwhile.ahead);
}

// f<n>(), for n from 1 to 4
template <class F>
RNNFAST_HD auto as_constant(int n, F&& f) {
  return n == 4   ? f.template operator()<4>()
         : n == 3 ? f.template operator()<3>()
         : n == 2 ? f.template operator()<2>()
                  : f.template operator()<1>();
}

// How one product takes its operands: words of elements as they are, or each element in parts, for
// which rows of the left side are split first.
template <class Op>
struct Format {
  using A = typename Op::A;
  using Element = typename Op::Element;

  bool in_parts = false;

  bool in_matrix_unit() const { return in_parts || kInMatrixUnit<Op>; }

  // of a tile of so many vectors of columns
  RNNFAST_HD int tile_rows(int vectors) const {
    if constexpr (kHasParts<Op>)
      if (in_parts) return Parts<Op>::kTileRows;
    return as_constant(vectors, []<int NR>() { return kTileRows<Op, NR>; });
  }
  // in memory, of a row of the left side with K elements
  int64_t row_size(int64_t K) const {
    if constexpr (kHasParts<Op>)
      if (in_parts) return Parts<Op>::row_size(K);
    return words<Op>(K) * Op::kPerWord;
  }
  // and of a panel
  int64_t panel_size(int vectors, int64_t K) const {
    if constexpr (kHasParts<Op>)
      if (in_parts) return Parts<Op>::panel_size(vectors, K);
    return vectors * kLanes<A> * words<Op>(K);
  }
  // The recurrent product of one step: `depth` elements of k times panels of so many vectors.
  StepShape step_shape(int64_t rows, int64_t panels, int64_t depth, int vectors,
                       double cell_cycles) const {
    StepShape shape{.rows = rows,
                    .panels = panels,
                    .depth = words<Op>(depth),
                    .vectors = vectors,
                    .tile_rows = tile_rows(vectors),
                    .least_rows = 1,
                    .element_bytes = int(sizeof(A)),
                    .weight_bytes = int(sizeof(A)),
                    .lanes = kLanes<A>,
                    .row_cycles = kRowCycles<Op>,
                    .cell_cycles = cell_cycles,
                    .exchange_cycles = 0};
    if constexpr (kHasParts<Op>)
      if (in_parts) {
        shape.least_rows = Parts<Op>::kLeastRows;
        shape.weight_bytes = Parts<Op>::kWeightBytes;
        shape.row_cycles = Parts<Op>::kRowCycles;
        shape.exchange_cycles = Parts<Op>::kExchangeCycles;
      }
    return shape;
  }
  // A row as the left side has it; false if it has no parts.
  template <class S>
  bool to_left(Element* to, const S* from, int64_t K) const {
    if constexpr (kHasParts<Op>)
      if (in_parts) return Parts<Op>::split_row(from, K, to);
    convert(to, from, K);
    for (int64_t k = K; k < row_size(K); ++k) to[k] = Element{};
    return true;
  }
  // Rows of the left side that have been split must lie at equal distances.
  template <int NR, bool kAdd = false, int64_t kPart = kChain>
  RNNFAST_HD void multiply(int rows, int64_t K, const Element* const* a, const A* panel,
                           const A* bias, A* out, int64_t row_stride,
                           const Meanwhile& meanwhile) const {
    if constexpr (kHasParts<Op>)
      if (in_parts)
        return Parts<Op>::template product<NR, kAdd>(rows, K, a, panel, bias, out, row_stride,
                                                     meanwhile);
    multiply_tile<Op, NR, kAdd, kPart>(rows, words<Op>(K), a, panel, bias, out, row_stride,
                                       meanwhile);
  }
};

// ---- packing ----

// panel[word * pitch + lane] = the words of source(lane), K elements long; a null source row gives
// zeros
template <class Op, class S, class Source>
RNNFAST_HD void pack_transposed(Source&& source, int64_t K, typename Op::A* panel, int64_t pitch) {
  using A = typename Op::A;
  constexpr int lanes = kLanes<A>;
  const S* from[lanes];
  for (int i = 0; i < lanes; ++i) from[i] = source(i);
  for (int64_t k = 0; k < words<Op>(K); k += lanes) {
    const int64_t n = words<Op>(K) - k, at = k * Op::kPerWord;
    Vec<A> block[lanes];
    for (int i = 0; i < lanes; ++i)
      block[i] = from[i] ? Op::load_words(from[i] + at, K - at) : Vec<A>{};
    transpose<A>(block);
    if (n >= lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(panel + (k + i) * pitch, block[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) store(panel + (k + i) * pitch, block[i]);
    }
  }
}

// panel[word][vectors * lanes] = source(k)[column ...] for the k of a word, k < K; columns at and
// beyond `columns` as zeros
template <class Op, class S, class Source>
RNNFAST_HD void pack_rows(Source&& source, int64_t K, int64_t column, int64_t columns, int vectors,
                          typename Op::A* panel) {
  constexpr int lanes = kLanes<typename Op::A>;
  for (int64_t k = 0; k < K; k += Op::kPerWord) {
    const S* from[Op::kPerWord];
    for (int i = 0; i < Op::kPerWord; ++i) from[i] = k + i < K ? source(k + i) + column : nullptr;
    for (int j = 0; j < vectors; ++j, panel += lanes) {
      store(panel, Op::load_columns(from, columns - column - j * lanes));
      for (const S*& row : from) row = row ? row + lanes : nullptr;
    }
  }
}
