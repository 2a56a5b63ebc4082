// What every driver needs: the micro-kernels of a call, rows in memory whose element type only the
// micro-kernels know, and the loop over tiles.
#pragma once

#include <algorithm>
#include <cstring>

#include "arguments.h"
#include "cpu/microkernels.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/user_cells.h"

namespace rnnfast::cpu {

// The micro-kernels and the cell of one call.
struct Context {
  const MicroKernels& kernels;
  const CellKind kind;
  const CellFunctions& functions = cell_functions(kernels, kind);
  const Cell& cell = functions.cell;

  // The bytes of n elements of S, A and E.
  int64_t storage(int64_t n) const { return n * kernels.storage_bytes; }
  int64_t compute(int64_t n) const { return n * kernels.compute_bytes; }
  int64_t element(int64_t n) const { return n * kernels.element_bytes; }
  int64_t whole_vectors(int64_t n) const { return ceil_div(n, kernels.lanes) * kernels.lanes; }

  int64_t c_size(int64_t H) const { return cell.cells * H; }  // elements of c
  // The elements of a row of c that has room for whole vectors at the end of its last block.
  int64_t padded_c_size(int64_t H) const { return whole_vectors(c_size(H) - H + whole_vectors(H)); }
  // Columns of W_hh, where h has h_size elements.
  int64_t hidden_columns(int64_t h_size) const { return cell.recurrent ? h_size : 0; }
  bool normalizes() const { return cell.norm_eps != 0; }
  // Blocks of H columns that a step saves. If gates are normalised, the last ones are the gates
  // before that.
  int saved_blocks() const { return cell.saved + (normalizes() ? cell.gates : 0); }
  // All parameters: the cell's, then weights and bias of the normalisation.
  int parameters() const { return cell.parameters + (normalizes() ? 2 * cell.gates : 0); }
  // Blocks of H gradients of a step: of gates, then of parameters.
  int gradient_blocks() const { return cell.grad_blocks + parameters(); }

  const WeightFormat& format(bool split_precision) const {
    return split_precision ? *kernels.split : *kernels.dense;
  }
  // The format of a matrix of the forward.
  const WeightFormat& format(const Plan& plan, Packing packing, bool split_precision) const {
    return packing == Packing::kFrozen ? *kernels.frozen[int(plan.frozen)]
                                       : format(split_precision);
  }
  // The elements from one row of states to the next: whole vectors plus one, since rows at
  // multiples of 4 KiB would compete for the same sets of L1.
  int64_t state_pitch(int64_t n) const {
    return (whole_vectors(n) + kernels.lanes) * kernels.state_align;
  }
};

// The address `bytes` after `base`.
inline const char* at(const void* base, int64_t bytes) {
  return static_cast<const char*>(base) + bytes;
}
inline char* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }

// Rows in memory, `pitch` bytes apart.
struct Rows {
  char* data = nullptr;
  int64_t pitch = 0;

  char* operator[](int64_t row) const { return data + row * pitch; }
  explicit operator bool() const { return data; }
};

// What a cell reads where nothing comes from h, for any number of rows: the rows of a tile are 0
// elements apart.
alignas(64) inline constexpr char kZeroGates[kMaxTileVectors * 64] = {};

// Room on a thread's stack for the results of a tile of any size.
struct TileBuffer {
  static constexpr int64_t kBytes = int64_t(kMaxTileRows) * kMaxTileVectors * 64;
  alignas(64) char data[kBytes];
};

// The number of tiles that cover `rows` rows. The usual case of one tile avoids the division.
inline int64_t count_tiles(int64_t rows, int tile_rows) {
  return rows <= tile_rows ? (rows > 0) : ceil_div(rows, tile_rows);
}

// Room for the results of a product that reads weights in place, and pointers to its lhs rows.
struct InPlaceBuffer {
  alignas(64) char data[kInPlaceRows * kMaxTileVectors * 64];
  const void* lhs[kInPlaceRows];
};

// The parameters of a cell in the compute type.
class CellParameters {
 public:
  CellParameters(const Context& context, const void* from, int64_t H, Arena& arena)
      : context_(context), from_(from), count_(context.parameters() * H) {
    if (context.kernels.converts()) copy_ = arena.take<char>(context.compute(count_));
  }
  void load() {
    if (copy_ && count_ > 0) context_.kernels.load(copy_, from_, count_);
  }
  const void* data() const { return copy_ ? copy_ : from_; }

 private:
  const Context& context_;
  const void* from_;
  const int64_t count_;
  char* copy_ = nullptr;
};

// Calls f(first row, number of rows) for tiles of nearly equal height.
template <class F>
inline void for_row_tiles(int64_t rows, int tile_rows, F&& f) {
  const int64_t tiles = count_tiles(rows, tile_rows);
  for (int64_t i = 1, begin = 0; i <= tiles; ++i) {
    const int64_t end = i == tiles ? rows : rows * i / tiles;
    f(begin, int(end - begin));
    begin = end;
  }
}

// Makes a tile prefetch its part of `bytes` at `from` (null: nothing), in proportion to its `count`
// of the `rows` rows. This is for memory in L3 that is needed soon; the hardware's own prefetching
// comes too late for it.
inline void prefetch_part(TileOptions& options, const void* from, int64_t bytes, int64_t first,
                          int count, int64_t rows) {
  options.prefetch = from;
  options.prefetch_bytes = from ? bytes : 0;
  if (!from || count == rows) return;
  options.prefetch = at(from, bytes * first / rows);
  options.prefetch_bytes = bytes * count / rows;
}

}  // namespace rnnfast::cpu
