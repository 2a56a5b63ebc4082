// The backward of one layer in one direction.
//
// Steps run in reverse order of the forward, in blocks. In each step the gate gradients of the next
// step are multiplied by W_hh, which gives the gradient of h; the cell's backward, as the epilogue
// of each tile, turns it into gate gradients. After each block follow the gradients of x, of the
// weights and of the biases, as products over all rows of the block.
#pragma once

#include "cpu/drivers/block_products.h"
#include "cpu/drivers/recompute.h"

namespace rnnfast::cpu {

class Backward {
 public:
  Backward(const Context& context, const BackwardArgs& args, const Plan& plan, Arena& arena);

  // The recurrent product of a step, for planning.
  static StepShape step_shape(const Context& context, const Sizes& size, bool split_precision);

  void run(const Team& team);

 private:
  class CellWork;

  bool projects() const { return args_.w_hr; }
  bool recomputes() const { return Recompute::wanted(context_, args_); }
  // If false, each thread packs a panel of W_hh just before its only use, or reads it in place.
  bool packs_at_once() const { return plan_.hidden == Packing::kOnce; }

  void list_rows(Span steps, int64_t half);
  const void* gates(int64_t step, int64_t b) const;
  char* w_hh_panel(int64_t panel) const;
  void pack_w_hh(int64_t panel) const;
  void pack(const Team& team);
  void load_state(Span rows);
  void set_rows(int64_t step, Span now, int64_t both);
  void step_back(int64_t step, const Team& team);
  const void* weights_lhs(int64_t step, int64_t b) const;
  void through_weights(int64_t step, int64_t panel, int64_t b, int rows, char* out,
                       const TileOptions& options) const;
  void through_projection(int64_t step, Span rows);
  void apply_cell(int64_t step, int64_t panel, const BackwardRow* rows, int64_t b, int count,
                  const void* from_weights) const;
  void convert(int64_t step, const BackwardRow* rows, int64_t b, int count, int64_t first,
               int64_t units) const;
  void pass_norm(int64_t step, Span rows) const;
  void finish(int64_t step, Span rows) const;

  const Context& context_;
  const BackwardArgs& args_;
  const Plan& plan_;
  History history_;
  CellParameters parameters_;
  Recompute recompute_;
  BlockProducts products_;
  const Columns hidden_, units_;
  const int64_t block_rows_;
  const int64_t gate_depth_;  // K of one gate in products with W_hh: H, or H rounded up to whole
                              // steps of the format
  const int64_t depth_;  // K of all gates
  Span rows_{0, 0}, panels_{0, 0}, unit_panels_{0, 0};  // this thread's part of the batch, of the
                                                        // panels of h and of those of the units
  int64_t slots_;  // number of steps whose rows are kept (see StepRows)
  Rows lhs_[2];  // [B]: gate gradients of even and odd steps as lhs rows, if the format converts
  char* w_hh_;  // packed columns [panel][G*H], or this thread's only panel
  Rows d_c_, d_h_;  // A [B]: gradient of c; grad_h_n, then the gradient of h that bypasses W_hh
  StepRows d_gates_;  // E; rows have an extra vector, as in BlockProducts::take_transposed
  BackwardRow* tile_rows_;  // [B], for the current step
  BlockRow* block_;  // two lists, used alternately: the rows of a block
  int64_t* block_counts_;  // number of rows in each list
  // Only if h is projected.
  char* w_hr_ = nullptr;  // packed columns [panel][P]
  StepRows d_h_rows_;  // E: gradient of the projected h
  StepRows unprojected_;  // S: h as the cells computed it, before the projection
};

}  // namespace rnnfast::cpu
