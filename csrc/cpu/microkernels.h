// The micro-kernels of one instruction set: functions on a tile or a row, reached through tables of
// function pointers. Drivers (drivers/) are compiled once and call nothing else that is made of
// vectors.
//
// S is the storage type of tensors and A the compute type. E, the element type, is the one in which
// a product reads a state or a gate gradient: A, or bfloat16 itself where products take pairs of
// them. Kernels that take void pointers say in which type.
//
// Unless a function says otherwise: rows need no alignment; nothing is read or written at or beyond
// the end of a row; source and result do not overlap.
#pragma once

#include <cstdint>

#include "cells/common.h"
#include "cpu/cell.h"
#include "cpu/tuning.h"

namespace rnnfast::cpu {

inline constexpr int kMaxTileRows = 32;  // MR of the highest tile
inline constexpr int kMaxTileVectors = 4;  // NR of the widest tile

// Work in small pieces that a product on AMX tiles does between its steps: vectors are idle there.
// Products on vectors leave it alone.
struct Deferred {
  void (*some)(Deferred&, int64_t pieces);  // does up to so many
  int64_t left = 0;  // pieces
};

// What a product does beside its sums.
struct TileOptions {
  // Words of k in one chain of additions; a longer sum is cut into several chains. bf16x3 counts
  // steps of the format, and pairs on AMX tiles have one chain.
  int64_t chain;
  bool add = false;  // to what `out` holds
  const void* prefetch = nullptr;  // memory to fetch into L2 meanwhile, or null
  int64_t prefetch_bytes = 0;
  Deferred* deferred = nullptr;
};

// out[i][j] (= or +=) bias[j] + sum over k of lhs[i][k] panel[k][j], for the rows and vectors of
// columns that the function is made for.
//   K          elements of the sum
//   lhs        rows as the weight format has them (WeightFormat::row_bytes); all of the last word
//              is read, and what lies beyond K in it must be zeros
//   panel      packed columns, WeightFormat::panel_bytes long
//   bias       A, one per column, or null; null where the product is added to `out`
//   out        A, rows `stride` elements apart; whole vectors are written
using TileFunction = void (*)(int rows, int64_t K, const void* const* lhs, const void* panel,
                              const void* bias, void* out, int64_t stride,
                              const TileOptions& options);

// Weights (G*H, K) by panels of units: a panel has all gates of `unit_vectors` vectors of
// consecutive units, as columns in the order [gate][unit].
struct GateShape {
  int64_t H;
  int gates;
  int unit_vectors;  // 4 for one gate, else 1; the last panel may be narrower for one gate
};

// How a product takes weights: the layout of a packed panel, of a row of the lhs, and the functions
// that make and multiply them. A panel sums over k in steps of `step` elements.
struct WeightFormat {
  const char* name;
  int step;  // elements of k in a step; the last one is completed with zeros
  int row_step_bytes;  // of an lhs row, for a step
  int row_extra_bytes;  // at the end of an lhs row
  int panel_step_bytes;  // of a panel, for a step and a vector of columns
  bool converts_lhs;  // lhs rows are made from rows of E by load_lhs; else rows of E are taken
  bool defers;  // products run deferred work
  int tile_rows[kMaxTileVectors];  // MR for 1, 2, ... vectors
  // for planning
  int word;  // elements of k in a word, the size of A
  double row_cycles;  // of a tile, for one row, a vector of columns and a word of k
  int min_rows;  // fewer rows take a tile as long
  int weight_bytes;  // of what stands for a word in packed weights
  double exchange_cycles;  // to fetch a line of the lhs that another thread has written, at least
  int64_t chain, long_chain;  // for products with weights, and for those over many rows

  TileFunction tiles[kMaxTileVectors][kMaxTileRows];  // by vectors - 1 and rows - 1

