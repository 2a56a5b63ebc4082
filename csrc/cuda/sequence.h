// The driver of one layer in one direction on CUDA. The forward computes the input projection of a
// block of steps, then in each step one product with W_hh, for all gates, and one elementwise
// kernel with the cell. The backward mirrors this and ends each block with the gradients of weights
// and input, as products over the block.
//
// The template argument Device supplies the operations (on the GPU: torch/cuda/gpu.cpp; on the
// host, for tests: tests/native/cuda_emulation.cpp):
//   void gemm(const Product&, const In* a, const In* b, Out* c)    row-major, see Product
//   void for_each(int64_t n, const F& f)                           f(0) ... f(n - 1), in any order
//   void copy(void* to, const void* from, size_t bytes)
// They run asynchronously, in the order of the calls. x, y and grad_y must be contiguous. The
// driver allocates nothing and never waits for the device.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "cuda/steps.h"

namespace rnnfast::cuda {

// c (M, N) = op(a) (M, K) op(b) (K, N) + beta c. Matrices are row-major with leading dimensions
// lda, ldb, ldc. op is the transpose if transpose_a or transpose_b is set: a is then stored as (K,
// M), b as (N, K).
struct Product {
  int64_t M, N, K;
  bool transpose_a, transpose_b;
  int64_t lda, ldb, ldc;
  bool add;  // beta = 1 instead of 0
  bool allow_tf32;  // use TF32 if torch's setting allows it too
};

// The number of steps in a block: enough for products over about 4096 rows.
inline int64_t block_steps(const Sizes& size) {
  constexpr int64_t kRows = 4096;
  return std::clamp<int64_t>(ceil_div(kRows, std::max<int64_t>(size.B, 1)), 1,
                             std::max<int64_t>(size.T, 1));
}

template <class Cell, class S>
class Forward {
  using A = Compute<S>;
  static constexpr int G = Cell::kGates;

 public:
  Forward(const ForwardArgs& args, Arena& arena) : args_(args), steps_(block_steps(args.size)) {
    const auto [T, B, I, H] = args.size;
    from_x_ = arena.take<A>(steps_ * B * G * H);
    from_h_ = arena.take<A>(B * G * H);
    c_ = arena.take<A>(kHasC<Cell> ? B * H : 0);
  }

  template <class Device>
  void run(Device& device) const {
    const auto [T, B, I, H] = args_.size;
    const int64_t state = B * H;
    if (kHasC<Cell>) device.for_each(state, Convert<A, S>{c_, static_cast<const S*>(args_.c0)});
    for (int64_t begin = 0; begin < T; begin += steps_) {
      const int64_t count = std::min(steps_, T - begin);
      // A block is a contiguous range of times. With `reverse` its first step has the last time.
      const int64_t first_time = args_.reverse ? T - begin - count : begin;
      device.gemm(Product{count * B, G * H, I, false, true, I, I, G * H, false, true},
                  static_cast<const S*>(args_.x) + first_time * B * I,
                  static_cast<const S*>(args_.w_ih), from_x_);
      for (int64_t step = begin; step < begin + count; ++step)
        advance(device, step, from_x_ + (time(step) - first_time) * B * G * H);
    }
    device.copy(args_.h_n, y(time(T - 1)), size_t(state) * sizeof(S));
    if (kHasC<Cell>) device.for_each(state, Convert<S, A>{static_cast<S*>(args_.c_n), c_});
  }

 private:
  int64_t time(int64_t step) const { return args_.reverse ? args_.size.T - 1 - step : step; }
  S* y(int64_t t) const { return static_cast<S*>(args_.y) + t * args_.size.B * args_.size.H; }

  template <class Device>
  void advance(Device& device, int64_t step, const A* from_x) const {
    const auto [T, B, I, H] = args_.size;
    const int64_t t = time(step), state = B * H;
    const S* h_prev = step == 0 ? static_cast<const S*>(args_.h0) : y(time(step - 1));
    device.gemm(Product{B, G * H, H, false, true, H, H, G * H, false, true}, h_prev,
                static_cast<const S*>(args_.w_hh), from_h_);
    S* gates = static_cast<S*>(args_.gates);
    A* cells = static_cast<A*>(args_.cells);
    device.for_each(state, ForwardStep<Cell, S>{
                               .H = H,
                               .from_x = from_x,
                               .from_h = from_h_,
                               .b_ih = static_cast<const S*>(args_.b_ih),
                               .b_hh = static_cast<const S*>(args_.b_hh),
                               .h_prev = h_prev,
                               .c = c_,
                               .y = y(t),
                               .gates = gates ? gates + t * state * Cell::kSaved : nullptr,
                               .cells = cells ? cells + t * state : nullptr,
                           });
  }

