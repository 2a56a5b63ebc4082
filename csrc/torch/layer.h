// One layer in one direction, as tensors: the checks, allocations and conversions that all devices
// share, before and after their kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

#include <array>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "arguments.h"
#include "cells/common.h"
#include "cpu/microkernels.h"

namespace rnnfast {

// The facts about a cell that do not depend on the device.
struct CellInfo {
  const char* name;
  CellKind kind;
  int gates;      // G: blocks of H rows in w_ih and w_hh
  int saved;      // blocks of H columns in `gates`, saved for the backward
  int cells;      // C: states beside h. Together they are c, blocks of H columns
  int parameters = 0;  // N: learnable vectors with one number for each unit
  bool recurrent = true;  // whether there is a product with W_hh; if not, w_hh is (G*H, 0)
  bool recomputes = true;  // whether the backward can do without saved gates

  bool has_c() const { return cells > 0; }
  bool is_user_cell() const { return int(kind) >= kCellKinds; }
  bool may_project() const { return has_c() && !is_user_cell(); }
  // How many of an op's arguments are tensors of x, states, weights and biases.
  size_t tensors() const { return has_c() ? 7 : 6; }
};
// Throws for a kind that is none.
const CellInfo& cell_info(CellKind kind);
// Throws ValueError for an unknown name.
const CellInfo& cell_info(const std::string& name);

// Sizes and types of the tensors of a call. The forward saves them, and the backward checks its
// tensors against them: weights may have been replaced meanwhile, and saved-tensor hooks may return
// anything.
struct LayerFormat {
  at::ScalarType dtype;  // of every tensor except tokens, cells, lengths and reset
  c10::Device device = at::kCPU;
  c10::DimVector rows;  // (T, B), or (N) if x is packed
  int64_t B, I, H, P;  // I is 1 for tokens; P is the size of h, which is H unless h is projected
  int64_t V = -1;  // rows of the table w_ih if x is tokens, else -1
  bool one_layer = false;  // whether states are (1, B, H) instead of (B, H)
  bool frozen = false;  // whether weights are blocks of frozen ones

  // Shape of a tensor that has a row of `columns` elements for each row of x.
  c10::DimVector shape(int64_t columns) const;
  c10::DimVector state_shape(int64_t size) const;
};

struct LayerInputs {
  // (T, B, I), or packed (N, I) with the rows of all steps; last stride 1. Or int64 tokens with
  // I = 1: each is the index of a row of the table w_ih, which has W_ih x for every token.
  at::Tensor x;
  at::Tensor h0, c0;  // (B, P), (B, C*H); c0 is undefined if the cell has no c
  // Frozen weights are blocks of bytes (cpu/frozen.h) with the bias within, of all matrices or
  // none. That of w_ih holds a table if x is tokens.
  at::Tensor w_ih;  // (G*H, I); for tokens a table (V, G*H), which may be transposed
  at::Tensor w_hh;  // (G*H, P)
  at::Tensor b_ih, b_hh;  // (G*H), or both undefined
  bool reverse;
  at::Tensor w_hr;  // (P, H), the projection of h; undefined if there is none, with P = H
  at::Tensor parameters;  // (N, H); undefined if the cell has none
  at::Tensor lengths;   // (B) int64 on the CPU, not increasing if packed; undefined if all are T
  at::Tensor reset;     // (T, B) bool, or undefined

