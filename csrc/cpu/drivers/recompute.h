// The gates of a block of steps computed again, where the forward did not save them. No step of
// this waits for another, as y and cells hold all states.
#pragma once

#include <optional>

#include "cpu/drivers/formats.h"
#include "cpu/drivers/history.h"

namespace rnnfast::cpu {

class Recompute {
 public:
  static bool wanted(const Context& context, const BackwardArgs& args) {
    return context.cell.saved > 0 && !args.gates;
  }

  Recompute(const Context& context, const BackwardArgs& args, const Plan& plan,
            const History& history, Arena& arena);

  void pack(const Team& team);
  // For this thread's share of so many rows of a block.
  void run(const BlockRow* rows, int64_t count, const Team& team) const;
  // the saved blocks of a step and a sequence, S [saved][H]
  char* gates(int64_t step, int64_t b) const {
    return gates_[step % block_steps_ * args_.size.B + b];
  }

 private:
  const Context& context_;
  const BackwardArgs& args_;
  const History& history_;
  const ForwardFormats formats_;
  GateWeights input_, hidden_;  // packed as in the forward, or as they lie
  const int64_t block_steps_;
  Rows gates_;            // S [step of a block][B]
  bool* good_ = nullptr;  // of each thread: whether its weights have representations in the formats
  Rows x_, h_;  // copies as lhs rows [row of a block], where needed
};

}  // namespace rnnfast::cpu
