#include "torch/layer.h"

#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>

#include <string>

#include "cells/all.h"
#include "torch/memory.h"
#include "torch/user_cells.h"

namespace rnnfast {
namespace {

// In the order of CellKind.
constexpr CellInfo kTable[kCellKinds] = {
#define RNNFAST_ROW(Cell) \
  {Cell::kName, CellKind::k##Cell, Cell::kGates, Cell::kSaved, Cell::kCells},
    RNNFAST_FOR_EACH_CELL(RNNFAST_ROW)
#undef RNNFAST_ROW
};

// Checks the shape of tensors, and that they have this dtype and device and live memory.
struct Checker {
  const CellInfo& cell;
  at::ScalarType dtype;
  c10::Device device;

  void check(const at::Tensor& t, const char* name, at::IntArrayRef shape) const {
    TORCH_CHECK(t.sizes() == shape, "rnnfast::", cell.name, ": expected ", name, " of shape ",
                shape, ", got ", t.sizes());
    TORCH_CHECK(t.scalar_type() == dtype, "rnnfast::", cell.name, ": expected ", name,
                " to have the dtype ", dtype, ", got ", t.scalar_type());
    TORCH_CHECK(t.device() == device, "rnnfast::", cell.name, ": expected ", name,
                " on the device ", device, ", got ", t.device());
    check_memory(cell.name, name, t);
  }
  // Checks a tensor and makes it contiguous, unless it is undefined.
  void operator()(at::Tensor& t, const char* name, at::IntArrayRef shape) const {
    if (!t.defined()) return;
    check(t, name, shape);
    if (!t.is_contiguous()) t = t.contiguous();
  }
};

void check_lengths(const CellInfo& cell, const at::Tensor& x, at::Tensor& lengths, int64_t B) {
  TORCH_CHECK(lengths.scalar_type() == at::kLong && lengths.device().is_cpu() &&
                  lengths.sizes() == at::IntArrayRef({B}),
              "rnnfast::", cell.name, ": expected lengths of shape ", at::IntArrayRef({B}),
              ", int64 and on the CPU, got ", lengths.sizes(), " of ", lengths.scalar_type());
  check_memory(cell.name, "lengths", lengths);
  lengths = lengths.contiguous();
  TORCH_CHECK(
      lengths_fit(x, lengths), "rnnfast::", cell.name,
      x.dim() == 3
          ? ": expected lengths from 0 to T = "
          : ": expected lengths of packed x that do not increase, are at least 1 and sum to ",
      x.size(0));
}

void check_tokens(const CellInfo& cell, const at::Tensor& tokens, int64_t V) {
  if (tokens.numel() == 0) return;
  const auto [low, high] = at::aminmax(tokens);
  const int64_t least = low.item<int64_t>(), most = high.item<int64_t>();
  TORCH_CHECK_INDEX(least >= 0 && most < V, "rnnfast::", cell.name,
                    ": index out of range: expected tokens from 0 to ", V - 1, ", got ",
                    least < 0 ? least : most);
}

void* data_or_null(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

}  // namespace

bool has_memory(const at::Tensor& t) {
  if (t.numel() == 0) return true;
  const c10::Storage& storage = t.unsafeGetTensorImpl()->unsafe_storage();
  if (!storage) return true;  // a subclass that keeps its elements elsewhere
  int64_t last = t.storage_offset();
  for (int64_t dim = 0; dim < t.dim(); ++dim) last += (t.size(dim) - 1) * t.stride(dim);
  return storage.data() && size_t(last + 1) * t.element_size() <= storage.nbytes();
}

void check_memory(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(has_memory(t), "rnnfast::", op, ": the storage of ", name, " has ",
              t.unsafeGetTensorImpl()->unsafe_storage().nbytes(), " bytes, too few for shape ",
              t.sizes(), " of ", t.scalar_type(), ": it has been freed or resized");
}

c10::DimVector LayerFormat::shape(int64_t columns) const {
  c10::DimVector result = rows;
  result.push_back(columns);
  return result;
}

c10::DimVector LayerFormat::state_shape(int64_t size) const {
  return one_layer ? c10::DimVector{1, B, size} : c10::DimVector{B, size};
}

bool lengths_fit(const at::Tensor& x, const at::Tensor& lengths) {
  const bool packed = x.dim() == 2;
  const std::span<const int64_t> values(lengths.const_data_ptr<int64_t>(), size_t(lengths.size(0)));
  int64_t rows = 0, most = x.size(0);
  for (const int64_t value : values) {
    if (value < (packed ? 1 : 0) || value > most) return false;
    if (!packed) continue;
    most = value;  // packed lengths must not increase
    rows += value;
    if (rows > x.size(0)) return false;
  }
  return !packed || (rows == x.size(0) && rows > 0);
}

at::Tensor last_stride_one(const at::Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

const CellInfo& cell_info(CellKind kind) {
  return int(kind) < kCellKinds ? kTable[int(kind)] : user_cell_info(kind);
}

const CellInfo& cell_info(const std::string& name) {
  for (const CellInfo& one : kTable)
    if (name == one.name) return one;
  std::string names;
  for (const CellInfo& one : kTable) names += std::string(names.empty() ? "" : ", ") + one.name;
  TORCH_CHECK_VALUE(false, "rnnfast: unknown cell '", name, "'; available: ", names);
}

Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK(false, "rnnfast: expected float64, float32, bfloat16 or float16, got ",
                  t.scalar_type());
  }
}

at::ScalarType compute_type(at::ScalarType storage) {
  return storage == at::kDouble ? at::kDouble : at::kFloat;
}

void check_inputs(const CellInfo& cell, const LayerFormat& format, LayerInputs& in) {
  const auto& [dtype, device, rows, B, I, H, P, V, one_layer, frozen] = format;
  const int64_t gates = cell.gates * H;
  const bool tokens = V >= 0;
  const Checker check{cell, dtype, device};
  Checker{cell, tokens ? at::kLong : dtype, device}.check(in.x, "x", format.shape(I));
  in.x = last_stride_one(in.x);
  if (in.lengths.defined()) check_lengths(cell, in.x, in.lengths, B);
  Checker{cell, at::kBool, device}(in.reset, "reset", rows);
  check(in.h0, "h0", format.state_shape(P));
  check(in.c0, "c0", format.state_shape(cell.cells * H));
  check(in.parameters, "parameters", {cell.parameters, H});
  if (frozen) {
    check_frozen(cell, format, in);
  } else {
    if (in.has_transposed_table())
      check.check(in.w_ih, "w_ih", {V, gates});
    else
      check(in.w_ih, "w_ih", tokens ? at::IntArrayRef{V, gates} : at::IntArrayRef{gates, I});
    check(in.w_hh, "w_hh", {gates, cell.recurrent ? P : 0});
    check(in.b_ih, "b_ih", {gates});
    check(in.b_hh, "b_hh", {gates});
    check(in.w_hr, "w_hr", {P, H});
  }
  if (tokens) check_tokens(cell, in.x, V);
}

LayerInputs check_inputs(const CellInfo& cell, LayerInputs in) {
  const at::Tensor &x = in.x, &h0 = in.h0, &w_ih = in.w_ih;
  const bool packed = x.dim() == 2 && in.lengths.defined();
  TORCH_CHECK(x.dim() == 3 || packed, "rnnfast::", cell.name,
              ": expected x of shape (T, B, I), or packed (N, I) with lengths, got ", x.sizes());
  TORCH_CHECK(h0.dim() == 2, "rnnfast::", cell.name, ": expected h0 of shape (B, H), got ",
              h0.sizes());
  TORCH_CHECK(!in.w_hr.defined() || in.frozen() || in.w_hr.dim() == 2, "rnnfast::", cell.name,
              ": expected w_hr of shape (P, H), got ", in.w_hr.sizes());
  TORCH_CHECK(!in.has_tokens() || (x.size(-1) == 1 && (in.frozen() || w_ih.dim() == 2)),
              "rnnfast::", cell.name,
              ": expected tokens of shape (T, B, 1) and w_ih of shape (V, G*H), got ", x.sizes(),
              " and ", w_ih.sizes());
  TORCH_CHECK(!packed || !in.reset.defined(), "rnnfast::", cell.name,
              ": expected no reset with packed x");
  TORCH_CHECK(in.b_ih.defined() == in.b_hh.defined(), "rnnfast::", cell.name,
              ": expected both b_ih and b_hh, or neither");
  TORCH_CHECK(in.parameters.defined() == (cell.parameters > 0), "rnnfast::", cell.name,
              ": expected parameters of ", cell.parameters, " vectors");
  dtype_of(in.has_tokens() ? h0 : x);
  check_inputs(cell, format_of(in), in);
  return in;
}

LayerFormat format_of(const LayerInputs& in) {
  const at::Tensor& h0 = in.h0;
  const int64_t P = h0.size(-1);
  LayerFormat format{.dtype = in.has_tokens() ? h0.scalar_type() : in.x.scalar_type(),
                     .device = in.x.device(),
                     .rows = in.packed() ? c10::DimVector{in.x.size(0)}
                                         : c10::DimVector{in.x.size(0), in.x.size(1)},
                     .B = in.packed() ? h0.size(-2) : in.x.size(1),
                     .I = in.x.size(-1),
                     .H = in.hidden(),
                     .P = P};
  if (in.has_tokens()) format.V = in.frozen() ? frozen_format(in.w_ih).K : in.w_ih.size(0);
  format.one_layer = h0.dim() == 3;
  format.frozen = in.frozen();
  return format;
}

void check_saved(const CellInfo& cell, const LayerFormat& format, LayerOutputs& saved) {
  const Checker check{cell, format.dtype, format.device};
  check(saved.y, "y", format.shape(format.P));
  if (saved.gates.defined() && saved.gates.sizes() != at::IntArrayRef({0}))
    check(saved.gates, "gates", format.shape(cell.saved * format.H));
  const Checker check_cells{cell, compute_type(format.dtype), format.device};
  check_cells(saved.cells, "the cells that the forward saved", format.shape(cell.cells * format.H));
}

void check_grad_outputs(const CellInfo& cell, const LayerFormat& format, LayerGradOutputs& grads) {
  const Checker check{cell, format.dtype, format.device};
  if (grads.y.defined()) {
    check.check(grads.y, "grad_y", format.shape(format.P));
    grads.y = last_stride_one(grads.y);
  }
  check(grads.h_n, "grad_h_n", format.state_shape(format.P));
  check(grads.c_n, "grad_c_n", format.state_shape(cell.cells * format.H));
  const Checker check_cells{cell, compute_type(format.dtype), format.device};
  check_cells(grads.cells, "grad_cells", format.shape(cell.cells * format.H));
}

LayerOutputs allocate_outputs(const CellInfo& cell, const LayerInputs& in, bool save_gates,
                              bool save_cells) {
  const auto [T, B, I, H] = in.sizes();
  const auto options = in.h0.options();
  const auto compute = options.dtype(compute_type(in.dtype()));
  LayerOutputs out;
  out.y = new_tensor(in.shape(in.h0.size(-1)), options);
  out.h_n = at::empty(in.h0.sizes(), options);
  out.gates = save_gates ? new_tensor(in.shape(cell.saved * H), options) : at::empty({0}, options);
  if (cell.has_c()) {
    out.c_n = at::empty({B, cell.cells * H}, options);
    out.cells =
        save_cells ? new_tensor(in.shape(cell.cells * H), compute) : at::empty({0}, compute);
  }
  return out;
}

LayerGrads allocate_grads(const CellInfo& cell, const LayerInputs& in, at::ArrayRef<bool> mask) {
  const size_t count =
      cell.tensors() + (in.w_hr.defined() ? 1 : 0) + (in.parameters.defined() ? 1 : 0);
  TORCH_CHECK(mask.size() == count, "rnnfast::", cell.name, "_backward: expected a mask of ", count,
              " entries, got ", mask.size());
  const auto options = in.h0.options();
  const auto compute = options.dtype(compute_type(in.dtype()));
  size_t next = 0;
  const auto allocate = [&](const at::Tensor& like, const at::TensorOptions& opts) {
    const bool wanted = mask[next++] && like.defined();
    return wanted ? new_tensor(like.sizes(), opts) : at::Tensor();
  };
  LayerGrads grads;
  grads.x = allocate(in.has_tokens() ? at::Tensor() : in.x, options);
  grads.h0 = allocate(in.h0, options);
  if (cell.has_c()) grads.c0 = allocate(in.c0, options);
  grads.w_ih = allocate(in.has_transposed_table() ? in.w_ih.t() : in.w_ih, compute);
  if (in.has_transposed_table() && grads.w_ih.defined())
    grads.w_ih = grads.w_ih.t();
  else if (in.has_tokens() && grads.w_ih.defined())
    grads.w_ih.zero_();
  grads.w_hh = allocate(in.w_hh, compute);
  grads.b_ih = allocate(in.b_ih, compute);
  grads.b_hh = allocate(in.b_hh, compute);
  if (in.w_hr.defined()) grads.w_hr = allocate(in.w_hr, compute);
  if (in.parameters.defined()) grads.parameters = allocate(in.parameters, compute);
  return grads;
}

void check_gates(const CellInfo& cell, const LayerOutputs& out, bool complete) {
  TORCH_CHECK((complete && cell.recomputes) || cell.saved == 0 || out.gates.numel() > 0,
              "rnnfast::", cell.name,
              "_backward: expected the gates that the forward saves with save=True and "
              "recompute=False, got none");
}

ForwardArgs forward_args(const LayerInputs& in, const LayerOutputs& out) {
  return {
      .size = in.sizes(),
      .reverse = in.reverse,
      .ragged = {},
      .reset = in.reset.defined() ? in.reset.const_data_ptr<bool>() : nullptr,
      .h_size = in.h0.size(-1),
      .x = in.has_tokens() ? nullptr : in.x.data_ptr(),
      .tokens = in.has_tokens() ? in.x.const_data_ptr<int64_t>() : nullptr,
      .x_stride_t = in.x.stride(0),
      .x_stride_b = in.x.stride(-2),
      .h0 = in.h0.data_ptr(),
      .c0 = data_or_null(in.c0),
      .w_ih = in.w_ih.data_ptr(),
      .w_hh = in.w_hh.data_ptr(),
      .b_ih = data_or_null(in.b_ih),
      .b_hh = data_or_null(in.b_hh),
      .w_hr = data_or_null(in.w_hr),
      .parameters = data_or_null(in.parameters),
      .y = out.y.data_ptr(),
      .h_n = out.h_n.data_ptr(),
      .c_n = data_or_null(out.c_n),
      .gates = data_or_null(out.gates),
      .cells = data_or_null(out.cells),
  };
}

BackwardArgs backward_args(const LayerGradOutputs& grad_out, const LayerInputs& in,
                           const LayerOutputs& out, const LayerGrads& grads) {
  return {
      .size = in.sizes(),
      .reverse = in.reverse,
      .ragged = {},
      .reset = in.reset.defined() ? in.reset.const_data_ptr<bool>() : nullptr,
      .h_size = in.h0.size(-1),
      .grad_y = data_or_null(grad_out.y),
      .grad_y_stride_t = grad_out.y.defined() ? grad_out.y.stride(0) : 0,
      .grad_y_stride_b = grad_out.y.defined() ? grad_out.y.stride(-2) : 0,
      .grad_h_n = data_or_null(grad_out.h_n),
      .grad_c_n = data_or_null(grad_out.c_n),
      .grad_cells = data_or_null(grad_out.cells),
      .x = in.has_tokens() ? nullptr : in.x.data_ptr(),
      .tokens = in.has_tokens() ? in.x.const_data_ptr<int64_t>() : nullptr,
      .x_stride_t = in.x.stride(0),
      .x_stride_b = in.x.stride(-2),
      .h0 = in.h0.data_ptr(),
      .c0 = data_or_null(in.c0),
      .w_ih = in.w_ih.data_ptr(),
      .w_hh = in.w_hh.data_ptr(),
      .b_ih = data_or_null(in.b_ih),
      .b_hh = data_or_null(in.b_hh),
      .w_hr = data_or_null(in.w_hr),
      .parameters = data_or_null(in.parameters),
      .y = out.y.data_ptr(),
      .gates = data_or_null(out.gates),
      .cells = data_or_null(out.cells),
      .grad_x = data_or_null(grads.x),
      .grad_h0 = data_or_null(grads.h0),
      .grad_c0 = data_or_null(grads.c0),
      .grad_w_ih = data_or_null(grads.w_ih),
      .grad_w_hh = data_or_null(grads.w_hh),
      .grad_b_ih = data_or_null(grads.b_ih),
      .grad_b_hh = data_or_null(grads.b_hh),
      .grad_w_hr = data_or_null(grads.w_hr),
      .grad_parameters = data_or_null(grads.parameters),
  };
}

void finish_grads(const LayerInputs& in, LayerGrads& grads) {
  const auto storage = in.dtype();
  for (at::Tensor* grad :
       {&grads.w_ih, &grads.w_hh, &grads.b_ih, &grads.b_hh, &grads.w_hr, &grads.parameters})
    if (grad->defined()) *grad = grad->to(storage);
  for (at::Tensor* grad : {&grads.x, &grads.h0, &grads.c0, &grads.w_ih, &grads.w_hh, &grads.b_ih,
                           &grads.b_hh, &grads.w_hr, &grads.parameters})
    if (!grad->defined()) *grad = at::empty({0}, in.h0.options());
}

}  // namespace rnnfast