  const ForwardArgs& args_;
  const int64_t steps_;
  A* from_x_;  // (steps, B, G*H)
  A* from_h_;  // (B, G*H)
  A* c_;  // (B, H)
};

template <class Cell, class S>
class Backward {
  using A = Compute<S>;
  static constexpr int G = Cell::kGates, D = Cell::kGradBlocks;
  // Whether the gradient blocks of w_ih's gates are in another order than the gates.
  static constexpr bool kReordered = Cell::input_gate(0) != 0;

 public:
  Backward(const BackwardArgs& args, Arena& arena) : args_(args), steps_(block_steps(args.size)) {
    const auto [T, B, I, H] = args.size;
    d_gates_ = arena.take<S>(steps_ * B * D * H);
    w_ih_ = arena.take<S>(kReordered ? G * H * I : 0);
    through_weights_ = arena.take<A>(B * H);
    d_h_ = arena.take<A>(B * H);
    d_c_ = arena.take<A>(kHasC<Cell> ? B * H : 0);
    c0_ = arena.take<A>(kHasC<Cell> ? B * H : 0);
    ones_ = arena.take<S>(steps_ * B);
    bias_ = arena.take<A>(D * H);
  }

  template <class Device>
  void run(Device& device) const {
    const auto [T, B, I, H] = args_.size;
    const int64_t state = B * H;
    const auto in = [](const void* p) { return static_cast<const S*>(p); };
    device.for_each(state, Convert<A, S>{d_h_, in(args_.grad_h_n)});
    if (kHasC<Cell>) {
      device.for_each(state, Convert<A, S>{d_c_, in(args_.grad_c_n)});
      device.for_each(state, Convert<A, S>{c0_, in(args_.c0)});
    }
    if (args_.grad_x && kReordered) reorder_input_weights(device);
    if (args_.grad_b_ih || args_.grad_b_hh) device.for_each(steps_ * B, Fill<S>{ones_, A(1)});
    // Steps are counted in the order of the backward: step 0 is the last step of the forward.
    for (int64_t begin = 0; begin < T; begin += steps_) {
      const int64_t count = std::min(steps_, T - begin);
      for (int64_t step = begin; step < begin + count; ++step)
        step_back(device, step, begin, count);
      whole_block(device, begin, count);
    }
    store_biases(device);
    if (args_.grad_h0)
      device.for_each(state, GradState<S>{static_cast<S*>(args_.grad_h0), through_weights_,
                                          Cell::kDirect ? d_h_ : nullptr});
    if (args_.grad_c0) device.for_each(state, Convert<S, A>{static_cast<S*>(args_.grad_c0), d_c_});
  }

 private:
  int64_t time(int64_t step) const { return args_.reverse ? step : args_.size.T - 1 - step; }
  // The first time of a block. Its rows are in the order of time, whatever the direction.
  int64_t first_time(int64_t begin, int64_t count) const {
    return args_.reverse ? begin : args_.size.T - begin - count;
  }
  const S* y(int64_t t) const {
    return static_cast<const S*>(args_.y) + t * args_.size.B * args_.size.H;
  }
  bool is_first_in_time(int64_t step) const { return step == args_.size.T - 1; }
  const S* h_before(int64_t step) const {
    return is_first_in_time(step) ? static_cast<const S*>(args_.h0) : y(time(step + 1));
  }

  // Copies the gate blocks of w_ih in the order of the gradient blocks.
  template <class Device>
  void reorder_input_weights(Device& device) const {
    const int64_t block = args_.size.H * args_.size.I;
    for (int j = 0; j < G; ++j)
      device.copy(w_ih_ + j * block,
                  static_cast<const S*>(args_.w_ih) + Cell::input_gate(j) * block,
                  size_t(block) * sizeof(S));
  }

  template <class Device>
  void step_back(Device& device, int64_t step, int64_t begin, int64_t count) const {
    const auto [T, B, I, H] = args_.size;
    const int64_t t = time(step), state = B * H;
    const A* cells = static_cast<const A*>(args_.cells);
    const A* grad_cells = static_cast<const A*>(args_.grad_cells);
    S* d_gates = d_gates_ + (t - first_time(begin, count)) * B * D * H;
    BackwardStep<Cell, S> work{
        .H = H,
        .gates = static_cast<const S*>(args_.gates) + t * state * Cell::kSaved,
        .h = y(t),
        .h_prev = h_before(step),
        .c = nullptr,
        .c_prev = nullptr,
        .grad_y = args_.grad_y ? static_cast<const S*>(args_.grad_y) + t * state : nullptr,
        .grad_c = grad_cells ? grad_cells + t * state : nullptr,
        .through_weights = step > 0 ? through_weights_ : nullptr,
        .d_h = d_h_,
        .d_c = d_c_,
        .d_gates = d_gates,
        .add_d_h = step == 0 || Cell::kDirect,
    };
    if (kHasC<Cell>) {
      work.c = cells + t * state;
      work.c_prev = is_first_in_time(step) ? c0_ : cells + time(step + 1) * state;
    }
    device.for_each(state, work);
    if (is_first_in_time(step) && !args_.grad_h0) return;
    device.gemm(Product{B, H, G * H, false, false, D * H, H, H, false, true}, d_gates + (D - G) * H,
                static_cast<const S*>(args_.w_hh), through_weights_);
  }

