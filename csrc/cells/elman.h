// Elman cell (torch.nn.RNN): h' = act(W_ih x + b_ih + W_hh h + b_hh), act = tanh or relu.
#pragma once

#include "cells/common.h"

namespace rnnfast {

struct ElmanTraits {
  static constexpr int kGates = 1;         // row blocks of w_ih and w_hh
  static constexpr int kSaved = 0;         // blocks of H kept per step for the backward
  static constexpr int kGradBlocks = 1;    // blocks of H of gate gradients per step
  static constexpr bool kHasCell = false;  // a second state c
  static constexpr bool kDirect = false;   // h reaches h' other than through W_hh
  static constexpr bool kReadsH = true;    // the backward reads h'
  // gate block of w_ih to which gradient block j belongs; w_hh takes the last kGates blocks in
  // order
  RNNFAST_HD static constexpr int input_gate(int j) { return j; }
};

// M supplies the maths of V, a scalar or SIMD vectors: sigmoid, tanh, select(condition, yes, no),
// fma(a, b, c) = a * b + c, fnma(a, b, c) = c - a * b and one_minus_square(a). Multiply-adds are
// written out, for compilers are told not to make any: the same formula gives the same bits
// wherever it is inlined.
template <class M>
struct TanhActivation {
  template <class V>
  RNNFAST_HD static V forward(V x) {
    return M::tanh(x);
  }
  template <class V>
  RNNFAST_HD static V backward(V h, V d_h) {
    return d_h * M::one_minus_square(h);
  }
};

template <class M>
struct ReluActivation {
  template <class V>
  RNNFAST_HD static V forward(V x) {
    return M::select(x < V{}, V{}, x);  // NaN passes, as in torch.relu
  }
  template <class V>
  RNNFAST_HD static V backward(V h, V d_h) {
    return M::select(h <= V{}, V{}, d_h);
  }
};

template <template <class> class Activation>
struct Elman : ElmanTraits {
  // from_x = W_ih x + b_ih, from_h = W_hh h + b_hh, one entry per gate
  template <class M, class V>
  RNNFAST_HD static void forward(const V* from_x, const V* from_h, V /*h_prev*/, V& /*c*/, V& h,
                                 V* /*saved*/) {
    h = Activation<M>::forward(from_x[0] + from_h[0]);
  }

  // d_gates: gradient blocks as in the traits; d_h is complete on entry
  template <class M, class V>
  RNNFAST_HD static void backward(const V* /*saved*/, V h, V /*h_prev*/, V /*c*/, V /*c_prev*/,
                                  V d_h, V& /*d_c*/, V& /*d_h_direct*/, V* d_gates) {
    d_gates[0] = Activation<M>::backward(h, d_h);
  }
};

struct ElmanTanh : Elman<TanhActivation> {
  static constexpr const char* kName = "elman_tanh";
};
struct ElmanRelu : Elman<ReluActivation> {
  static constexpr const char* kName = "elman_relu";
};

}  // namespace rnnfast
