// The arguments of every device's kernels, for one layer in one direction over a whole sequence.
// They are sizes, strides (in elements) and pointers; no torch header is needed.
//
// Sizes: T time steps, B sequences, I input features, H hidden units. P is the size of h, which is
// H unless an LSTM projects h (proj_size). A cell has G gates, `saved` blocks of H columns that the
// forward keeps for the backward, and D blocks of gate gradients. It has C states beside h, which
// together are called c (C = 1 for the LSTM), and N learnable vectors of H elements, its
// parameters. V is the number of tokens.
//
// Types: S is the storage type (Dtype) and A = Compute<S> the type of arithmetic.
//
// Tensors are contiguous unless the struct has strides for them. With packed data (see Ragged) a
// tensor described as (T, B, ...) has the shape (total rows of all steps, ...).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cells/common.h"

namespace rnnfast {

struct Sizes {
  int64_t T, B, I, H;
};

// Sequences of unequal length. Kernels process the sequences of the batch in another order, as
// "rows", in which lengths do not increase within the rows of a thread.
struct Ragged {
  const int64_t* lengths = nullptr;  // (B) length of each row; null if every sequence has T steps
  const int64_t* places = nullptr;  // (B) index in the batch of each row's sequence; null if the
                                    // order is that of the batch
  const int64_t* rows = nullptr;  // (B) row of each sequence of the batch: the inverse of places
  const int64_t* offsets = nullptr;  // (T) first row of each step in packed data, where step t has
                                     // rows only for sequences longer than t; null for padded
                                     // data, (T, B)
};

struct ForwardArgs {
  Sizes size;
  bool reverse;  // run from step T - 1 down to step 0
  Ragged ragged;
  const bool* reset;  // (T, B): true if no state passes from step t - 1 to step t; or null
  int64_t h_size;  // P
  const void* x;  // S (T, B, I), last stride 1; null if the input is tokens
  const int64_t* tokens;  // (T, B) indices of rows of w_ih, with I = 0; or null
  int64_t x_stride_t, x_stride_b;  // of x or tokens
  const void *h0, *c0;  // S (B, P), (B, C*H); c0 only if the cell has a state c
  // Weights. If the plan says that they are frozen (CPU only), each is a block with its bias
  // (cpu/frozen.h), and b_ih and b_hh are null.
  const void* w_ih;  // S (G*H, I); for tokens a table (V, G*H)
  const void* w_hh;  // S (G*H, P)
  const void *b_ih, *b_hh;  // S (G*H) or null
  const void* w_hr;  // S (P, H), the projection of h, or null
  const void* parameters;  // S (N, H), or null if the cell has none
  void* y;  // S (T, B, P)
  void *h_n, *c_n;  // S (B, P), (B, C*H)
  // Saved for the backward; each is null if not wanted.
  void* gates;  // S (T, B, saved*H)
  void* cells;  // A (T, B, C*H)
};

struct BackwardArgs {
  Sizes size;
  bool reverse;
  Ragged ragged;
  const bool* reset;
  int64_t h_size;  // P
  const void* grad_y;  // S (T, B, P), last stride 1, or null for zeros
  int64_t grad_y_stride_t, grad_y_stride_b;
  const void *grad_h_n, *grad_c_n;  // S (B, P), (B, C*H) or null
  const void* grad_cells;  // A (T, B, C*H) or null
  const void* x;  // S (T, B, I), last stride 1; null if the input is tokens
  const int64_t* tokens;  // (T, B) indices of rows of w_ih, with I = 0; or null
  int64_t x_stride_t, x_stride_b;  // of x or tokens
  const void *h0, *c0;  // S (B, P), (B, C*H)
  const void* w_ih;  // S (G*H, I); for tokens a table (V, G*H)
  const void* w_hh;  // S (G*H, P)
  const void *b_ih, *b_hh;  // S (G*H) or null; read only if gates is null
  const void* w_hr;  // S (P, H) or null
  const void* parameters;  // S (N, H) or null
  const void* y;  // S (T, B, P)
  const void* gates;  // S (T, B, saved*H); null (CPU only) to recompute them
  const void* cells;  // A (T, B, C*H)
  // Results; each is null if not wanted. Gradients of parameters are A; the caller rounds them.
  void* grad_x;  // S (T, B, I)
  void *grad_h0, *grad_c0;  // S (B, P), (B, C*H)
  void* grad_w_ih;  // A (G*H, I); for tokens (V, G*H), zeros on entry
  void* grad_w_hh;  // A (G*H, P)
  void *grad_b_ih, *grad_b_hh;  // A (G*H)
  void* grad_w_hr;  // A (P, H)
  void* grad_parameters;  // A (N, H)
};

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out pieces of a workspace, aligned to kAlignment. With a null base it returns null and only
// counts the bytes needed.
class Arena {
 public:
  static constexpr size_t kAlignment = 64;

  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace rnnfast
