#include "torch/layer.h"

#include <string>

#include "cells/all.h"
#include "torch/memory.h"

namespace rnnfast {
namespace {

// in the order of CellKind
constexpr CellInfo kTable[kCells] = {
#define RNNFAST_ROW(Cell) \
  {Cell::kName, CellKind::k##Cell, Cell::kGates, Cell::kSaved, Cell::kHasCell},
    RNNFAST_FOR_EACH_CELL(RNNFAST_ROW)
#undef RNNFAST_ROW
};

struct Checker {
  const CellInfo& cell;
  const at::Tensor& x;  // what decides on dtype and device

  void check(const at::Tensor& t, const char* name, at::IntArrayRef shape) const {
    TORCH_CHECK(t.sizes() == shape, "rnnfast::", cell.name, ": expected ", name, " of shape ",
                shape, ", got ", t.sizes());
    TORCH_CHECK(t.scalar_type() == x.scalar_type(), "rnnfast::", cell.name, ": expected ", name,
                " to have x's dtype ", x.scalar_type(), ", got ", t.scalar_type());
    TORCH_CHECK(t.device() == x.device(), "rnnfast::", cell.name, ": expected ", name,
                " on x's device ", x.device(), ", got ", t.device());
  }
  at::Tensor operator()(const at::Tensor& t, const char* name, at::IntArrayRef shape) const {
    check(t, name, shape);
    return t.contiguous();
  }
  at::Tensor operator()(const std::optional<at::Tensor>& t, const char* name,
                        at::IntArrayRef shape) const {
    return t.has_value() && t->defined() ? (*this)(*t, name, shape) : at::Tensor();
  }
};

at::Tensor check_lengths(const CellInfo& cell, const at::Tensor& x, const at::Tensor& lengths,
                         int64_t B) {
  TORCH_CHECK(lengths.scalar_type() == at::kLong && lengths.device().is_cpu() &&
                  lengths.sizes() == at::IntArrayRef({B}),
              "rnnfast::", cell.name, ": expected lengths of shape ", at::IntArrayRef({B}),
              ", int64 and on the CPU, got ", lengths.sizes(), " of ", lengths.scalar_type());
  at::Tensor result = lengths.contiguous();
  TORCH_CHECK(lengths_fit(x, result), "rnnfast::", cell.name,
              x.dim() == 3
                  ? ": expected lengths from 0 to T = "
                  : ": expected lengths of packed x to fall, to be at least 1 and to sum to ",
              x.size(0));
  return result;
}

void check_tokens(const CellInfo& cell, const LayerInputs& in) {
  if (in.x.numel() == 0) return;
  const auto [low, high] = at::aminmax(in.x);
  const int64_t least = low.item<int64_t>(), most = high.item<int64_t>(), V = in.w_ih.size(0);
  TORCH_CHECK_INDEX(least >= 0 && most < V, "rnnfast::", cell.name,
                    ": index out of range: expected tokens from 0 to ", V - 1, ", got ",
                    least < 0 ? least : most);
}

void* data_or_null(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

}  // namespace

bool lengths_fit(const at::Tensor& x, const at::Tensor& lengths) {
  const bool packed = x.dim() == 2;
  const std::span<const int64_t> values(lengths.const_data_ptr<int64_t>(), size_t(lengths.size(0)));
  int64_t rows = 0, most = x.size(0);
  for (const int64_t value : values) {
    if (value < (packed ? 1 : 0) || value > most) return false;
    if (!packed) continue;
    most = value;  // of those that follow
    rows += value;
    if (rows > x.size(0)) return false;
  }
  return !packed || (rows == x.size(0) && rows > 0);
}

at::Tensor last_stride_one(const at::Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

const CellInfo& cell_info(CellKind kind) { return kTable[int(kind)]; }

const CellInfo& cell_info(const std::string& name) {
  for (const CellInfo& one : kTable)
    if (name == one.name) return one;
  std::string names;
  for (const CellInfo& one : kTable) names += std::string(names.empty() ? "" : ", ") + one.name;
  TORCH_CHECK_VALUE(false, "rnnfast: no cell is called '", name, "'; there are ", names);
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

LayerInputs check_inputs(const CellInfo& cell, const at::Tensor& x, const at::Tensor& h0,
                         const at::Tensor& c0, const at::Tensor& w_ih, const at::Tensor& w_hh,
                         const std::optional<at::Tensor>& b_ih,
                         const std::optional<at::Tensor>& b_hh,
                         const std::optional<at::Tensor>& w_hr, bool reverse,
                         const std::optional<at::Tensor>& lengths,
                         const std::optional<at::Tensor>& reset) {
  const bool packed = x.dim() == 2 && lengths.has_value();
  TORCH_CHECK(x.dim() == 3 || packed, "rnnfast::", cell.name,
              ": expected x of shape (T, B, I), or packed (N, I) with lengths, got ", x.sizes());
  TORCH_CHECK(h0.dim() == 2, "rnnfast::", cell.name, ": expected h0 of shape (B, H), got ",
              h0.sizes());
  const bool projects = w_hr.has_value();
  TORCH_CHECK(!projects || w_hr->dim() == 2, "rnnfast::", cell.name,
              ": expected w_hr of shape (P, H), got ", w_hr->sizes());
  const bool tokens = x.scalar_type() == at::kLong;
  TORCH_CHECK(!tokens || (x.size(-1) == 1 && w_ih.dim() == 2), "rnnfast::", cell.name,
              ": expected tokens of shape (T, B, 1) and w_ih of shape (V, G*H), got ", x.sizes(),
              " and ", w_ih.sizes());
  TORCH_CHECK(!tokens || x.device() == h0.device(), "rnnfast::", cell.name,
              ": expected h0 on x's device ", x.device(), ", got ", h0.device());
  dtype_of(tokens ? h0 : x);
  const int64_t B = packed ? h0.size(0) : x.size(1), I = x.size(-1), P = h0.size(1),
                H = projects ? w_hr->size(1) : P, rows = cell.gates * H;
  const Checker check{cell, tokens ? h0 : x};
  LayerInputs in;
  if (lengths.has_value()) in.lengths = check_lengths(cell, x, *lengths, B);
  if (reset.has_value()) {
    const at::IntArrayRef shape = x.sizes().slice(0, 2);
    TORCH_CHECK(!packed && reset->scalar_type() == at::kBool && reset->sizes() == shape &&
                    reset->device() == x.device(),
                "rnnfast::", cell.name, ": expected reset of shape (T, B) ", shape,
                ", bool and on x's device, got ", reset->sizes(), " of ", reset->scalar_type());
    in.reset = reset->contiguous();
  }
  in.x = last_stride_one(x);
  in.h0 = check(h0, "h0", {B, P});
  if (cell.has_cell) in.c0 = check(c0, "c0", {B, H});
  in.w_ih = tokens ? check(w_ih, "w_ih", {w_ih.size(0), rows}) : check(w_ih, "w_ih", {rows, I});
  in.w_hh = check(w_hh, "w_hh", {rows, P});
  in.b_ih = check(b_ih, "b_ih", {rows});
  in.b_hh = check(b_hh, "b_hh", {rows});
  in.w_hr = check(w_hr, "w_hr", {P, H});
  TORCH_CHECK(in.b_ih.defined() == in.b_hh.defined(), "rnnfast::", cell.name,
              ": expected both b_ih and b_hh, or neither");
  in.reverse = reverse;
  if (tokens) check_tokens(cell, in);
  return in;
}

LayerOutputs check_saved(const CellInfo& cell, const LayerInputs& in, const at::Tensor& y,
                         const at::Tensor& gates, const at::Tensor& cells) {
  const auto [T, B, I, H] = in.sizes();
  const Checker check{cell, in.h0};
  LayerOutputs out;
  out.y = check(y, "y", in.shape(in.h0.size(-1)));
  const bool saved = gates.sizes() != at::IntArrayRef({0});
  out.gates = saved ? check(gates, "gates", in.shape(cell.saved * H)) : gates;
  if (cell.has_cell) {
    TORCH_CHECK(cells.sizes() == in.shape(H) && cells.device() == in.x.device() &&
                    cells.scalar_type() == compute_type(in.dtype()),
                "rnnfast::", cell.name, ": expected the cells that the forward saved, got ",
                cells.sizes(), " of ", cells.scalar_type());
    out.cells = cells.contiguous();
  }
  return out;
}

LayerGradOutputs check_grad_outputs(const CellInfo& cell, const LayerInputs& in,
                                    const std::optional<at::Tensor>& y,
                                    const std::optional<at::Tensor>& h_n,
                                    const std::optional<at::Tensor>& c_n,
                                    const std::optional<at::Tensor>& cells) {
  const auto [T, B, I, H] = in.sizes();
  const Checker check{cell, in.h0};
  LayerGradOutputs grad_out;
  if (y.has_value() && y->defined()) {
    check.check(*y, "grad_y", in.shape(in.h0.size(-1)));
    grad_out.y = last_stride_one(*y);
  }
  grad_out.h_n = check(h_n, "grad_h_n", in.h0.sizes());
  grad_out.c_n = check(c_n, "grad_c_n", {B, H});
  if (cells.has_value() && cells->defined()) {
    TORCH_CHECK(cells->sizes() == in.shape(H) && cells->device() == in.x.device() &&
                    cells->scalar_type() == compute_type(in.dtype()),
                "rnnfast::", cell.name, ": expected grad_cells like the cells, got ",
                cells->sizes(), " of ", cells->scalar_type());
    grad_out.cells = cells->contiguous();
  }
  return grad_out;
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
  if (cell.has_cell) {
    out.c_n = at::empty({B, H}, options);
    out.cells = save_cells ? new_tensor(in.shape(H), compute) : at::empty({0}, compute);
  }
  return out;
}

LayerGrads allocate_grads(const CellInfo& cell, const LayerInputs& in, at::ArrayRef<bool> mask) {
  const size_t count = (cell.has_cell ? 7 : 6) + (in.w_hr.defined() ? 1 : 0);
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
  if (cell.has_cell) grads.c0 = allocate(in.c0, options);
  grads.w_ih = allocate(in.w_ih, compute);
  if (in.has_tokens() && grads.w_ih.defined()) grads.w_ih.zero_();
  grads.w_hh = allocate(in.w_hh, compute);
  grads.b_ih = allocate(in.b_ih, compute);
  grads.b_hh = allocate(in.b_hh, compute);
  if (in.w_hr.defined()) grads.w_hr = allocate(in.w_hr, compute);
  return grads;
}

void check_gates(const CellInfo& cell, const LayerOutputs& out, bool complete) {
  TORCH_CHECK(complete || cell.saved == 0 || out.gates.numel() > 0, "rnnfast::", cell.name,
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
  };
}

void finish_grads(const LayerInputs& in, LayerGrads& grads) {
  const auto storage = in.dtype();
  for (at::Tensor* grad : {&grads.w_ih, &grads.w_hh, &grads.b_ih, &grads.b_hh, &grads.w_hr})
    if (grad->defined()) *grad = grad->to(storage);
  for (at::Tensor* grad : {&grads.x, &grads.h0, &grads.c0, &grads.w_ih, &grads.w_hh, &grads.b_ih,
                           &grads.b_hh, &grads.w_hr})
    if (!grad->defined()) *grad = at::empty({0}, in.h0.options());
}

}  // namespace rnnfast
