// The backward of one layer in one direction.
//
// Steps are walked in the reverse of the forward's order, in blocks. Per step: the gradient of h
// comes from the step after it through W_hh, and on each tile of that product the cell turns it
// into gate gradients. Per block: the gradients of x, of the weights and of the biases as products
// over all rows of the block.
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
  // else each thread packs a panel of W_hh just before its only use
  bool packs_at_once() const { return plan_.hidden == Packing::kOnce; }

  void list_rows(Span steps, int64_t half);
  const void* gates(int64_t step, int64_t b) const;
  char* w_hh_panel(int64_t panel) const;
  void pack_w_hh(int64_t panel) const;
  void pack(const Team& team);
  void load_state(Span rows);
  void set_rows(int64_t step, Span now, int64_t both);
  void step_back(int64_t step, const Team& team);
  void through_weights(int64_t step, int64_t panel, int64_t b, int rows, char* out,
                       const TileOptions& options) const;
  void through_projection(int64_t step, Span rows);
  void apply_cell(int64_t step, int64_t panel, const BackwardRow* rows, int64_t b, int count,
                  const void* from_weights) const;
  void finish(int64_t step, Span rows) const;

  const Context& context_;
  const BackwardArgs& args_;
  const Plan& plan_;
  History history_;
  Recompute recompute_;
  BlockProducts products_;
  const Columns hidden_, units_;
  const int64_t block_rows_;
  const int64_t gate_depth_;  // of the sums with W_hh, for a gate: H, or whole steps of the format
  const int64_t depth_;  // the same of all gates
  Span rows_{0, 0}, panels_{0, 0}, unit_panels_{0, 0};  // this thread's part of the batch, of the
                                                        // panels of h and of those of the units
  int64_t slots_;
  Rows lhs_[2];  // [B], gate gradients of even and odd steps as the format has them, where it
                 // converts
  char* w_hh_;  // packed columns [panel][G*H], or this thread's one panel
  Rows d_c_, d_h_;  // A [B]: gradient of c; grad_h_n, then what bypasses W_hh
  StepRows d_gates_;  // E; rows a vector longer than they need be, see BlockProducts
  BackwardRow* tile_rows_;  // [B], of a step
  BlockRow* block_;  // two blocks [row of a block]
  int64_t* block_counts_;
  // only where h is projected
  char* w_hr_ = nullptr;  // packed columns [panel][P]
  StepRows d_h_rows_;  // E
  StepRows unprojected_;  // S, what the cells put out
};

}  // namespace rnnfast::cpu
