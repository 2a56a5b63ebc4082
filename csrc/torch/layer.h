// One layer in one direction, as tensors: what every device shares before and after its kernels.
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

namespace rnnfast {

// The row of a cell in the op table.
struct CellInfo {
  const char* name;
  CellKind kind;
  int gates;      // G: blocks of H rows in w_ih and w_hh
  int saved;      // blocks of H columns in `gates`, saved for the backward
  bool has_cell;  // a second state c
};
const CellInfo& cell_info(CellKind kind);
// Throws for a name that is no cell's.
const CellInfo& cell_info(const std::string& name);

// Sizes and types of the tensors of a call. The forward keeps them, and the backward checks saved
// tensors against them: weights may have been replaced since, and saved-tensor hooks may return
// anything.
struct LayerFormat {
  at::ScalarType dtype;  // of every tensor but tokens, cells, lengths and reset
  c10::Device device = at::kCPU;
  c10::DimVector rows;  // (T, B), or (N) where x is packed
  int64_t B, I, H, P;  // I is 1 for tokens; P is the size of h, H where it is not projected
  int64_t V = -1;  // rows of the table w_ih where x is tokens, else -1
  bool one_layer = false;  // states are (1, B, H), not (B, H)

  // Shape of a tensor that has a row of `columns` elements for each row of x.
  c10::DimVector shape(int64_t columns) const;
  c10::DimVector state_shape(int64_t size) const;
};

struct LayerInputs {
  // (T, B, I), or packed (N, I): the rows of all steps; last stride 1. Or tokens: int64 with I = 1,
  // each the number of the row of w_ih that stands for W_ih x.
  at::Tensor x;
  at::Tensor h0, c0;  // (B, P), (B, H); c0 undefined where the cell has none
  at::Tensor w_ih;      // (G*H, I), or (V, G*H) of tokens
  at::Tensor w_hh;  // (G*H, P)
  at::Tensor b_ih, b_hh;  // (G*H), or both undefined
  bool reverse;
  at::Tensor w_hr;  // (P, H), the projection of h, or undefined: P is H
  at::Tensor lengths;   // (B) int64 on the CPU, not increasing if packed; undefined: all are T
  at::Tensor reset;     // (T, B) bool, or undefined