  bool packed() const { return x.dim() == 2; }
  bool has_tokens() const { return x.scalar_type() == at::kLong; }
  // Whether the table of tokens is the transpose of a contiguous W_ih (G*H, V).
  bool has_transposed_table() const {
    return has_tokens() && !w_ih.is_contiguous() && w_ih.stride(0) == 1 &&
           w_ih.stride(1) == w_ih.size(0);
  }
  bool frozen() const { return w_hh.scalar_type() == at::kByte; }
  at::ScalarType dtype() const { return h0.scalar_type(); }
  int64_t hidden() const {  // H
    return !w_hr.defined() ? h0.size(-1) : frozen() ? c0.size(-1) : w_hr.size(-1);
  }
  std::span<const int64_t> all_lengths() const {
    return {lengths.const_data_ptr<int64_t>(), size_t(lengths.size(0))};
  }
  Sizes sizes() const {
    return {packed() ? all_lengths()[0] : x.size(0), h0.size(-2), has_tokens() ? 0 : x.size(-1),
            hidden()};
  }
  // Shape of a tensor that has a row of `columns` elements for each row of x.
  c10::DimVector shape(int64_t columns) const {
    return packed() ? c10::DimVector{x.size(0), columns}
                    : c10::DimVector{x.size(0), x.size(1), columns};
  }
};

// The inputs that have gradients, in the order of the ops' arguments and gradients.
inline constexpr std::array<at::Tensor LayerInputs::*, 9> kDifferentiable = {
    &LayerInputs::x,    &LayerInputs::h0,   &LayerInputs::c0,
    &LayerInputs::w_ih, &LayerInputs::w_hh, &LayerInputs::b_ih,
    &LayerInputs::b_hh, &LayerInputs::w_hr, &LayerInputs::parameters};
// Which of them are asked for.
using Wanted = std::array<bool, kDifferentiable.size()>;

// If x is packed, every tensor of shape (T, B, ...) is packed too: (N, ...).
struct LayerOutputs {
  at::Tensor y;  // (T, B, P)
  at::Tensor h_n, c_n;  // (B, P), (B, C*H)
  at::Tensor gates;     // (T, B, saved blocks * H), or (0) or undefined if not saved
  at::Tensor cells;     // (T, B, C*H) in the compute type, or (0) or undefined
};

struct LayerGradOutputs {
  at::Tensor y;  // (T, B, P), last stride 1, or undefined for zeros
  at::Tensor h_n, c_n;  // (B, P), (B, C*H) or undefined
  at::Tensor cells;     // (T, B, C*H) in the compute type, contiguous, or undefined
};

// In the order of the ops' results; undefined if not wanted.
struct LayerGrads {
  at::Tensor x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, parameters;
};

// Whether lengths (int64, on the CPU) fit x. If x is (T, B, I), each must be from 0 to T. If x is
// packed, they must not increase, be at least 1, and sum to the rows of x.
bool lengths_fit(const at::Tensor& x, const at::Tensor& lengths);
// Returns t, copied if its last stride is not 1.
at::Tensor last_stride_one(const at::Tensor& t);

// Whether the storage of a tensor holds all of its elements. It does not if it has been freed or
// shrunk, as by `untyped_storage().resize_(0)` or by sharded training; kernels would then crash.
bool has_memory(const at::Tensor& t);
// Throws an error with the tensor's name if has_memory(t) is false.
void check_memory(const char* op, const char* name, const at::Tensor& t);

// Checks the tensors of a call against its format, and copies those whose layout is not the one
// above.
void check_inputs(const CellInfo& cell, const LayerFormat& format, LayerInputs& in);
// Checks the tensors of a call of an op and derives its format.
LayerInputs check_inputs(const CellInfo& cell, LayerInputs in);
LayerFormat format_of(const LayerInputs& in);
// Checks the tensors that a forward has saved: y, gates and cells. Copies those that are not
// contiguous.
void check_saved(const CellInfo& cell, const LayerFormat& format, LayerOutputs& saved);
// Checks incoming gradients; undefined ones stand for zeros.
void check_grad_outputs(const CellInfo& cell, const LayerFormat& format, LayerGradOutputs& grads);

LayerOutputs allocate_outputs(const CellInfo& cell, const LayerInputs& in, bool save_gates,
                              bool save_cells);
// Allocates the gradients that `mask` asks for. Those of parameters are in the compute type;
// finish_grads rounds them to the dtype, and makes undefined ones empty tensors.
LayerGrads allocate_grads(const CellInfo& cell, const LayerInputs& in, at::ArrayRef<bool> mask);
void finish_grads(const LayerInputs& in, LayerGrads& grads);

Dtype dtype_of(const at::Tensor& t);
at::ScalarType compute_type(at::ScalarType storage);

// Throws if the gates were not saved and the device cannot recompute them (not `complete`).
void check_gates(const CellInfo& cell, const LayerOutputs& out, bool complete);

// The arguments of the kernels: sizes, strides and pointers of these tensors.
ForwardArgs forward_args(const LayerInputs& in, const LayerOutputs& out);
BackwardArgs backward_args(const LayerGradOutputs& grad_out, const LayerInputs& in,
                           const LayerOutputs& out, const LayerGrads& grads);

// One layer in one direction, of which the CPU can run several at once.
struct LayerForward {
  LayerInputs in;
  LayerOutputs out;
};
struct LayerBackward {
  LayerGradOutputs grad_out;
  LayerInputs in;
  LayerOutputs out;
  LayerGrads grads;
};

// Calls rnnfast::<cell>_backward through torch's dispatcher, which lets autograd record the call
// and torch.func's transforms take part in it. Gradients are in the order of `kDifferentiable`, and
// undefined if not wanted or if there are none of the outputs.
std::vector<at::Tensor> call_backward(const CellInfo& cell, const LayerGradOutputs& grad_out,
                                      const LayerInputs& in, const LayerOutputs& out,
                                      const Wanted& wanted);

// What a block of frozen weights holds.
struct FrozenFormat {
  int gates;
  int64_t H, K;  // of a matrix (gates * H, K)
  at::ScalarType type;
  bool is_table = false;  // of K tokens

