// GRU cell (Cho et al. 2014, in the variant of torch.nn.GRU: the reset gate acts after W_hn).
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
//   n = tanh(W_in x + b_in + r * (W_hn h + b_hn))   h' = (1 - z) * n + z * h
#pragma once

#include "cells/common.h"

namespace rnnfast {

struct Gru {
  static constexpr const char* kName = "gru";  // name of the operator
  static constexpr int kGates = 3;       // r, z, n in w_ih and w_hh
  static constexpr int kSaved = 4;       // n, r, z, hn with hn = W_hn h + b_hn
  static constexpr int kGradBlocks = 4;  // gradients of n, r, z before activation, and of hn: w_ih
                                         // takes the first three blocks, w_hh the last three
  static constexpr int kCells = 0, kParameters = 0;
  static constexpr bool kDirect = true;
  static constexpr bool kReadsH = false;
  RNNFAST_HD static constexpr int input_gate(int j) { return j == 0 ? 2 : j - 1; }

  template <class M, class V>
  RNNFAST_HD static void forward(const V* from_x, const V* from_h, V h_prev,
                                 const V* /*parameters*/, V* /*c*/, V& h, V* saved) {
    const V r = M::sigmoid(from_x[0] + from_h[0]);
    const V z = M::sigmoid(from_x[1] + from_h[1]);
    const V hn = from_h[2];
    const V n = M::tanh(M::fma(r, hn, from_x[2]));
    h = M::fma(z, h_prev - n, n);
    saved[0] = n;
    saved[1] = r;
    saved[2] = z;
    saved[3] = hn;
  }

  template <class M, class V>
  RNNFAST_HD static void backward(const V* saved, V /*h*/, V h_prev, const V* /*c*/,
                                  const V* /*c_prev*/, const V* /*parameters*/, V d_h, V* /*d_c*/,
                                  V& d_h_direct, V* d_gates) {
    const V n = saved[0], r = saved[1], z = saved[2], hn = saved[3];
    const V d_n = d_h * (1 - z) * M::one_minus_square(n);
    d_gates[0] = d_n;
    d_gates[1] = d_n * hn * r * (1 - r);
    d_gates[2] = d_h * (h_prev - n) * z * (1 - z);
    d_gates[3] = d_n * r;
    d_h_direct = d_h * z;
  }
};

}  // namespace rnnfast
