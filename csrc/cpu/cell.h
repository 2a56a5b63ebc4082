// A cell as the drivers see it: a few numbers and two functions on a tile. A tile is some rows of
// the batch times the hidden units of one panel of weights. The functions may come from another
// shared object, so everything here is plain data with a fixed layout.
//
// S, A and E are the types of microkernels.h: storage, arithmetic, and the element type of states
// and gate gradients in products.
#pragma once

#include <cstdint>

namespace rnnfast::cpu {

inline constexpr int kMaxGradBlocks = 8;

struct Cell {
  int gates;        // G: blocks of H rows in w_ih and w_hh
  int saved;        // blocks of H columns that a step saves for the backward
  int grad_blocks;  // D >= G: blocks of H columns of gate gradients; the last G are those of w_hh's
                    // gates, in order
  int cells;  // C: states beside h. Together they are c, blocks of H columns
  int parameters;  // N: learnable vectors with one number for each unit
  bool direct;  // whether h depends on h_prev other than through W_hh: both functions read h_prev,
                // and the backward writes d_h_direct
  bool reads_h;  // whether the backward reads h
  // If not 0, the gates W_ih x + b_ih + W_hh h + b_hh of a row are normalised to a mean of 0 and a
  // variance of 1, where eps is added to the variance, then multiplied by weights and added to a
  // bias, both of G*H elements. The cell reads the result as from_x, and zeros as from_h. It has
  // D = G. The drivers save G blocks more, and have 2 G parameters more: weights and bias.
  double norm_eps;
  // Whether there is a product with W_hh. If not, w_hh is (G*H, 0), and the cell reads zeros as
  // from_h. It has D = G.
  bool recurrent;
  int input_gate[kMaxGradBlocks];  // the gate block of w_ih that gradient block j < G belongs to
};

// One row of a tile. Each pointer is to element 0 of a row of H units; the cell's functions add the
// tile's first unit. They neither read nor write beyond H, except in h and c of the forward and in
// d_c, d_h_rest and d_h_direct of the backward: those rows have room for whole vectors at their
// end. Rows do not overlap. States may be updated in place: c may equal c_prev, and d_h_direct may
// equal d_h_rest.
struct ForwardRow {
  const void* h_prev;  // E; read only if the cell is direct
  const void* c_prev;  // A [C][H], null for zeros; read only if the cell has c
  void* h;  // E, rounded to S; null if not wanted
  void* c;  // A [C][H]; null if not wanted
  void* saved;  // S [saved][H]; null if not wanted
  void* c_copy;  // A [C][H], a second copy of c; null if not wanted
};

struct ForwardTile {
  int64_t H;  // units of the layer, and the distance between the blocks of `saved`
  int64_t first_unit;  // of the tile
  int64_t units;  // of the tile, at most those of a panel
  const ForwardRow* rows;
  int count;  // number of rows
  const void* from_x;  // A [row][gate][units of a panel]: W_ih x + b_ih
  int64_t x_stride;  // elements between rows of from_x
  const void* from_h;  // A [row][gate][units of a panel]: W_hh h + b_hh
  int64_t h_stride;  // elements between rows of from_h
  const void* parameters;  // A [N][H]
};

// Consecutive steps of a single sequence. Strides are in elements, from one step to the next. Rows
// of h and c have room for whole vectors.
struct Steps {
  int64_t count;
  int64_t H;
  const void* weights;  // packed panels of W_hh
  int64_t panels, panel_bytes;
  int last_vectors;  // vectors of columns in the last panel
  int64_t chain;  // TileOptions::chain
  const void* bias;  // A [panel][gate][unit]: b_hh
  const void* from_x;  // A [step][panel][gate][unit]: W_ih x + b_ih; null if the steps compute it
  int64_t from_x_stride;
  const void* x;  // S (I); read only if from_x is null, as are the following
  int64_t x_stride, I;
  const void *w_ih, *b_ih;  // as weights and bias
  int64_t w_ih_panel_bytes;
  void* h[2];  // E: the state before even and odd steps; h[0] is the one before the first
  void* lhs;  // room for h as an lhs row, if the weight format converts
  void* c;  // A [C][H], if the cell has c
  void* y;  // S (H)
  int64_t y_stride;
  void* saved;  // S [saved][H]; null if not wanted
  int64_t saved_stride;
  void* c_copy;  // A [C][H]; null if not wanted
  int64_t c_copy_stride;
  const void* parameters;  // A [N][H]
};

// The gradient of h is the sum of grad_y, d_h_rest and, if takes_weights, the tile's from_weights.
struct BackwardRow {
  const void* saved;  // S [saved][H]
  const void *h, *h_prev;  // S; read only if the cell needs them
  const void *c, *c_prev;  // A [C][H], c after and before the step; read only if the cell has c
  const void* grad_c;  // A [C][H], added to d_c; or null
  const void* grad_y;  // S, or null
  const void* d_h_rest;  // A, or null
  bool takes_weights;
  bool cut;  // whether no gradient passes to the states before the step
  void* d_gates;  // E [D + N][H]: gradient blocks before activation, then the parameters' gradients
  void* d_c;  // A [C][H]: the gradient of c on entry, that of c_prev on return
  void* d_h_direct;  // A: the part of the gradient of h_prev that does not pass through W_hh;
                     // written only if the cell is direct
  void* output;  // S: receives the cell's h before a projection; or null
};

struct BackwardTile {
  int64_t H, first_unit, units;
  const BackwardRow* rows;
  int count;
  const void* from_weights;  // A [row][units of the tile]: gate gradients of the next step times
                             // W_hh, or the gradient of a projected h times W_hr; or null
  int64_t weights_stride;  // elements between rows of from_weights
  const void* parameters;  // A [N][H]
};

// The types in which the weights of a frozen layer of float are stored (see frozen.h).
enum class WeightType { kFloat32, kBFloat16, kFloat16, kInt8 };
inline constexpr int kWeightTypes = 4;

using StepsFunction = void (*)(const Steps&);

// A cell for one storage type.
struct CellFunctions {
  Cell cell;
  void (*forward)(const ForwardTile&);
  void (*backward)(const BackwardTile&);
  // Steps of a single sequence, with W_hh packed in the dense format (kFloat32) or in one of the
  // frozen formats. Without calls between product and cell a short step takes half of the time.
  // Null if there is none.
  StepsFunction steps[kWeightTypes];
};

}  // namespace rnnfast::cpu
