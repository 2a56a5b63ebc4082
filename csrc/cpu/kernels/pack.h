// Packing of panels (rhs) and of transposed rows (lhs) for the dense formats: words of one element
// and pairs of bfloat16.
#pragma once

#include "cpu/kernels/product.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

// Maps the vectors of columns of a panel to rows of a weight matrix (G*H, K).
struct GateColumns {
  const GateShape& shape;
  int64_t panel;
  int lanes;

  RNNFAST_INLINE int64_t unit(int j) const {  // the unit in lane 0 of vector j
    return (panel * shape.unit_vectors + j % shape.unit_vectors) * lanes;
  }
  RNNFAST_INLINE int64_t units(int j) const { return shape.H - unit(j); }  // units from there on
  RNNFAST_INLINE int64_t row(int j) const {  // the row of the matrix for lane 0 of vector j
    return j / shape.unit_vectors * shape.H + unit(j);
  }
  RNNFAST_INLINE int vectors() const {
    const int all = shape.gates * shape.unit_vectors;
    const int64_t left = (shape.H - panel * shape.unit_vectors * lanes + lanes - 1) / lanes;
    return shape.gates == 1 && left < all ? int(left) : all;
  }
};

// Packs words [begin, end) of up to a vector of rows of w, K elements long each, as columns:
// panel[word * pitch + lane] = that word of row `lane`.
template <class Op, class S>
RNNFAST_INLINE void pack_transposed(const S* w, int64_t K, int64_t rows, int64_t begin, int64_t end,
                                    typename Op::Compute* panel, int64_t pitch) {
  using A = typename Op::Compute;
  constexpr int lanes = kLanes<A>;
  constexpr int64_t kElements = lanes * Op::kPerWord;
  int64_t k = begin;
  // Whole blocks, without a test for each row.
  for (; rows >= lanes && k + lanes <= end && k * Op::kPerWord + kElements <= K; k += lanes) {
    Vec<A> block[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      block[i] = Op::load_words(w + i * K + k * Op::kPerWord, kElements);
    transpose<A>(block);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) store(panel + (k + i) * pitch, block[i]);
  }
  for (; k < end; k += lanes) {
    const int64_t at = k * Op::kPerWord;
    Vec<A> block[lanes];
    for (int i = 0; i < lanes; ++i)
      block[i] = i < rows ? Op::load_words(w + i * K + at, K - at) : Vec<A>{};
    transpose<A>(block);
    for (int64_t i = 0; i < smaller(lanes, end - k); ++i) store(panel + (k + i) * pitch, block[i]);
  }
}

template <class Op, class S>
bool pack_gates(const GateShape& shape, const void* w, int64_t K, int64_t panel, void* to) {
  constexpr int lanes = kLanes<typename Op::Compute>;
  const GateColumns columns{shape, panel, lanes};
  const int vectors = columns.vectors();
  const int64_t depth = words<Op>(K);
  for (int64_t k = 0; k < depth; k += kPackedWords)
    for (int j = 0; j < vectors; ++j)
      pack_transposed<Op>(static_cast<const S*>(w) + columns.row(j) * K, K, columns.units(j), k,
                          smaller(depth, k + kPackedWords),
                          static_cast<typename Op::Compute*>(to) + j * lanes, vectors * lanes);
  return true;
}

// See WeightFormat::pack_columns. Rows are far apart, which hardware prefetching does not follow.
template <class Op, class S>
void pack_columns(const void* const* rows, int64_t count, int64_t column, int64_t columns,
                  int vectors, void* to) {
  using A = typename Op::Compute;
  constexpr int lanes = kLanes<A>;
  constexpr int64_t kAhead = 8, kLine = kLineBytes / int64_t(sizeof(S));
  const bool whole = vectors * lanes <= columns - column;
  A* panel = static_cast<A*>(to);
  for (int64_t k = 0; k < count; k += Op::kPerWord) {
    const S* from[Op::kPerWord];
    for (int i = 0; i < Op::kPerWord; ++i)
      from[i] =
          k + i < count && rows[k + i] ? static_cast<const S*>(rows[k + i]) + column : nullptr;
    for (int i = 0; i < Op::kPerWord; ++i)
      if (const void* ahead = rows[smaller(k + i + kAhead, count - 1)])
        for (int64_t at = 0; at < vectors * lanes; at += kLine)
          __builtin_prefetch(static_cast<const S*>(ahead) + column + at);
    if (Op::kPerWord == 1 && whole && from[0]) {
      for (int j = 0; j < vectors; ++j, panel += lanes)
        store(panel, Op::load_words(from[0] + j * lanes, lanes));
      continue;
    }
    for (int j = 0; j < vectors; ++j, panel += lanes) {
      store(panel, Op::load_columns(from, columns - column - j * lanes));
      for (const S*& row : from) row = row ? row + lanes : nullptr;
    }
  }
}

template <class Op, class S>
bool load_lhs(void* to, const void* from, int64_t K) {
  using Element = typename Op::Element;
  convert_row<Element, S>(to, from, K);
  for (int64_t k = K; k < words<Op>(K) * Op::kPerWord; ++k)
    static_cast<Element*>(to)[k] = Element{};
  return true;
}

