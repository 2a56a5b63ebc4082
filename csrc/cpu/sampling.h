// The choice of a token by its scores. Compiled for the baseline, once for all instruction sets.
#pragma once

#include <cstdint>
#include <vector>

namespace rnnfast::cpu {

// p is softmax(scores / temperature); temperature 0 takes the highest score. Of the tokens only the
// top_k likeliest stay (all that are as likely as the last of them, 0 for all tokens), and of these
// the fewest whose part of p is top_p, the likelier and then the lower ones first (Fan, Lewis,
// Dauphin, 2018; Holtzman et al., 2020).
struct Sampling {
  double temperature;
  int64_t top_k;
  double top_p;
};

class Sampler {
 public:
  // The first token whose part of p, with that of the lower ones, is above `uniform`, from [0, 1);
  // -1 if the highest score is not finite, or one is NaN.
  template <class A>
  int64_t operator()(const Sampling& sampling, const A* scores, int64_t count, double uniform);

 private:
  void keep_top_p(double top_p);

  std::vector<double> weights_;
  std::vector<double> sorted_;
  std::vector<int64_t> order_;
};

}  // namespace rnnfast::cpu
