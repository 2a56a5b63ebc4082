// What the gates get from the input, W_ih x + b_ih. It does not wait for the recurrence, so a block
// of steps is computed at once.
#pragma once

#include <optional>

#include "cpu/drivers/batch.h"
#include "cpu/drivers/weights.h"

namespace rnnfast::cpu {

class InputProjection {
 public:
  // A thread has up to `block_rows` rows in a block of steps, one for each step and sequence.
  InputProjection(const Context& context, const ForwardArgs& args, const Plan& plan,
                  const Batch& batch, int64_t block_rows, Arena& arena);

  // From here on memory is this thread's.
  void take_own(int thread);
  void pack(const Team& team);
  // For the rows of a block of steps, one step after the other, and this thread's panels of units.
  void run(Span steps, Span rows, Span panels);

  struct Projected {
    const void* first;  // A [gate][unit], as a ForwardTile's from_x
    int64_t stride;  // elements
  };
  // Of some rows of the block and one panel of units; where they do not lie so already, in `to`.
  Projected rows(int64_t first, int count, int64_t panel, void* to) const;

  // Whether all numbers that this thread has seen have a representation in the weight format.
  bool good() const { return good_; }

 private:
  const GateWeights& weights() const { return whole_rows_ ? *whole_rows_ : by_units_; }
  int64_t row_stride() const {
    return whole_rows_ ? whole_rows_->width(Span{0, whole_rows_->count()}) : by_units_.width(own_);
  }
  const char* input(int64_t t, int64_t b) const;

  const Context& context_;
  const ForwardArgs& args_;
  const Batch& batch_;
  GateWeights by_units_;
  // Panels of whole units leave lanes unused where the units do not fill their last vector. Rows of
  // W_ih one after the other, [gate][unit], do not, but have to be taken apart for each panel.
  std::optional<GateWeights> whole_rows_;
  const int64_t block_rows_, max_width_;
  bool good_ = true;
  Span own_{0, 0};  // panels of units
  char* projected_;  // A, per thread [block_rows][max_width]
  const void** inputs_;  // per thread [block_rows]: rows of x, or of the table of tokens
  Rows x_;  // per thread [block_rows]: a copy of x as an lhs, where needed
};

}  // namespace rnnfast::cpu
