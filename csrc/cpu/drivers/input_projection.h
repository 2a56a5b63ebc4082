// The input projection W_ih x + b_ih. It does not depend on the recurrence, so it is computed for a
// block of steps at once.
#pragma once

#include <optional>

#include "cpu/drivers/batch.h"
#include "cpu/drivers/weights.h"

namespace rnnfast::cpu {

class InputProjection {
 public:
  // `block_rows` is the most rows that a thread has in a block, where a row is one sequence at one
  // step.
  InputProjection(const Context& context, const ForwardArgs& args, const Plan& plan,
                  const Batch& batch, int64_t block_rows, Arena& arena);

  // Selects this thread's part of the workspace for all later calls.
  void take_own(int thread);
  void pack(const Team& team);
  // Projects a block of steps, for this thread's rows and panels of units.
  void run(Span steps, Span rows, Span panels);

  struct Projected {
    const void* first;  // A, rows [gate][unit], as a ForwardTile's from_x
    int64_t stride;  // elements between rows
  };
  // The projection of some rows of the block for one panel of units. It is copied to `to`, a
  // TileBuffer, if it is not already in this layout.
  Projected rows(int64_t first, int count, int64_t panel, void* to) const;

  // Whether `rows` gives all steps of a row with one stride, and all panels side by side.
  bool is_by_units() const { return !whole_rows_ && !table_; }
  // Whether a step computes its own projection in less time than it takes to read it: x has few
  // numbers, which are read in place, and all panels are packed.
  bool is_cheap() const {
    return args_.size.I <= kFewInputs && !x_ && is_by_units() && by_units_.has_all_panels();
  }
  GateWeights::Panel first_panel() { return by_units_.panel(0, good_); }
  int64_t panel_bytes() const { return by_units_.panel_bytes(); }
  // A row of x; for a token, its row [G][H] of the table.
  const char* input(int64_t t, int64_t b) const;

  // Whether the weight format could represent all numbers that this thread has met.
  bool good() const { return good_; }

 private:
  const GateWeights& weights() const { return whole_rows_ ? *whole_rows_ : by_units_; }
  int64_t row_stride() const {
    return whole_rows_ ? whole_rows_->width(Span{0, whole_rows_->count()}) : by_units_.width(own_);
  }

  const Context& context_;
  const ForwardArgs& args_;
  const Batch& batch_;
  GateWeights by_units_;
  // W_ih as one matrix of G*H columns, used instead of by_units_ for small H: panels of units leave
  // lanes unused if the units do not fill their last vector. The results must then be regrouped by
  // units, for each panel.
  std::optional<GateWeights> whole_rows_;
  std::optional<TokenTable> table_;  // of an input of tokens, used instead of both
  const int64_t block_rows_, max_width_;
  bool good_ = true;
  Span own_{0, 0};  // panels of units
  char* projected_;  // A, per thread [block_rows][max_width]
  const void** inputs_;  // per thread [block_rows]: rows of x, or of the table of tokens
  Rows x_;  // per thread [block_rows]: x as lhs rows, if x cannot be read in place
};

}  // namespace rnnfast::cpu
