// Elman cell (torch.nn.RNN): h' = act(W_ih x + b_ih + W_hh h + b_hh), act = tanh or relu.
#pragma once

#include "cells/common.h"

namespace rnnfast {

struct ElmanTraits {
  static constexpr int kGates = 1;         // row blocks of w_ih and w_hh
  static constexpr int kSaved = 0;         // blocks of H columns kept per step for the backward
  static constexpr int kGradBlocks = 1;    // blocks of H columns of gate gradients per step
  static constexpr int kCells = 0;         // states beside h, which are called c
  static constexpr int kParameters = 0;    // learnable vectors with one number for each unit
  static constexpr bool kDirect = false;   // whether h' depends on h other than through W_hh
  static constexpr bool kReadsH = true;    // whether the backward reads h'
  // The gate block of w_ih that gradient block j belongs to. The last kGates gradient blocks belong
  // to the gate blocks of w_hh, in order.
  RNNFAST_HD static constexpr int input_gate(int j) { return j; }
};

// V is a scalar or a group of SIMD vectors, and M supplies its maths: sigmoid, tanh,
// select(condition, yes, no), fma(a, b, c) = a * b + c, fnma(a, b, c) = c - a * b and
// one_minus_square(a). Multiply-adds are explicit, because compilers are told not to make any
// (-ffp-contract=off): so a formula gives the same bits wherever it is inlined.
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
    return M::select(x < V{}, V{}, x);  // relu(NaN) is NaN, as in torch.relu
  }
  template <class V>
  RNNFAST_HD static V backward(V h, V d_h) {
    return M::select(h <= V{}, V{}, d_h);
  }
};

template <template <class> class Activation>
struct Elman : ElmanTraits {
  // from_x = W_ih x + b_ih and from_h = W_hh h + b_hh have one entry per gate, c has kCells: the
  // states before the step on entry, and those after it on return.
  template <class M, class V>
  RNNFAST_HD static void forward(const V* from_x, const V* from_h, V /*h_prev*/,
                                 const V* /*parameters*/, V* /*c*/, V& h, V* /*saved*/) {
    h = Activation<M>::forward(from_x[0] + from_h[0]);
  }

  // d_h is the whole gradient of h', from the output and from the next step. d_gates receives the
  // kGradBlocks gradient blocks, then the gradients of the kParameters parameters. c has the states
  // after the step. d_c has their gradients on entry, and those of the states before the step on
  // return. d_h_direct is the part of the gradient of h_prev that does not pass through W_hh.
  template <class M, class V>
  RNNFAST_HD static void backward(const V* /*saved*/, V h, V /*h_prev*/, const V* /*c*/,
                                  const V* /*c_prev*/, const V* /*parameters*/, V d_h, V* /*d_c*/,
                                  V& /*d_h_direct*/, V* d_gates) {
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
