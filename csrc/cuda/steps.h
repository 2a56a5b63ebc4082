// The elementwise work of the CUDA driver, one functor per kernel. operator()(i) is the work of one
// thread on the GPU (steps.cu), and of one iteration of a loop in the emulation
// (tests/native/cuda_emulation.cpp).
#pragma once

#include <cmath>

#include "cells/all.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace rnnfast::cuda {

template <class S>
RNNFAST_HD Compute<S> load(const S* p) {
  return *p;
}
RNNFAST_HD float load(const bf16* p) { return decode_bf16<float>(uint32_t(p->bits)); }
RNNFAST_HD float load(const f16* p) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(p->bits));
#else
  return decode_f16<float>(uint32_t(p->bits));
#endif
}

template <class S>
RNNFAST_HD void store(S* p, Compute<S> value) {
  *p = value;
}
RNNFAST_HD void store(bf16* p, float value) { p->bits = uint16_t(encode_bf16<uint32_t>(value)); }
RNNFAST_HD void store(f16* p, float value) {
#if defined(__CUDA_ARCH__)
  p->bits = __half_as_ushort(__float2half_rn(value));
#else
  p->bits = uint16_t(encode_f16<uint32_t>(value));
#endif
}

// The maths of the cells' formulas for scalars; see cells/elman.h.
struct ScalarMath {
  RNNFAST_HD static float sigmoid(float x) { return 1 / (1 + ::expf(-x)); }
  RNNFAST_HD static double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }
  RNNFAST_HD static float tanh(float x) { return ::tanhf(x); }
  RNNFAST_HD static double tanh(double x) { return ::tanh(x); }
  RNNFAST_HD static float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  RNNFAST_HD static double fma(double a, double b, double c) { return ::fma(a, b, c); }
  template <class T>
  RNNFAST_HD static T fnma(T a, T b, T c) {
    return fma(-a, b, c);
  }
  template <class T>
  RNNFAST_HD static T one_minus_square(T a) {
    return fma(-a, a, T(1));
  }
  template <class T>
  RNNFAST_HD static T select(bool condition, T yes, T no) {
    return condition ? yes : no;
  }
};

// to[i] = from[i], converted between number types; 0 if `from` is null
template <class To, class From>
struct Convert {
  To* to;
  const From* from;
  RNNFAST_HD void operator()(int64_t i) const {
    store(to + i, from ? Compute<To>(load(from + i)) : Compute<To>(0));
  }
};

template <class S>
struct Fill {
  S* to;
  Compute<S> value;
  RNNFAST_HD void operator()(int64_t i) const { store(to + i, value); }
};

// Whether there is a state c. The kernels know one such state at most, and no parameters.
template <class Cell>
constexpr bool kHasC = [] {
  static_assert(Cell::kCells <= 1 && Cell::kParameters == 0);
  return Cell::kCells > 0;
}();

// The gate maths of one step of the forward; i = b * H + unit. K is the number of saved blocks.
template <class Cell, class S>
struct ForwardStep {
  using A = Compute<S>;
  int64_t H;
  const A* from_x;  // (B, G*H): W_ih x
  const A* from_h;  // (B, G*H): W_hh h_prev
  const S *b_ih, *b_hh;  // (G*H) or null
  const S* h_prev;  // (B, H)
  A* c;  // (B, H), updated in place
  S* y;  // (B, H)
  S* gates;  // (B, K*H) or null
  A* cells;  // (B, H) or null

  RNNFAST_HD void operator()(int64_t i) const {
    constexpr int G = Cell::kGates, K = Cell::kSaved;
    const int64_t b = i / H, unit = i % H;
    A px[G], ph[G], saved[K + 1], h, c_value = kHasC<Cell> ? c[i] : A(0);
    for (int g = 0; g < G; ++g) {
      px[g] = from_x[(b * G + g) * H + unit];
      ph[g] = from_h[(b * G + g) * H + unit];
      if (b_ih) {
        px[g] += load(b_ih + g * H + unit);
        ph[g] += load(b_hh + g * H + unit);
      }
    }
    Cell::template forward<ScalarMath>(px, ph, A(load(h_prev + i)), static_cast<const A*>(nullptr),
                                       &c_value, h, saved);
    store(y + i, h);
    if (kHasC<Cell>) c[i] = c_value;
    if (!gates) return;
    for (int k = 0; k < K; ++k) store(gates + (b * K + k) * H + unit, saved[k]);
    if (kHasC<Cell>) cells[i] = c_value;
  }
};

// The gate maths of one step of the backward; i = b * H + unit. K is the number of saved blocks, D
// that of gradient blocks.
template <class Cell, class S>
struct BackwardStep {
  using A = Compute<S>;
  int64_t H;
  const S* gates;  // (B, K*H)
  const S *h, *h_prev;  // (B, H)
  const A *c, *c_prev;  // (B, H), if the cell has c
  const S* grad_y;  // (B, H) or null
  const A* grad_c;  // (B, H) or null
  const A* through_weights;  // (B, H): gradient of h through W_hh, or null
  A* d_h;  // (B, H): on entry, if add_d_h, the gradient of h that
           // bypasses W_hh; on return, if kDirect, that of h_prev
  A* d_c;  // (B, H), updated in place
  S* d_gates;  // (B, D*H)
  bool add_d_h;

  RNNFAST_HD void operator()(int64_t i) const {
    constexpr int K = Cell::kSaved, D = Cell::kGradBlocks;
    const int64_t b = i / H, unit = i % H;
    A saved[K + 1], d[D];
    for (int k = 0; k < K; ++k) saved[k] = load(gates + (b * K + k) * H + unit);
    A total = grad_y ? A(load(grad_y + i)) : A(0);
    if (through_weights) total += through_weights[i];
    if (add_d_h) total += d_h[i];
    A d_c_value = kHasC<Cell> ? d_c[i] : A(0), direct = 0;
    if (kHasC<Cell> && grad_c) d_c_value += grad_c[i];
    const A c_value = kHasC<Cell> ? c[i] : A(0), c_before = kHasC<Cell> ? c_prev[i] : A(0);
    Cell::template backward<ScalarMath>(saved, A(load(h + i)), A(load(h_prev + i)), &c_value,
                                        &c_before, static_cast<const A*>(nullptr), total,
                                        &d_c_value, direct, d);
    for (int k = 0; k < D; ++k) store(d_gates + (b * D + k) * H + unit, d[k]);
    if (kHasC<Cell>) d_c[i] = d_c_value;
    if (Cell::kDirect) d_h[i] = direct;
  }
};

// grad_h0 = the gradient through W_hh plus, for cells with kDirect, the gradient that bypasses it
template <class S>
struct GradState {
  using A = Compute<S>;
  S* grad;
  const A *through_weights, *direct;  // direct may be null
  RNNFAST_HD void operator()(int64_t i) const {
    store(grad + i, through_weights[i] + (direct ? direct[i] : A(0)));
  }
};

}  // namespace rnnfast::cuda
