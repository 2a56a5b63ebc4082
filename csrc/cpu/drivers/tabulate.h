// The table of tokens of an embedding, for frozen weights: W_ih x + b_ih for the vector x of each
// token. Threads split the tokens.
#pragma once

#include "cpu/drivers/weights.h"
#include "cpu/tabulation.h"

namespace rnnfast::cpu {

class Tabulate {
 public:
  Tabulate(const Context& context, const TabulateArgs& args, const Plan& plan, Arena& arena);

  void run(const Team& team) const;

 private:
  const Context& context_;
  const TabulateArgs& args_;
  GateWeights weights_;
  Rows lhs_;  // per thread [kTokensAtOnce]: x as lhs rows, if the format converts
};

}  // namespace rnnfast::cpu
