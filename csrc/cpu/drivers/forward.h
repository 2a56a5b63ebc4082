// The forward of one layer in one direction: the loop over time, with the cell as the epilogue of
// the recurrent product.
#pragma once

#include "cpu/drivers/input_projection.h"

namespace rnnfast::cpu {

class Forward {
 public:
  Forward(const Context& context, const ForwardArgs& args, const Plan& plan, Arena& arena);

  // The recurrent product of a step, for planning.
  static StepShape step_shape(const Context& context, const Sizes& size,
                              const WeightFormat& format);

  // Runs the sequence. Waits for the steps of `upstream`, if any, before it reads them, and reports
  // its own finished steps in `done`. Returns false if a number cannot be represented in a weight
  // format; the outputs are wrong then.
  bool run(const Team& team, const Progress* upstream, Progress& done);

 private:
  class CellWork;
  // The rows of y at a step that this thread has yet to write.
  struct Outputs {
    int64_t step;
    Span rows;
  };

  void take_own(const Team& team);
  void pack(const Team& team);
  void load_parameters();
  void load_h(Span rows);
  void store_h(Span rows) const;
  template <class F>
  void for_c(F&& f) const;
  void load_c();
  void store_c() const;
  void write(const Outputs& outputs) const;
  void clear(int64_t step, Span rows) const;
  void set_rows(int64_t step, Span rows);
  void advance(int64_t step, Span rows, int64_t first_row, Outputs before);
  void advance_normalized(int64_t step, Span rows, int64_t first_row, Outputs before);
  void project_state(int64_t step, Span rows, Span panels);
  StepsFunction steps_of_one_row() const;
  void run_steps(StepsFunction run, Span steps, bool projects);

  int64_t time(int64_t step) const { return args_.reverse ? args_.size.T - 1 - step : step; }
  char* h_after(int64_t step, int64_t b) const { return h_[(step + 1) & 1][b]; }
  char* c(int64_t b) const { return c_[b - rows_.begin]; }

  const Context& context_;
  const ForwardArgs& args_;
  const Plan& plan_;
  const Batch batch_;
  GateWeights hidden_;              // W_hh
  std::optional<GateWeights> projection_;  // W_hr
  const int64_t max_rows_;  // most rows of the batch that a thread has
  InputProjection input_;
  CellParameters parameters_;
  bool good_ = true;
  Span rows_{0, 0}, panels_{0, 0};  // this thread's part of the batch and of the panels of units
  Rows h_[2];             // E [B], the state before even and odd steps
  Rows unprojected_;      // E [B], h before the projection, if there is one
  Rows c_;                // A, per thread [max_rows]
  Rows lhs_;  // per thread [max_rows], h as lhs rows, if a format converts
  // Only if gates are normalised.
  Rows sums_;  // A [panel][gate][unit], per thread [max_rows]
  char *norm_weight_ = nullptr, *norm_bias_ = nullptr;  // A [panel][gate][unit]
  ForwardRow* tile_rows_;  // per thread [max_rows], for the current step
  char* zeros_ = nullptr;  // E, the state after a reset: one row
};

}  // namespace rnnfast::cpu