template <class Op>
void transpose_lhs(const void* const* rows, int64_t count, int64_t begin, int64_t end, void* to,
                   int64_t pitch) {
  using A = typename Op::Compute;
  using Element = typename Op::Element;
  constexpr int lanes = kLanes<A>;
  for (int64_t k = 0; k < count; k += lanes * Op::kPerWord) {
    const Element* from[lanes][Op::kPerWord];
    for (int64_t i = 0; i < lanes * Op::kPerWord; ++i)
      from[i / Op::kPerWord][i % Op::kPerWord] =
          k + i < count ? static_cast<const Element*>(rows[k + i]) + begin : nullptr;
    for (int64_t m = begin; m < end; m += lanes) {
      Vec<A> square[lanes];
      for (int i = 0; i < lanes; ++i) {
        square[i] = Op::load_columns(from[i], end - m);
        for (const Element*& row : from[i]) row = row ? row + lanes : nullptr;
      }
      transpose<A>(square);
      const int64_t n = smaller(lanes, end - m);
      for (int64_t i = 0; i < n; ++i)
        __builtin_memcpy(static_cast<char*>(to) + (m - begin + i) * pitch + k * sizeof(Element),
                         &square[i], sizeof(square[i]));
    }
  }
}

// See WeightFormat::sum_lhs. Partial sums of 16 vectors are added up, so that rounding errors grow
// less with the length of the rows.
template <class Op>
void sum_lhs(const void* lhs, int64_t pitch, int64_t count, int64_t depth, void* sums) {
  using A = typename Op::Compute;
  using Element = typename Op::Element;
  constexpr int lanes = kLanes<A>;
  constexpr int64_t kChain = 16 * lanes;
  for (int64_t m = 0; m < count; m += lanes) {
    const int64_t n = smaller(lanes, count - m);
    Vec<A> of_rows[lanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      const auto row =
          reinterpret_cast<const Element*>(static_cast<const char*>(lhs) + (m + i) * pitch);
      for (int64_t k = 0; k < depth; k += kChain) {
        Vec<A> sum{};
        for (int64_t at = k; at < smaller(depth, k + kChain); at += lanes) sum += load(row + at);
        of_rows[i] += sum;
      }
    }
    store(static_cast<A*>(sums) + m, lane_sums<A>(of_rows), n);
  }
}

// ---- biases and rows of gates, which are not multiplied ----

template <class S>
void pack_bias(const GateShape& shape, const void* bias, int64_t begin, int64_t end, void* to) {
  using A = Compute<S>;
  constexpr int lanes = kLanes<A>;
  A* panel = static_cast<A*>(to);
  for (int64_t p = begin; p < end; ++p) {
    const GateColumns columns{shape, p, lanes};
    for (int j = 0; j < shape.gates * shape.unit_vectors; ++j, panel += lanes) {
      const bool there = bias && columns.units(j) > 0;
      store(panel, there ? load(static_cast<const S*>(bias) + columns.row(j), columns.units(j))
                         : Vec<A>{});
    }
  }
}

// Loads weights of int8 as floats.
RNNFAST_INLINE Vec<float> load(const int8_t* p, int64_t n) {
  constexpr int lanes = kLanes<float>;
  typedef int8_t Bytes __attribute__((vector_size(lanes)));
  Bytes bytes{};
  if (n >= lanes)
    __builtin_memcpy(&bytes, p, sizeof(bytes));
  else
    for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  return __builtin_convertvector(__builtin_convertvector(bytes, VectorOf<float>::integer),
                                 Vec<float>);
}

// Gathers a panel's part of rows of W as vectors of A. What is stored is adjust(vector, its place
// in a row, the elements of its gate from there on).
template <class W, class A, class F>
RNNFAST_INLINE void gather(const GateShape& shape, const void* const* rows, int count,
                           int64_t panel, void* to, F&& adjust) {
  constexpr int lanes = kLanes<A>;
  const GateColumns columns{shape, panel, lanes};
  const int vectors = columns.vectors();
  A* out = static_cast<A*>(to);
  for (int i = 0; i < count; ++i, out += shape.gates * shape.unit_vectors * lanes) {
    const W* row = static_cast<const W*>(rows[i]);
    for (int j = 0; j < vectors; ++j) {
      const int64_t place = columns.row(j), left = columns.units(j);
      store(out + j * lanes, adjust(load(row + place, left), place, left));
    }
  }
}
template <class W, class S>
void gather_tokens(const GateShape& shape, const void* const* rows, int count, const float* scales,
                   const void* bias, int64_t panel, void* to) {
  using A = Compute<S>;
  gather<W, A>(shape, rows, count, panel, to,
               [&](Vec<A> value, int64_t place, int64_t left) __attribute__((always_inline)) {
                 if constexpr (std::is_same_v<W, int8_t>) value *= load(scales + place, left);
                 if (bias) value += load(static_cast<const S*>(bias) + place, left);
                 return value;
               });
}
template <class A>
void gather_gates(const GateShape& shape, const void* const* rows, int count, int64_t panel,
                  void* to) {
  gather<A, A>(shape, rows, count, panel, to, [](Vec<A> value, int64_t, int64_t) { return value; });
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
