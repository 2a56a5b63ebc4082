// The making of a table of tokens from the vectors of an embedding, with frozen weights.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace rnnfast::cpu {

struct TabulateArgs {
  const void* w_ih;  // a block of frozen weights (G*H, I) with its bias (frozen.h)
  int64_t H, I, tokens;
  const float* x;  // (tokens, I): the vector of each token
  float* table;  // (tokens, G*H): W_ih x + b_ih
};

struct TabulateJob {
  TabulateArgs args;
  Plan plan;
  void* workspace = nullptr;  // aligned to Arena::kAlignment
  Barriers barriers;

  void use_one_thread() {}  // nothing depends on the number of threads
};

}  // namespace rnnfast::cpu
