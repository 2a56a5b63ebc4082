// Generation of tokens by a stack of layers with a linear head: each step samples a token from the
// scores and feeds it to the next step.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/sampling.h"

namespace rnnfast::cpu {

// S is the storage type, G the gate blocks of the cell, V the number of tokens.
struct GenerateArgs {
  // If the plan says that they are frozen, weights are blocks with the biases within (frozen.h).
  struct Layer {
    const void* w_ih;  // S (G*H, H); for the first layer a table (V, G*H): W_ih x of each token
    const void* w_hh;  // S (G*H, H)
    const void *b_ih, *b_hh;  // S (G*H) or null
  };
  int64_t layers, B, H, V;
  const Layer* layer;
  const void *head_weight, *head_bias;  // S (V, H), (V) or null
  const void *h0, *c0;  // S (layers, B, H); c0 only if the cell has a state c
  Sampling sampling;
};

struct GenerateSteps {
  int64_t done, count;  // steps taken by earlier calls, and steps to take now
  const double* uniforms;  // (count, B): random numbers in [0, 1)
  int64_t* tokens;  // (1 + count, B); row 0 is the input, the others are written
};

// One continuation of a text, which may take several calls. The states stay in the workspace
// between the calls.
struct GenerateJob {
  GenerateArgs args;
  Plan plan;
  void* workspace = nullptr;  // aligned to Arena::kAlignment
  std::vector<Sampler> samplers;  // one per thread
  GenerateSteps steps{};
  Barriers barriers;

  void use_one_thread() {}  // nothing depends on the number of threads
};

}  // namespace rnnfast::cpu
