// The forward of one layer in one direction.
#pragma once

#include "cpu/drivers/input_projection.h"

namespace rnnfast::cpu {

class Forward {
 public:
  Forward(const Context& context, const ForwardArgs& args, const Plan& plan, Arena& arena);

  // The recurrent product of a step, for planning.
  static StepShape step_shape(const Context& context, const Sizes& size, bool split_precision);

  // Waits for the steps of `upstream`, if any, before it reads them; `done` tells of its own. False
  // if a number has no representation in the weight format: the outputs are wrong then.
  bool run(const Team& team, const Progress* upstream, Progress& done);

 private:
  class CellWork;
  // Rows of y after a step that this thread has to write.
  struct Outputs {
    int64_t step;
    Span rows;
  };

  void take_own(const Team& team);
  void pack(const Team& team);
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
  void project_state(int64_t step, Span rows, Span panels);

  int64_t time(int64_t step) const { return args_.reverse ? args_.size.T - 1 - step : step; }
  char* h_after(int64_t step, int64_t b) const { return h_[(step + 1) & 1][b]; }
  char* c(int64_t b) const { return c_[b - rows_.begin]; }

  const Context& context_;
  const ForwardArgs& args_;
  const Plan& plan_;
  const Batch batch_;
  GateWeights hidden_;              // W_hh
  std::optional<GateWeights> projection_;  // W_hr
  const int64_t max_rows_;  // of the batch, for a thread
  InputProjection input_;
  bool good_ = true;
  Span rows_{0, 0}, panels_{0, 0};  // this thread's part of the batch and of the panels of units
  Rows h_[2];             // E [B], the state before even and odd steps
  Rows unprojected_;      // E [B], where h is projected
  Rows c_;                // A, per thread [max_rows]
  Rows lhs_;  // per thread [max_rows], h as the weight format has it, where it converts
  ForwardRow* tile_rows_;  // per thread [max_rows], of a step
  char* zeros_ = nullptr;  // E, a row where states are reset
};

}  // namespace rnnfast::cpu
