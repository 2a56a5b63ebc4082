// Recomputes the gates of a block of steps for the backward, if the forward did not save them. All
// steps are independent, since y and cells hold all states.
#pragma once

#include <optional>

#include "cpu/drivers/formats.h"
#include "cpu/drivers/history.h"

namespace rnnfast::cpu {

class Recompute {
 public:
  static bool wanted(const Context& context, const BackwardArgs& args) {
    return context.saved_blocks() > 0 && !args.gates;
  }

  Recompute(const Context& context, const BackwardArgs& args, const Plan& plan,
            const History& history, const CellParameters& parameters, Arena& arena);

  void pack(const Team& team);
  // Recomputes this thread's share of the rows of a block.
  void run(const BlockRow* rows, int64_t count, const Team& team) const;
  // The saved blocks of a step and a sequence, S [saved][H].
  char* gates(int64_t step, int64_t b) const {
    return gates_[step % block_steps_ * args_.size.B + b];
  }

 private:
  const Context& context_;
  const BackwardArgs& args_;
  const History& history_;
  const CellParameters& parameters_;
  const ForwardFormats formats_;
  GateWeights input_, hidden_;  // W_ih and W_hh, packed if the forward packs them
  TokenTable table_;  // W_ih of an input of tokens
  const int64_t block_steps_;
  Rows gates_;            // S [step of a block][B]
  bool* good_ = nullptr;  // per thread: whether the formats can represent the weights it packed
  Rows x_, h_;  // lhs rows [row of a block], for x and h that cannot be read in place
};

}  // namespace rnnfast::cpu
