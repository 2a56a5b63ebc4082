// The micro-kernels of one instruction set: functions on a tile or a row, reached through tables of
// function pointers. The drivers (drivers/) are compiled once and use vector instructions only
// through these tables.
//
// Types: S is the storage type of tensors and A the compute type. E, the element type, is the type
// in which a product reads a state or a gate gradient: A, or bfloat16 where products take pairs of
// bfloat16. Comments give the type behind each void pointer.
//
// A word is what one lane of a vector multiplies at once: one element of A, or a pair of bfloat16.
// A panel is a block of columns of the rhs, packed so that a tile reads it contiguously.
//
// Unless a function says otherwise: rows need no alignment; nothing is read or written at or beyond
// the end of a row; source and result do not overlap; strides are in elements, pitches in bytes.
#pragma once

#include <cstdint>

#include "cells/common.h"
#include "cpu/cell.h"
#include "cpu/tuning.h"

namespace rnnfast::cpu {

inline constexpr int kMaxTileRows = 32;  // MR of the highest tile
inline constexpr int kMaxTileVectors = 4;  // NR of the widest tile, in vectors

// Work in small pieces that a product on AMX tiles does between its steps, while the vector units
// are idle. Products on vectors ignore it.
struct Deferred {
  void (*some)(Deferred&, int64_t pieces);  // does at most this many pieces and lowers `left`
  int64_t left = 0;  // pieces still to do
};

struct TileOptions {
  // Words of k in one chain of additions; a longer sum is cut into several chains. bf16x3 counts
  // steps of the format instead, and pairs on AMX tiles ignore it.
  int64_t chain;
  bool add = false;  // whether to add to `out`
  const void* prefetch = nullptr;  // memory to prefetch into L2 meanwhile, or null
  int64_t prefetch_bytes = 0;
  int64_t prefetch_pitch = 0;  // if not 0: prefetches a line in each row of a matrix, whose rows
                               // are so many bytes apart
  int64_t pitch = 0;  // for WeightFormat::in_place: elements between rows of the matrix
  Deferred* deferred = nullptr;
};

// The register-tiled product: out[i][j] (= or +=) bias[j] + sum over k of lhs[i][k] panel[k][j].
// Each function is made for one number of rows and of vectors of columns.
//   K          elements of the sum
//   lhs        one pointer per row; a row is in the weight format's layout, row_bytes(K) long, and
//              zeros fill its last word beyond K
//   panel      packed columns, panel_bytes(vectors, K) long
//   bias       A, one per column, or null; must be null if options.add
//   out        A, rows `stride` elements apart; whole vectors are written
using TileFunction = void (*)(int rows, int64_t K, const void* const* lhs, const void* panel,
                              const void* bias, void* out, int64_t stride,
                              const TileOptions& options);

// Weights (G*H, K) are cut into panels of hidden units: a panel has all gates of `unit_vectors`
// vectors of consecutive units, as columns in the order [gate][unit].
struct GateShape {
  int64_t H;
  int gates;
  int unit_vectors;  // 4 if there is one gate, else 1; with one gate the last panel may be narrower
};

// How a product takes weights: the layouts of a packed panel and of a row of the lhs, and the
// functions that pack and multiply them. Products advance over k in steps of `step` elements.
struct WeightFormat {
  const char* name;
  int step;  // elements of k in a step; zeros fill the last step
  int row_step_bytes;  // bytes of a step in an lhs row
  int row_extra_bytes;  // padding at the end of an lhs row
  int panel_step_bytes;  // bytes of a step in a panel, per vector of columns
  int panel_extra_bytes;  // bytes after the last step of a panel, per vector of columns
  uint8_t flipped_bits;  // of a frozen weight of int8 in a panel: 0, or 0x80 where 128 is added
  bool converts_lhs;  // whether lhs rows must be made by load_lhs; else rows of E are lhs rows
  bool defers;  // whether products run deferred work
  int tile_rows[kMaxTileVectors];  // MR for 1, 2, ... vectors of columns
  // For planning.
  int word;  // elements of k in a word
  double row_cycles;  // cycles of a tile per row, vector of columns and word of k
  int min_rows;  // a tile with fewer rows takes as long as one with this many
  int weight_bytes;  // bytes of a word of k in packed weights, per column
  double exchange_cycles;  // minimum cycles to fetch a line of the lhs that another thread wrote
  int64_t chain, long_chain;  // TileOptions::chain for products with weights, and over many rows

  TileFunction tiles[kMaxTileVectors][kMaxTileRows];  // indexed by vectors - 1 and rows - 1
  // The same for kMaxTileVectors vectors of columns of a matrix of S that is not packed; `panel`
  // points to their first element. Indexed by rows - 1. Null if products cannot read S.
  TileFunction in_place[kMaxTileRows];

  // Packs one panel of w, S (G*H, K). Returns false if a weight cannot be represented in the
  // format.
  bool (*pack_gates)(const GateShape&, const void* w, int64_t K, int64_t panel, void* to);
  // Packs `count` consecutive rows along k, each a row of S of a matrix (K, columns) or null for
  // zeros, into a panel of `vectors` vectors of columns from `column` on. Columns at and beyond
  // `columns` are packed as zeros. To pack a panel in parts, make count a multiple of `step` in all
  // parts but the last.
  void (*pack_columns)(const void* const* rows, int64_t count, int64_t column, int64_t columns,
                       int vectors, void* to);
  // Makes an lhs row from a row of S. Returns false if a number cannot be represented.
  bool (*load_lhs)(void* to, const void* from, int64_t K);
  // Makes lhs rows from the columns [begin, end) of `count` rows of E: the lhs row for column m is
  // at to + (m - begin) * pitch and has element m of every row. Each lhs row is filled with zeros
  // to a whole vector of words.
  void (*transpose_lhs)(const void* const* rows, int64_t count, int64_t begin, int64_t end,
                        void* to, int64_t pitch);
  // sums[i] (A) = the sum of the `depth` elements of lhs row i, for `count` lhs rows made by
  // transpose_lhs.
  void (*sum_lhs)(const void* lhs, int64_t pitch, int64_t count, int64_t depth, void* sums);

