// Text, or any sequence of tokens, that a stack of layers and a linear head write themselves.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/sampling.h"

namespace rnnfast::cpu {

// S is the storage type, G the gate blocks of the cell, V the number of tokens.
struct GenerateArgs {
  struct Layer {
    const void* w_ih;  // S (G*H, H); of the first layer a table (V, G*H): W_ih x of each token
    const void* w_hh;  // S (G*H, H)
    const void *b_ih, *b_hh;  // S (G*H) or null
  };
  int64_t layers, B, H, V;
  const Layer* layer;
  const void *head_weight, *head_bias;  // S (V, H), (V) or null
  const void *h0, *c0;  // S (layers, B, H); c0 only where the cell has it
  Sampling sampling;
};

struct GenerateSteps {
  int64_t done, count;  // the steps taken before, and those to take
  const double* uniforms;  // (count, B), from [0, 1)
  int64_t* tokens;  // (1 + count, B); the first row is read
};

// A run in one or more calls, between which its states stay in the workspace.
struct GenerateJob {
  GenerateArgs args;
  Plan plan;
  void* workspace = nullptr;  // aligned to Arena::kAlignment
  std::vector<Sampler> samplers;  // of each thread
  GenerateSteps steps{};
  Barriers barriers;

  void give_to_one_thread() {}  // nothing is laid out for a number of threads
};

}  // namespace rnnfast::cpu
