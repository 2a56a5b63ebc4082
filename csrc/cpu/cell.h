// A cell as the drivers see it: a few numbers and two functions on a tile. A tile is some rows of
// the batch times the units of one panel of weights. The functions may come from another shared
// object: everything here is plain data with a fixed layout.
//
// The types are those of microkernels.h: S of tensors, A of arithmetic, E of states and gate
// gradients.
#pragma once

#include <cstdint>

namespace rnnfast::cpu {

inline constexpr int kMaxGradBlocks = 8;

struct Cell {
  int gates;        // G: blocks of H rows in w_ih and w_hh
  int saved;        // blocks of H that a step keeps for the backward
  int grad_blocks;  // D >= G: blocks of H of gate gradients; w_hh takes the last G in order
  bool has_c;       // a second state c
  bool direct;  // h_prev reaches h other than through W_hh: both functions read h_prev, and the
                // backward writes d_h_direct
  bool reads_h;  // the backward reads h
  int input_gate[kMaxGradBlocks];  // the block of w_ih to which gradient block j < G belongs
};

// One row of a tile. Pointers are to element 0 of a row of H units; a tile's functions add its
// first unit. Memory at and beyond H is neither read nor written, but for h and c of the forward
// and d_c and d_h of the backward, whose rows have room for whole vectors. No two rows overlap;
// h_prev, c and d_c may be read and written in place.
struct ForwardRow {
  const void* h_prev;  // E; only where the cell is direct
  const void* c_prev;  // A, null for zeros; only where the cell has c
  void* h;  // E, rounded to S; null where not wanted
  void* c;  // A, null where not wanted
  void* saved;  // S [saved][H], null where not wanted
  void* c_copy;  // A, c once more; null where not wanted
};

struct ForwardTile {
  int64_t H;  // units of the layer, and the distance between blocks of `saved`
  int64_t first_unit;  // of the tile
  int64_t units;  // of the tile, up to a panel's
  const ForwardRow* rows;
  int count;  // rows
  const void* from_x;  // A [row][gate][units of a panel]: W_ih x + b_ih
  int64_t x_stride;  // elements between rows of from_x
  const void* from_h;  // A, the same of W_hh h + b_hh
  int64_t h_stride;
};

struct BackwardRow {
  const void* saved;  // S [saved][H]
  const void *h, *h_prev;  // S, where the cell reads them
  const void *c, *c_prev;  // A, where the cell has c: after and before the step
  const void* grad_c;  // A, added to d_c; or null
  const void* grad_y;  // S, part of the gradient of h; or null
  const void* d_h_rest;  // A, another part of it; or null
  bool takes_weights;  // whether from_weights has a third part
  bool cut;  // no gradient passes to the states before the step
  void* d_gates;  // E [D][H]: gradient blocks before activation
  void* d_c;  // A: on entry the gradient of c, on return that of c_prev
  void* d_h_direct;  // A: the part of the gradient of h_prev past W_hh, where direct
  void* output;  // S: h as the cell puts it out, before a projection; or null
};

struct BackwardTile {
  int64_t H, first_unit, units;
  const BackwardRow* rows;
  int count;
  const void* from_weights;  // A [row][units of the tile], or null
  int64_t weights_stride;  // elements between its rows
};

// Of one cell for one storage type.
struct CellFunctions {
  Cell cell;
  void (*forward)(const ForwardTile&);
  void (*backward)(const BackwardTile&);
};

}  // namespace rnnfast::cpu