  bool operator==(const FrozenFormat&) const = default;
};
// The type of the weights of a layer, if its w_hh is a block.
std::optional<cpu::WeightType> frozen_type(const at::Tensor& w_hh);
// Throws an error if t is no block, or a damaged one.
FrozenFormat frozen_format(const at::Tensor& t);
// Whether t is a block with a matrix (gates * H, K) of the same type as `like`, which the
// instruction set in use can read.
bool is_frozen(const at::Tensor& t, const at::Tensor& like, int gates, int64_t H, int64_t K);
// Whether t is a block with a table of rows (gates * H) that has all of these tokens.
bool is_frozen_table(const at::Tensor& t, int gates, int64_t H, const at::Tensor& tokens);
// Throws an error unless t is a block of this format that the instruction set in use can read.
void check_block(const char* op, const char* name, const at::Tensor& t,
                 const FrozenFormat& expected);
// The same for all blocks of a layer. A table may be of any type, all matrices must be of one.
void check_frozen(const CellInfo& cell, const LayerFormat& format, const LayerInputs& in);

// A device's kernels. Sizes are positive; every output is written in full, but for gates beyond a
// sequence's end.
struct CpuDevice {
  static void forward(const CellInfo& cell, LayerInputs in, LayerOutputs& out);
  static void backward(const CellInfo& cell, LayerGradOutputs grad_out, LayerInputs in,
                       const LayerOutputs& out, LayerGrads& grads);
  // Runs several layers of equal hidden size: independent directions, or (`stacked`) a stack, in
  // which the x of each layer is the y of the one before. They run at the same time if the planner
  // expects that to be faster.
  static void forward(const CellInfo& cell, std::span<LayerForward> layers, bool stacked);
  static void backward(const CellInfo& cell, std::span<LayerBackward> layers);
  // Whether lengths, packed data, resets, projections and tokens are supported, and a backward
  // without saved gates.
  static bool complete();
};
struct CudaDevice {
  static void forward(const CellInfo& cell, LayerInputs in, LayerOutputs& out);
  static void backward(const CellInfo& cell, LayerGradOutputs grad_out, LayerInputs in,
                       const LayerOutputs& out, LayerGrads& grads);
  static bool complete() { return false; }
};

}  // namespace rnnfast
