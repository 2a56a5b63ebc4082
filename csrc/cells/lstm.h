// LSTM cell (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000;
// torch.nn.LSTM).
//   i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      f = sigmoid(W_if x + b_if + W_hf h + b_hf)
//   g = tanh   (W_ig x + b_ig + W_hg h + b_hg)      o = sigmoid(W_io x + b_io + W_ho h + b_ho)
//   c' = f * c + i * g                              h' = o * tanh(c')
#pragma once

#include "cells/common.h"

namespace rnnfast {

struct Lstm {
  static constexpr const char* kName = "lstm";  // name of the operator
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;  // i, f, g, o after activation
  static constexpr int kGradBlocks = 4;
  static constexpr int kCells = 1, kParameters = 0;
  static constexpr bool kDirect = false;
  static constexpr bool kReadsH = false;
  RNNFAST_HD static constexpr int input_gate(int j) { return j; }

  template <class M, class V>
  RNNFAST_HD static void forward(const V* from_x, const V* from_h, V /*h_prev*/,
                                 const V* /*parameters*/, V* c, V& h, V* saved) {
    const V i = M::sigmoid(from_x[0] + from_h[0]);
    const V f = M::sigmoid(from_x[1] + from_h[1]);
    const V g = M::tanh(from_x[2] + from_h[2]);
    const V o = M::sigmoid(from_x[3] + from_h[3]);
    c[0] = M::fma(f, c[0], i * g);
    h = o * M::tanh(c[0]);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  // h', from what `forward` saved and the new state c
  template <class M, class V>
  RNNFAST_HD static V output(const V* saved, V c) {
    return saved[3] * M::tanh(c);
  }

  template <class M, class V>
  RNNFAST_HD static void backward(const V* saved, V /*h*/, V /*h_prev*/, const V* c,
                                  const V* c_prev, const V* /*parameters*/, V d_h, V* d_c,
                                  V& /*d_h_direct*/, V* d_gates) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = M::tanh(c[0]);
    const V d_c_total = M::fma(d_h * o, M::one_minus_square(tanh_c), d_c[0]);
    d_gates[0] = d_c_total * g * i * (1 - i);
    d_gates[1] = d_c_total * c_prev[0] * f * (1 - f);
    d_gates[2] = d_c_total * i * M::one_minus_square(g);
    d_gates[3] = d_h * tanh_c * o * (1 - o);
    d_c[0] = d_c_total * f;
  }
};

}  // namespace rnnfast