  int64_t steps(int64_t K) const { return (K + step - 1) / step; }
  int64_t row_bytes(int64_t K) const { return steps(K) * row_step_bytes + row_extra_bytes; }
  int64_t panel_bytes(int vectors, int64_t K) const {
    return vectors * (steps(K) * panel_step_bytes + panel_extra_bytes);
  }
};

// Copies the part of rows [G][H] of a table of tokens that belongs to a panel into the layout of a
// tile's from_x, A [row][gate][unit], with the bias added.
//   scales     float (G*H), the factors of elements of int8; null for all other types
//   bias       S (G*H), or null for zeros
using GatherFunction = void (*)(const GateShape&, const void* const* rows, int count,
                                const float* scales, const void* bias, int64_t panel, void* to);

// All kernels for one storage type.
struct MicroKernels {
  const char* target;  // the namespace that these were compiled in
  Dtype dtype;
  int lanes;  // elements of A in a vector
  int storage_bytes, compute_bytes, element_bytes;  // sizes of S, A and E
  int state_align;  // elements of E in a word; zeros fill the last word of a row of states
  int dot_rows;  // the most rows that `dots` takes
  const WeightFormat* dense;  // a word of k is one element, or a pair of bfloat16
  const WeightFormat* split;  // floats as sums of three bfloat16; null if there is none
  // The formats of frozen weights, by WeightType; null if S is not float. cpu/frozen.h packs their
  // panels. Of functions they have `tiles` and `load_lhs` alone.
  const WeightFormat* frozen[kWeightTypes];

  // Functions on rows of n elements.
  void (*load)(void* to, const void* from, int64_t n);  // A from S; zeros if `from` is null
  void (*store)(void* to, const void* from, int64_t n);  // S from A
  void (*load_state)(void* to, const void* from, int64_t n);  // E from S
  void (*store_state)(void* to, const void* from, int64_t n);  // S from E
  void (*round_state)(void* to, const void* from, int64_t n);  // E from A, rounded to S
  void (*add)(void* to, const void* from, int64_t n, bool add);  // A (= or +=) A
  // A (= or +=) the sum over `count` rows of E of their elements [begin, begin + n).
  void (*add_elements)(void* to, const void* const* rows, int64_t count, int64_t begin, int64_t n,
                       bool add);
  // S from the sum of two rows of A; either may be null.
  void (*store_sum)(void* to, const void* a, const void* b, int64_t n);
  // E from the sum of grad_y (S) and two rows of A; each may be null. For the gradient of a
  // projected h.
  void (*gather_grad)(void* to, const void* grad_y, const void* a, const void* b, int64_t n);

  // Packs a bias, S (G*H) or null for zeros, for panels [begin, end): A [gate][unit] per panel,
  // with zeros beyond H.
  void (*pack_bias)(const GateShape&, const void* bias, int64_t begin, int64_t end, void* to);
  GatherFunction gather_tokens;  // of rows of S
  // Of rows of frozen weights, by WeightType; null if S is not float.
  GatherFunction gather_frozen_tokens[kWeightTypes];
  // The same as gather_tokens for rows of A, without a bias.
  void (*gather_gates)(const GateShape&, const void* const* rows, int count, int64_t panel,
                       void* to);
  // The product of a TileFunction with unpacked weights w, S (G*H, K), for up to dot_rows rows of
  // E. The bias is required.
  void (*dots)(const GateShape&, int rows, int64_t K, const void* const* lhs, const void* w,
               int64_t panel, const void* bias, void* out, int64_t stride);
  // A sum of count <= 4 outer products: to[i][n] (= or +=) the sum over r < count of
  // lhs[r][begin + i] rhs[r][n], for i < rows and n < columns. lhs is E, rhs is S, `to` is
  // A (rows, columns).
  void (*outer_few)(const void* const* lhs, const void* const* rhs, int count, int64_t begin,
                    int64_t rows, int64_t columns, void* to, bool add);

  // Normalises the gates of a row in place, A [panel][gate][unit]; weight and bias are laid out
  // alike. `saved`, S [gate][H], receives the gates before, or is null.
  void (*normalize_gates)(const GateShape&, void* row, const void* weight, const void* bias,
                          double eps, void* saved);
  // Turns the gradients of n normalised gates, E, into those of the gates before, in place. `saved`
  // (S) are the gates before. d_weight and d_bias (E) receive the row's gradients of weight and
  // bias.
  void (*normalize_gates_backward)(int64_t n, void* d_gates, const void* saved, const void* weight,
                                   double eps, void* d_weight, void* d_bias);

  CellFunctions cells[kCellKinds];  // the built-in ones; for all see user_cells.h

  bool converts() const { return storage_bytes != compute_bytes; }
};

// The kernels for frozen weights of int8, where an instruction set replaces those of a lesser one.
struct Int8Kernels {
  WeightFormat format;
  StepsFunction steps[kCellKinds];
};

// All micro-kernels of one instruction set.
struct Target {
  MicroKernels kernels[kDtypes];
  void (*enter)();  // called by each thread before its products, or null
  void (*leave)();  // called by each thread after its products, or null
};

}  // namespace rnnfast::cpu
