// Generation: a stack of layers and a linear head, whose sampled tokens are the next inputs.
// Threads split the panels of each layer's units and of the scores, with a barrier after each layer
// and after the scores.
#pragma once

#include <vector>

#include "cpu/drivers/weights.h"
#include "cpu/generation.h"

namespace rnnfast::cpu {

class Generate {
 public:
  Generate(const Context& context, const GenerateArgs& args, const Plan& plan, Arena& arena);

  // Packs the weights and loads the states.
  void start(const Team& team);
  // Takes the steps. Ends early if a token cannot be sampled, and stores -1 for it.
  void run(const GenerateSteps& steps, Sampler* samplers, const Team& team);

 private:
  char* h(int64_t layer, int64_t parity, int64_t b) const {
    return h_[parity][layer * args_.B + b];
  }
  void load_lhs(int64_t layer, int64_t parity, const Team& team);
  void advance(int64_t layer, int64_t parity, const int64_t* tokens, const Team& team);
  void score(int64_t parity, Span panels);

  const Context& context_;
  const GenerateArgs& args_;
  struct Layer {
    GateWeights input, hidden;
  };
  TokenTable table_;  // W_ih of the first layer
  std::vector<Layer> layers_;
  GateWeights head_;
  Rows h_[2];  // E [layer][B], the state before even and odd steps
  Rows lhs_;  // per thread [layer][B]: the latest h as lhs rows, if the layers' format converts
  Rows c_;  // A [layer][B]
  Rows scores_;  // A [B]
};

}  // namespace rnnfast::cpu