  bool packed() const { return x.dim() == 2; }
  bool has_tokens() const { return x.scalar_type() == at::kLong; }
  at::ScalarType dtype() const { return h0.scalar_type(); }
  std::span<const int64_t> all_lengths() const {
    return {lengths.const_data_ptr<int64_t>(), size_t(lengths.size(0))};
  }
  Sizes sizes() const {
    return {packed() ? all_lengths()[0] : x.size(0), h0.size(-2), has_tokens() ? 0 : x.size(-1),
            (w_hr.defined() ? w_hr : h0).size(-1)};
  }
  // Shape of a tensor that has a row of `columns` elements for each row of x.
  c10::DimVector shape(int64_t columns) const {
    return packed() ? c10::DimVector{x.size(0), columns}
                    : c10::DimVector{x.size(0), x.size(1), columns};
  }
};

// The inputs that have gradients, in the order of the ops' arguments and gradients.
inline constexpr std::array<at::Tensor LayerInputs::*, 8> kDifferentiable = {
    &LayerInputs::x,    &LayerInputs::h0,   &LayerInputs::c0,   &LayerInputs::w_ih,
    &LayerInputs::w_hh, &LayerInputs::b_ih, &LayerInputs::b_hh, &LayerInputs::w_hr};
// Which of them are asked for.
using Wanted = std::array<bool, kDifferentiable.size()>;

// If x is packed, every tensor of shape (T, B, ...) is packed too: (N, ...).
struct LayerOutputs {
  at::Tensor y;  // (T, B, P)
  at::Tensor h_n, c_n;  // (B, P), (B, H)
  at::Tensor gates;     // (T, B, saved blocks * H), or (0) or undefined if not saved
  at::Tensor cells;     // (T, B, H) in the compute type, or (0) or undefined
};

struct LayerGradOutputs {
  at::Tensor y;  // (T, B, P), last stride 1, or undefined for zeros
  at::Tensor h_n, c_n;  // (B, P), (B, H) or undefined
  at::Tensor cells;     // (T, B, H) in the compute type, contiguous, or undefined
};

// Each in the order of the ops' results; undefined where not wanted.
struct LayerGrads {
  at::Tensor x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr;
};

// Whether int64 lengths on the CPU fit x. If x is (T, B, I), each must be from 0 to T. If x is
// packed, they must not increase, be at least 1, and sum to the rows of x.
bool lengths_fit(const at::Tensor& x, const at::Tensor& lengths);
at::Tensor last_stride_one(const at::Tensor& t);

// Whether the storage of a tensor holds all of its elements. It does not where it has been freed or
// shrunk, as by `untyped_storage().resize_(0)` or by sharded training: kernels would crash.
bool has_memory(const at::Tensor& t);
// Throws, with the tensor's name, where it does not.
void check_memory(const char* op, const char* name, const at::Tensor& t);

// Checks the tensors of a call against its format, and brings them into the layouts above.
void check_inputs(const CellInfo& cell, const LayerFormat& format, LayerInputs& in);
// The same for tensors that come one by one, and whose format is not known yet.
LayerInputs check_inputs(const CellInfo& cell, const at::Tensor& x, const at::Tensor& h0,
                         const at::Tensor& c0, const at::Tensor& w_ih, const at::Tensor& w_hh,
                         const std::optional<at::Tensor>& b_ih,
                         const std::optional<at::Tensor>& b_hh,
                         const std::optional<at::Tensor>& w_hr, bool reverse,
                         const std::optional<at::Tensor>& lengths,
                         const std::optional<at::Tensor>& reset);
LayerFormat format_of(const LayerInputs& in);
// Of what a forward has saved: y, gates and cells.
void check_saved(const CellInfo& cell, const LayerFormat& format, LayerOutputs& saved);
// Undefined tensors stand for zeros.
void check_grad_outputs(const CellInfo& cell, const LayerFormat& format, LayerGradOutputs& grads);

LayerOutputs allocate_outputs(const CellInfo& cell, const LayerInputs& in, bool save_gates,
                              bool save_cells);
// Gradients of parameters are in the compute type, for the caller to round with finish_grads.
LayerGrads allocate_grads(const CellInfo& cell, const LayerInputs& in, at::ArrayRef<bool> mask);
void finish_grads(const LayerInputs& in, LayerGrads& grads);

Dtype dtype_of(const at::Tensor& t);
at::ScalarType compute_type(at::ScalarType storage);

// Throws if the gates were not saved and the device cannot compute them again (`complete`).
void check_gates(const CellInfo& cell, const LayerOutputs& out, bool complete);

// The arguments of the kernels: sizes, strides and pointers of these tensors.
ForwardArgs forward_args(const LayerInputs& in, const LayerOutputs& out);
BackwardArgs backward_args(const LayerGradOutputs& grad_out, const LayerInputs& in,
                           const LayerOutputs& out, const LayerGrads& grads);

// A layer in one direction, as the CPU runs several of at once.
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
// The name of the op that does in plain PyTorch what the op of this name does.
std::string reference_name(const std::string& op);

// A device's kernels. Sizes are positive; every output is written in full, but for gates beyond a
// sequence's end.
struct CpuDevice {
  static void forward(const CellInfo& cell, LayerInputs in, LayerOutputs& out);
  static void backward(const CellInfo& cell, LayerGradOutputs grad_out, LayerInputs in,
                       const LayerOutputs& out, LayerGrads& grads);
  // Layers of equal hidden size: independent directions, or a stack, in which x of each layer is y
  // of the one before. They run at the same time if the planner finds that faster.
  static void forward(const CellInfo& cell, std::span<LayerForward> layers, bool stacked);
  static void backward(const CellInfo& cell, std::span<LayerBackward> layers);
  // Whether it takes lengths, packed data and resets, and its backward can do without gates.
  static bool complete();
};
struct CudaDevice {
  static void forward(const CellInfo& cell, LayerInputs in, LayerOutputs& out);
  static void backward(const CellInfo& cell, LayerGradOutputs grad_out, LayerInputs in,
                       const LayerOutputs& out, LayerGrads& grads);
  static bool complete() { return false; }
};

}  // namespace rnnfast
