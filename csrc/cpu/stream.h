// A stack of frozen layers that runs some steps at a time, in the calling thread. The caller keeps
// the states. After construction nothing is allocated and nothing is locked.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "cpu/layer.h"

namespace rnnfast::cpu {

class Stream {
 public:
  // The blocks of a layer (see frozen.h); w_hr is null without a projection.
  struct Layer {
    const void *w_ih, *w_hh, *w_hr;
  };

  // The blocks must be readable by the engine's kernels, and fit each other: this is not checked.
  Stream(const Engine& engine, CellKind cell, std::span<const Layer> layers, int64_t batch);

  int64_t batch() const { return batch_; }
  int64_t inputs() const { return jobs_.front().args.size.I; }
  int64_t outputs() const { return jobs_.back().args.h_size; }
  int64_t layers() const { return int64_t(jobs_.size()); }
  int64_t hidden() const { return jobs_.front().args.size.H; }

  // Sets where the blocks are, if they have moved.
  void move(size_t layer, const Layer& blocks);
  // Runs T steps: x (T, B, I) -> y (T, B, P), contiguous. h (L, B, P) and c (L, B, H) are the
  // states before and after; c is null for cells without one.
  void run(int64_t T, const float* x, float* y, float* h, float* c);

 private:
  // Steps that all layers do before the next ones: few enough to stay in cache, and enough that
  // what a call costs does not matter.
  static constexpr int64_t kSteps = 64;
  struct Freed {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };

  const Engine& engine_;
  const int64_t batch_;
  LayerKind kind_;
  std::vector<ForwardJob> jobs_;  // one for each layer
  std::unique_ptr<void, Freed> memory_;
  float* between_[2];  // (kSteps, B, P): the outputs of a layer, which are the inputs of the next
};

}  // namespace rnnfast::cpu