  template <class Device>
  void whole_block(Device& device, int64_t begin, int64_t count) const {
    const auto [T, B, I, H] = args_.size;
    const int64_t rows = count * B, t = first_time(begin, count);
    const bool add = begin > 0;
    const S* x = static_cast<const S*>(args_.x) + t * B * I;
    if (args_.grad_x)
      device.gemm(Product{rows, I, G * H, false, false, D * H, I, I, false, true}, d_gates_,
                  kReordered ? w_ih_ : static_cast<const S*>(args_.w_ih),
                  static_cast<S*>(args_.grad_x) + t * B * I);
    if (args_.grad_w_ih) {
      const int64_t parts = kReordered ? G : 1, height = G / parts * H;
      for (int64_t j = 0; j < parts; ++j)
        device.gemm(Product{height, I, rows, true, false, D * H, I, I, add, true},
                    d_gates_ + j * height, x,
                    static_cast<A*>(args_.grad_w_ih) + Cell::input_gate(int(j)) * height * I);
    }
    if (args_.grad_w_hh) grad_recurrent_weights(device, begin, count);
    if (args_.grad_b_ih || args_.grad_b_hh) sum_biases(device, rows, add);
  }

  // Multiplies the gate gradients of each step by the state before it: y of the step before, or h0
  // for the first step of the sequence.
  template <class Device>
  void grad_recurrent_weights(Device& device, int64_t begin, int64_t count) const {
    const auto [T, B, I, H] = args_.size;
    A* grad = static_cast<A*>(args_.grad_w_hh);
    const bool has_first = begin + count == T;
    const int64_t inner = has_first ? count - 1 : count;
    const int64_t t = first_time(begin, count);
    const S* d_gates = d_gates_ + (D - G) * H;
    // Skips the forward's first step, whose previous state is h0 and not in y. Its rows are the
    // first of the block or, with `reverse`, the last.
    const int64_t skip = has_first && !args_.reverse ? 1 : 0;
    const Product product{G * H, H, inner * B, true, false, D * H, H, H, begin > 0, true};
    if (inner > 0)
      device.gemm(product, d_gates + skip * B * D * H, y(t + skip + (args_.reverse ? 1 : -1)),
                  grad);
    if (!has_first) return;
    Product first = product;
    first.K = B;
    first.add = begin > 0 || inner > 0;
    device.gemm(first, d_gates + (args_.reverse ? inner * B * D * H : 0),
                static_cast<const S*>(args_.h0), grad);
  }

  // Column sums, as a product with a row of ones. TF32 is off, since it would round d_gates.
  template <class Device>
  void sum_biases(Device& device, int64_t rows, bool add) const {
    const int64_t H = args_.size.H;
    device.gemm(Product{1, D * H, rows, false, false, rows, D * H, D * H, add, false}, ones_,
                d_gates_, bias_);
  }

  template <class Device>
  void store_biases(Device& device) const {
    const int64_t H = args_.size.H;
    const size_t bytes = size_t(H) * sizeof(A);
    for (int j = 0; j < D; ++j) {
      if (args_.grad_b_ih && j < G)
        device.copy(static_cast<A*>(args_.grad_b_ih) + Cell::input_gate(j) * H, bias_ + j * H,
                    bytes);
      if (args_.grad_b_hh && j >= D - G)
        device.copy(static_cast<A*>(args_.grad_b_hh) + (j - (D - G)) * H, bias_ + j * H, bytes);
    }
  }

  const BackwardArgs& args_;
  const int64_t steps_;
  S* d_gates_;  // (steps, B, D*H)
  S* w_ih_;  // (G*H, I), gate blocks reordered, if kReordered
  A* through_weights_;  // (B, H): gradient of h through W_hh
  A* d_h_;  // (B, H): grad_h_n at first, then the gradient of h that bypasses W_hh
  A *d_c_, *c0_;  // (B, H)
  S* ones_;  // (steps * B)
  A* bias_;  // (D*H)
};

}  // namespace rnnfast::cuda
