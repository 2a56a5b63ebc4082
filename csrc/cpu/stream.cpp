#include "cpu/stream.h"

#include <algorithm>
#include <new>

#include "cpu/frozen.h"
#include "cpu/tuning.h"

namespace rnnfast::cpu {
namespace {

FrozenHeader header_of(const void* block) {
  FrozenHeader header;
  std::copy_n(static_cast<const char*>(block), sizeof(header), reinterpret_cast<char*>(&header));
  return header;
}

// Of what plans depend on, a single thread needs the size of its cache alone.
Machine one_thread() {
  constexpr int64_t kL2Bytes = int64_t(1) << 20;
  return {1, kL2Bytes, kTypicalL3Line, BarrierCycles::typical()};
}

}  // namespace

Stream::Stream(const Engine& engine, CellKind cell, std::span<const Layer> layers, int64_t batch)
    : engine_(engine),
      batch_(batch),
      kind_{cell, Dtype::kFloat32, header_of(layers[0].w_hh).type},
      jobs_(layers.size()) {
  size_t workspace = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const FrozenHeader input = header_of(layers[i].w_ih), hidden = header_of(layers[i].w_hh);
    ForwardJob& job = jobs_[i];
    job.args = {};
    job.args.size = {kSteps, batch, input.K, hidden.H};
    job.args.h_size = hidden.K;
    job.args.x_stride_t = batch * input.K, job.args.x_stride_b = input.K;
    move(i, layers[i]);
    job.plan = engine.plan_forward(kind_, job.args.size, one_thread(), kSteps);
    workspace = std::max(workspace, engine.forward_workspace(kind_, job.args, job.plan));
  }
  const int64_t between = layers.size() > 1 ? kSteps * batch * outputs() : 0;
  const auto take_all = [&](Arena& arena) {
    for (float*& one : between_) one = arena.take<float>(between);
    return arena.take<char>(int64_t(workspace));
  };
  Arena counter(nullptr);
  take_all(counter);
  memory_.reset(::operator new(counter.used(), std::align_val_t(Arena::kAlignment)));
  Arena arena(memory_.get());
  for (void* shared = take_all(arena); ForwardJob& job : jobs_) job.workspace = shared;
}

void Stream::move(size_t layer, const Layer& blocks) {
  ForwardArgs& args = jobs_[layer].args;
  args.w_ih = blocks.w_ih, args.w_hh = blocks.w_hh, args.w_hr = blocks.w_hr;
}

void Stream::run(int64_t T, const float* x, float* y, float* h, float* c) {
  for (int64_t done = 0; done < T; done += kSteps) {
    const int64_t steps = std::min(T - done, kSteps);
    const float* input = x + done * batch_ * inputs();
    for (size_t i = 0; i < jobs_.size(); ++i) {
      ForwardArgs& args = jobs_[i].args;
      const bool last = i + 1 == jobs_.size();
      args.size.T = steps;
      args.x = input;
      args.y = last ? y + done * batch_ * outputs() : between_[i % 2];
      float* own_h = h + int64_t(i) * batch_ * args.h_size;
      float* own_c = c ? c + int64_t(i) * batch_ * args.size.H : nullptr;
      args.h0 = args.h_n = own_h;
      args.c0 = args.c_n = own_c;
      engine_.forward(kind_, std::span(&jobs_[i], 1));
      input = static_cast<const float*>(args.y);
    }
  }
}

}  // namespace rnnfast::cpu
