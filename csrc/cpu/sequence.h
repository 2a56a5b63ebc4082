// One layer in one direction over a whole sequence, on the CPU. Free of torch: sizes, strides, pointers.
// Sizes: T steps, B batch, I input, H hidden; G gates, K saved blocks and D gradient blocks of the cell.
// S is the storage type (Dtype), A = Compute<S> the type of arithmetic.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cells/common.h"
#include "cpu/plan.h"

namespace rnnfast::cpu {

struct ForwardArgs {
  Sizes size;
  bool reverse;                  // run from step T - 1 down to step 0
  bool save;                     // write gates and cells for the backward
  const void* x;                 // S (T, B, I), last stride 1
  int64_t x_stride_t, x_stride_b;
  const void *h0, *c0;           // S (B, H); c0 only where the cell has it
  const void *w_ih, *w_hh;       // S (G*H, I), (G*H, H)
  const void *b_ih, *b_hh;       // S (G*H) or null
  void* y;                       // S (T, B, H)
  void *h_n, *c_n;               // S (B, H)
  void* gates;                   // S (T, B, K*H)
  void* cells;                   // A (T, B, H)
};

struct BackwardArgs {
  Sizes size;
  bool reverse;
  const void* grad_y;            // S (T, B, H), last stride 1, or null for zeros
  int64_t grad_y_stride_t, grad_y_stride_b;
  const void *grad_h_n, *grad_c_n;  // S (B, H) or null
  const void* x;                 // S (T, B, I), last stride 1
  int64_t x_stride_t, x_stride_b;
  const void *h0, *c0;           // S (B, H)
  const void *w_ih, *w_hh;       // S (G*H, I), (G*H, H)
  const void* y;                 // S (T, B, H)
  const void* gates;             // S (T, B, K*H)
  const void* cells;             // A (T, B, H)
  // results, each null where not wanted; those of parameters in A, for the caller to round
  void* grad_x;                  // S (T, B, I)
  void *grad_h0, *grad_c0;       // S (B, H)
  void *grad_w_ih, *grad_w_hh;   // A (G*H, I), (G*H, H)
  void *grad_b_ih, *grad_b_hh;   // A (G*H)
};

// The kernels of one cell and one dtype. The workspace is the caller's: workspace(size, plan) bytes,
// aligned to kAlignment, contents undefined before and after.
inline constexpr size_t kAlignment = 64;

struct Kernels {
  Plan (*plan_forward)(const Sizes&, const Machine&);
  Plan (*plan_backward)(const Sizes&, const Machine&);
  size_t (*forward_workspace)(const Sizes&, const Plan&);
  void (*forward)(const ForwardArgs&, const Plan&, void* workspace);
  size_t (*backward_workspace)(const Sizes&, const Plan&);
  void (*backward)(const BackwardArgs&, const Plan&, void* workspace);
};

struct KernelTable {
  Kernels kernels[kCells][kDtypes];
};

// Instruction sets usable on this machine, worst first; the last is the default.
std::vector<std::string> capabilities();
std::string capability();
// Throws std::invalid_argument for one that this machine or build lacks.
void set_capability(const std::string& name);

const Kernels& kernels(CellKind cell, Dtype dtype);

}  // namespace rnnfast::cpu
