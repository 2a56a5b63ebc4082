// Samples a token from scores. Compiled once, for the baseline instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace rnnfast::cpu {

// p = softmax(scores / temperature); temperature 0 takes the highest score. top_k keeps the k most
// likely tokens, with all ties of the last one (0 keeps all tokens). Of those, top_p keeps the
// fewest tokens whose share of p reaches top_p, taken by falling probability and, in ties, by
// rising index. (Fan, Lewis, Dauphin, 2018; Holtzman et al., 2020.)
struct Sampling {
  double temperature;
  int64_t top_k;
  double top_p;
};

class Sampler {
 public:
  // The first token at which the cumulative probability, over tokens by index, exceeds `uniform`, a
  // number in [0, 1). -1 if the highest score is not finite or any score is NaN. A is the type of
  // the scores.
  template <class A>
  int64_t operator()(const Sampling& sampling, const A* scores, int64_t count, double uniform);

 private:
  void keep_top_p(double top_p);

  std::vector<double> weights_;
  std::vector<double> sorted_;
  std::vector<int64_t> order_;
};

}  // namespace rnnfast::cpu
