// One layer in one direction over a whole sequence: the arguments of every device's kernels.
// Free of torch: sizes, strides in elements, pointers.
// Sizes: T steps, B batch, I input, H hidden, P the size of h, which is H unless an LSTM projects h
// (proj_size). Of a cell: G gates, `saved` blocks of H columns that the forward saves, D blocks of
// gate gradients. S is the storage type (Dtype), A = Compute<S> the type of arithmetic. If data are
// packed (see Ragged), tensors of shape (T, B, ...) have the shape (rows of all steps, ...).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cells/common.h"

namespace rnnfast {

struct Sizes {
  int64_t T, B, I, H;
};

// Sequences of unequal length. Kernels renumber the sequences of the batch as rows, so that lengths
// do not increase within the rows of a thread.
struct Ragged {
  const int64_t* lengths = nullptr;  // (B) of each row; null where every sequence has T steps
  const int64_t* places = nullptr;  // (B) the sequence behind each row; null where b is b
  const int64_t* rows = nullptr;  // (B) the row of each sequence: the inverse of places
  const int64_t* offsets = nullptr;  // (T) where the rows of each step begin in packed data: step
                                     // after step, only the sequences that are so long; null where
                                     // data are padded, (T, B)
};

struct ForwardArgs {
  Sizes size;
  bool reverse;  // run from step T - 1 down to step 0
  Ragged ragged;
  const bool* reset;  // (T, B): no state passes from step t - 1 to step t; or null
  int64_t h_size;  // P
  const void* x;  // S (T, B, I), last stride 1; null where there are tokens
  const int64_t* tokens;  // (T, B) rows of w_ih, I then being 0; or null
  int64_t x_stride_t, x_stride_b;  // of x or tokens
  const void *h0, *c0;  // S (B, P), (B, H); c0 only where the cell has it
  const void* w_ih;  // S (G*H, I), or (V, G*H) of tokens
  const void* w_hh;  // S (G*H, P)
  const void *b_ih, *b_hh;  // S (G*H) or null
  const void* w_hr;  // S (P, H), the projection of h, or null
  void* y;  // S (T, B, P)
  void *h_n, *c_n;  // S (B, P), (B, H)
  // for the backward, each null where not wanted
  void* gates;  // S (T, B, saved*H)
  void* cells;  // A (T, B, H)
};

struct BackwardArgs {
  Sizes size;
  bool reverse;
  Ragged ragged;
  const bool* reset;
  int64_t h_size;  // P
  const void* grad_y;  // S (T, B, P), last stride 1, or null for zeros
  int64_t grad_y_stride_t, grad_y_stride_b;
  const void *grad_h_n, *grad_c_n;  // S (B, P), (B, H) or null
  const void* grad_cells;  // A (T, B, H) or null
  const void* x;  // S (T, B, I), last stride 1; null where there are tokens
  const int64_t* tokens;  // (T, B) rows of w_ih, I then being 0; or null
  int64_t x_stride_t, x_stride_b;  // of x or tokens
  const void *h0, *c0;  // S (B, P), (B, H)
  const void* w_ih;  // S (G*H, I), or (V, G*H) of tokens
  const void* w_hh;  // S (G*H, P)
  const void *b_ih, *b_hh;  // S (G*H) or null; only used where gates are null
  const void* w_hr;  // S (P, H) or null
  const void* y;  // S (T, B, P)
  const void* gates;  // S (T, B, saved*H); null (CPU only) to compute them again
  const void* cells;  // A (T, B, H)
  // results, each null where not wanted; those of parameters in A, for the caller to round
  void* grad_x;  // S (T, B, I)
  void *grad_h0, *grad_c0;  // S (B, P), (B, H)
  void* grad_w_ih;  // A (G*H, I), or (V, G*H) of tokens, zeros on entry
  void* grad_w_hh;  // A (G*H, P)
  void *grad_b_ih, *grad_b_hh;  // A (G*H)
  void* grad_w_hr;  // A (P, H)
};

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out aligned pieces of a workspace. With a null base it only counts the bytes needed.
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