  // One panel of w, S (G*H, K). False if a weight has no representation in this format.
  bool (*pack_gates)(const GateShape&, const void* w, int64_t K, int64_t panel, void* to);
  // Part of a panel of `vectors` vectors from column `column` of a matrix of S whose rows run along
  // k: rows[0 ... count - 1], null for zeros; columns at and beyond `columns` are zeros. count is a
  // multiple of `step` but for the last part.
  void (*pack_columns)(const void* const* rows, int64_t count, int64_t column, int64_t columns,
                       int vectors, void* to);
  // A row of S as an lhs row. False if a number has no representation.
  bool (*load_lhs)(void* to, const void* from, int64_t K);
  // The same of `count` rows of E read down their columns: lhs row m - begin of `to`, `pitch` bytes
  // apart, has element m of every row, begin <= m < end. Zeros complete a whole vector of words.
  void (*transpose_lhs)(const void* const* rows, int64_t count, int64_t begin, int64_t end,
                        void* to, int64_t pitch);
  // sums[i] = A, the sum of the numbers of lhs row i, `count` rows of `depth` numbers, made by
  // transpose_lhs
  void (*sum_lhs)(const void* lhs, int64_t pitch, int64_t count, int64_t depth, void* sums);

  int64_t steps(int64_t K) const { return (K + step - 1) / step; }
  int64_t row_bytes(int64_t K) const { return steps(K) * row_step_bytes + row_extra_bytes; }
  int64_t panel_bytes(int vectors, int64_t K) const {
    return steps(K) * vectors * panel_step_bytes;
  }
};

// All kernels for one storage type.
struct MicroKernels {
  Dtype dtype;
  int lanes;  // elements of A in a vector
  int storage_bytes, compute_bytes, element_bytes;  // of S, A and E
  int state_align;  // elements of E in a word: rows of states are completed with zeros
  int dot_rows;  // rows that `dots` takes at once
  const WeightFormat* dense;  // one word of k is one element, or a pair of bfloat16
  const WeightFormat* split;  // floats as sums of three bfloat16, or null

  // rows of n elements
  void (*load)(void* to, const void* from, int64_t n);  // A from S, or zeros from null
  void (*store)(void* to, const void* from, int64_t n);  // S from A
  void (*load_state)(void* to, const void* from, int64_t n);  // E from S
  void (*store_state)(void* to, const void* from, int64_t n);  // S from E
  void (*round_state)(void* to, const void* from, int64_t n);  // E from A, rounded to S
  void (*add)(void* to, const void* from, int64_t n, bool add);  // A (= or +=) A
  void (*add_elements)(void* to, const void* const* rows, int64_t count, int64_t begin, int64_t n,
                       bool add);  // A (= or +=) the sum of elements begin, ... of rows of E
  // S from the sum of two rows of A; either may be null
  void (*store_sum)(void* to, const void* a, const void* b, int64_t n);
  // E from grad_y of S and two rows of A, the gradient of a projected h; each may be null
  void (*gather_grad)(void* to, const void* grad_y, const void* a, const void* b, int64_t n);

  // b (G*H) or null, of panels [begin, end), each [gate][unit vector] with zeros beyond H
  void (*pack_bias)(const GateShape&, const void* bias, int64_t begin, int64_t end, void* to);
  // Parts of rows [G][H] that belong to a panel, as a tile's from_x, plus the panel's bias of A:
  // rows of S (tokens); and rows of A, without a bias (a projection by whole rows of W_ih).
  void (*gather_tokens)(const GateShape&, const void* const* rows, int count, const void* bias,
                        int64_t panel, void* to);
  void (*gather_gates)(const GateShape&, const void* const* rows, int count, int64_t panel,
                       void* to);
  // A TileFunction's product with weights of S as they lie, rows of E; up to dot_rows rows; there
  // is a bias
  void (*dots)(const GateShape&, int rows, int64_t K, const void* const* lhs, const void* w,
               int64_t panel, const void* bias, void* out, int64_t stride);
  // to[i][n] (= or +=) the sum over r < count of lhs[r][begin + i] rhs[r][n], i < rows, n <
  // columns; lhs of E, rhs of S, to of A with rows `columns` apart; count <= 4
  void (*outer_few)(const void* const* lhs, const void* const* rhs, int count, int64_t begin,
                    int64_t rows, int64_t columns, void* to, bool add);

  CellFunctions cells[kCells];

  bool converts() const { return storage_bytes != compute_bytes; }
};

// What an instruction set has.
struct Target {
  MicroKernels kernels[kDtypes];
  void (*enter)();  // before and after a thread's products, or null
  void (*leave)();
};

}  // namespace rnnfast::cpu
