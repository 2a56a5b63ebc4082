// Whole calls of a module on the CPU: the same kernels, without a trip through Python and the
// dispatcher for every tensor on the way. For a single step of a small layer that is most of the
// time.
//
// Only plain calls are taken: anything unusual (wrong shapes, other devices, tensor subclasses,
// modes, autocast) is declined by returning None, for the general path to serve or refuse.
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/extension.h>

#include <cstring>

#include "torch/layer.h"

namespace rnnfast {
namespace {

namespace py = pybind11;
using at::Tensor;

at::Tensor empty(at::IntArrayRef shape, const Tensor& like) {
  return at::detail::empty_cpu(shape, like.scalar_type());
}

Tensor zeros(at::IntArrayRef shape, const Tensor& like) {
  Tensor result = empty(shape, like);
  std::memset(result.data_ptr(), 0, result.nbytes());
  return result;
}

// A CPU tensor without a subclass or a lazy operation on it.
bool is_plain(const Tensor& t) {
  static const uint64_t ordinary = [] {
    const c10::InferenceMode off(false);
    return at::empty({0}, at::TensorOptions().dtype(at::kFloat)).key_set().raw_repr();
  }();
  return (t.key_set().raw_repr() & ~ordinary) == 0 && t.device().is_cpu();
}

bool is_plain_context() {
  return !c10::impl::dispatch_mode_enabled() && !at::impl::torch_function_mode_enabled() &&
         !at::autocast::is_autocast_enabled(at::kCPU);
}

// Takes a tensor out of a Python object; false if it is no tensor or parameter, but a subclass of
// them say, or not a plain one.
bool unpack(py::handle object, Tensor& tensor) {
  if (!THPVariable_CheckExact(object.ptr())) return false;
  tensor = THPVariable_Unpack(object.ptr());
  return is_plain(tensor);
}

struct Call {
  const CellInfo& cell;
  Tensor x;                     // (T, B, I)
  std::vector<Tensor> states;   // (L*D, B, H) each
  std::vector<Tensor> weights;  // per layer and direction: w_ih, w_hh[, b_ih, b_hh]
  int64_t layers, directions;
  bool biases;
  double dropout;  // between layers; 0 when not training

  int64_t hidden() const { return weights[1].size(1); }
  size_t per_layer() const { return biases ? 4 : 2; }
};

bool needs_grad(const Call& call) {
  if (!at::GradMode::is_enabled()) return false;
  bool needed = call.x.requires_grad();
  for (const Tensor& t : call.states) needed = needed || t.requires_grad();
  for (const Tensor& t : call.weights) needed = needed || t.requires_grad();
  return needed;
}

bool fits(const Call& call) {
  const Tensor& x = call.x;
  const auto type = x.scalar_type();
  if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf)
    return false;
  if (x.size(0) == 0 || x.size(1) == 0) return false;
  const size_t count = size_t(call.layers * call.directions);
  if (call.weights.size() != count * call.per_layer() || call.weights[1].dim() != 2) return false;
  const int64_t H = call.hidden(), rows = call.cell.gates * H;
  for (const Tensor& state : call.states)
    if (state.scalar_type() != type ||
        state.sizes() != at::IntArrayRef({int64_t(count), x.size(1), H}))
      return false;
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const Tensor& w = call.weights[i];
    const size_t layer = i / call.per_layer() / size_t(call.directions),
                 kind = i % call.per_layer();
    const int64_t columns = kind == 1 ? H : layer == 0 ? x.size(2) : call.directions * H;
    const bool shaped = kind < 2 ? w.sizes() == at::IntArrayRef({rows, columns})
                                 : w.sizes() == at::IntArrayRef({rows});
    if (!shaped || w.scalar_type() != type || !w.is_contiguous()) return false;
  }
  return true;
}

Tensor with_last_stride_one(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

LayerOutputs run_layer(const CellInfo& cell, const LayerInputs& in, bool save) {
  const auto [T, B, I, H] = in.sizes();
  LayerOutputs out;
  out.y = empty({T, B, H}, in.x);
  out.h_n = empty({B, H}, in.x);
  if (cell.has_cell) out.c_n = empty({B, H}, in.x);
  if (save) {
    out.gates = empty({T, B, cell.saved * H}, in.x);
    if (cell.has_cell)
      out.cells = at::detail::empty_cpu({T, B, H}, compute_type(in.x.scalar_type()));
  }
  CpuDevice::forward(cell, in, out, save);
  return out;
}

// Python's differentiable backward (rnnfast.autograd), for derivatives of derivatives and batched
// gradients: (cell, reverse, mask, grads, tensors and what was saved) -> gradients.
py::object& python_backward() {
  static py::object* function = new py::object();  // outlives the interpreter
  return *function;
}

// rnnfast.autograd's Function, for calls that take the short way.
class LayerFunction : public torch::autograd::Function<LayerFunction> {
  using List = torch::autograd::variable_list;
  static constexpr size_t kInputs = 7;  // x, h0, c0, w_ih, w_hh, b_ih, b_hh

 public:
  static List forward(torch::autograd::AutogradContext* context, int64_t kind, bool reverse,
                      const Tensor& x, const Tensor& h0, const std::optional<Tensor>& c0,
                      const Tensor& w_ih, const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                      const std::optional<Tensor>& b_hh) {
    const CellInfo& cell = cell_info(CellKind(kind));
    const LayerInputs in{
        with_last_stride_one(x), h0,     c0.value_or(Tensor()), w_ih, w_hh, b_ih.value_or(Tensor()),
        b_hh.value_or(Tensor()), reverse};
    const LayerOutputs out = run_layer(cell, in, true);
    context->saved_data["kind"] = kind;
    context->saved_data["reverse"] = reverse;
    context->set_materialize_grads(false);
    context->save_for_backward(
        {x, h0, in.c0, w_ih, w_hh, in.b_ih, in.b_hh, out.y, out.gates, out.cells});
    List results{out.y, out.h_n};
    if (cell.has_cell) results.push_back(out.c_n);
    return results;
  }

  static List backward(torch::autograd::AutogradContext* context, const List& grads) {
    const CellInfo& cell = cell_info(CellKind(context->saved_data["kind"].toInt()));
    const bool reverse = context->saved_data["reverse"].toBool();
    const List saved = context->get_saved_variables();
    bool wanted[kInputs], any = false, plain = !at::GradMode::is_enabled();
    for (size_t i = 0, edge = 0; i < kInputs; ++i)  // absent inputs have no edge in the graph
      wanted[i] = saved[i].defined() && context->needs_input_grad(edge++);
    for (const Tensor& grad : grads) {
      any = any || grad.defined();
      plain = plain && (!grad.defined() || is_plain(grad));
    }
    List results(2);  // kind and reverse have none
    if (any) {
      const List found = plain ? run_kernel(cell, reverse, wanted, grads, saved)
                               : run_python(cell, reverse, wanted, grads, saved);
      results.insert(results.end(), found.begin(), found.end());
    }
    results.resize(2 + kInputs);
    return results;
  }

 private:
  static List run_kernel(const CellInfo& cell, bool reverse, const bool* wanted, const List& grads,
                         const List& saved) {
    const LayerInputs in{with_last_stride_one(saved[0]),
                         saved[1],
                         saved[2],
                         saved[3],
                         saved[4],
                         saved[5],
                         saved[6],
                         reverse};
    LayerOutputs out;
    out.y = saved[7];
    out.gates = saved[8];
    out.cells = saved[9];
    LayerGradOutputs grad_out;
    if (grads[0].defined()) grad_out.y = with_last_stride_one(grads[0]);
    if (grads[1].defined()) grad_out.h_n = grads[1].contiguous();
    if (cell.has_cell && grads[2].defined()) grad_out.c_n = grads[2].contiguous();
    const auto type = in.x.scalar_type();
    const auto allocate = [&](size_t i, at::ScalarType as) {
      return wanted[i] ? at::detail::empty_cpu(saved[i].sizes(), as) : Tensor();
    };
    LayerGrads d{
        .x = allocate(0, type),
        .h0 = allocate(1, type),
        .c0 = allocate(2, type),
        .w_ih = allocate(3, compute_type(type)),
        .w_hh = allocate(4, compute_type(type)),
        .b_ih = allocate(5, compute_type(type)),
        .b_hh = allocate(6, compute_type(type)),
    };
    CpuDevice::backward(cell, grad_out, in, out, d);
    List found{d.x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh};
    for (Tensor& grad : found)
      if (grad.defined() && grad.scalar_type() != type) grad = grad.to(type);
    return found;
  }

  // The arguments of Python's backward have no c0, cells or its gradient where the cell has no c.
  static List run_python(const CellInfo& cell, bool reverse, const bool* wanted, const List& grads,
                         const List& saved) {
    const py::gil_scoped_acquire acquire;
    const auto has = [&](size_t i) { return cell.has_cell || (i != 2 && i != 9); };
    py::list mask, grad_list, tensors;
    for (size_t i = 0; i < kInputs; ++i)
      if (has(i)) mask.append(wanted[i]);
    for (const Tensor& grad : grads) grad_list.append(grad);
    for (size_t i = 0; i < saved.size(); ++i)
      if (has(i)) tensors.append(saved[i]);
    const py::sequence found = python_backward()(cell.name, reverse, mask, grad_list, tensors);
    List results(kInputs);
    for (size_t i = 0, next = 0; i < kInputs; ++i) {
      if (!has(i)) continue;
      const py::object grad = found[next++];
      if (!grad.is_none()) results[i] = grad.cast<Tensor>();
    }
    return results;
  }
};

// Runs layers and directions; `finals` become the final states (L*D, B, H) each.
Tensor run(const Call& call, std::vector<Tensor>& finals) {
  RECORD_FUNCTION(call.cell.name, std::vector<c10::IValue>());
  const bool record = needs_grad(call);
  const int64_t B = call.x.size(1), H = call.hidden(), count = call.layers * call.directions;
  const Tensor initial = call.states.empty() ? zeros({B, H}, call.x) : Tensor();
  const auto state = [&](size_t k, int64_t i) {
    if (call.states.empty()) return initial;
    return call.states[k].select(0, i).contiguous();
  };
  std::vector<Tensor> h_n, c_n;
  Tensor x = call.x;
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    if (layer > 0 && call.dropout > 0) x = at::dropout(x, call.dropout, true);
    std::vector<Tensor> outputs;
    for (int64_t direction = 0; direction < call.directions; ++direction) {
      const int64_t i = layer * call.directions + direction;
      const Tensor* w = &call.weights[size_t(i) * call.per_layer()];
      const Tensor b_ih = call.biases ? w[2] : Tensor(), b_hh = call.biases ? w[3] : Tensor();
      const Tensor h0 = state(0, i), c0 = call.cell.has_cell ? state(1, i) : Tensor();
      const bool reverse = direction == 1;
      LayerOutputs out;
      if (record) {
        const auto optional = [](const Tensor& t) {
          return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
        };
        const auto results =
            LayerFunction::apply(int64_t(call.cell.kind), reverse, x, h0, optional(c0), w[0], w[1],
                                 optional(b_ih), optional(b_hh));
        out.y = results[0];
        out.h_n = results[1];
        if (call.cell.has_cell) out.c_n = results[2];
      } else {
        const LayerInputs in{with_last_stride_one(x), h0, c0, w[0], w[1], b_ih, b_hh, reverse};
        out = run_layer(call.cell, in, false);
      }
      outputs.push_back(out.y);
      h_n.push_back(out.h_n);
      c_n.push_back(out.c_n);
    }
    x = call.directions == 1 ? outputs[0] : at::cat(outputs, 2);
  }
  const auto join = [&](const std::vector<Tensor>& states) {
    return count == 1 ? states[0].unsqueeze(0) : at::stack(states);
  };
  finals.push_back(join(h_n));
  if (call.cell.has_cell) finals.push_back(join(c_n));
  return x;
}

// Collects and checks the tensors of a call; false to decline it. x is (T, B, I) already.
bool collect(Call& call, py::handle hx, const py::list& weights) {
  if (!hx.is_none()) {
    const size_t states = call.cell.has_cell ? 2 : 1;
    call.states.resize(states);
    if (states == 1) {
      if (!unpack(hx, call.states[0])) return false;
    } else {
      if (!PyTuple_CheckExact(hx.ptr()) || PyTuple_GET_SIZE(hx.ptr()) != 2) return false;
      for (size_t k = 0; k < states; ++k)
        if (!unpack(PyTuple_GET_ITEM(hx.ptr(), Py_ssize_t(k)), call.states[k])) return false;
    }
  }
  call.weights.resize(weights.size());
  for (size_t i = 0; i < weights.size(); ++i)
    if (!unpack(PyList_GET_ITEM(weights.ptr(), Py_ssize_t(i)), call.weights[i])) return false;
  return true;
}

py::object pack(const Tensor& first, const std::vector<Tensor>& states) {
  if (states.size() == 1) return py::make_tuple(first, states[0]);
  return py::make_tuple(first, py::make_tuple(states[0], states[1]));
}

}  // namespace

void set_python_backward(py::object function) { python_backward() = std::move(function); }

// (output, states) of a stack of layers, shaped as torch.nn's, or None.
py::object run_layers(int cell, py::handle input, py::handle hx, const py::list& weights,
                      int64_t layers, bool biases, double dropout, bool batch_first,
                      bool bidirectional) {
  Tensor x;
  if (!is_plain_context() || !unpack(input, x) || x.dim() != 3) return py::none();
  Call call{
      .cell = cell_info(CellKind(cell)),
      .x = batch_first ? x.transpose(0, 1) : x,
      .states = {},
      .weights = {},
      .layers = layers,
      .directions = bidirectional ? 2 : 1,
      .biases = biases,
      .dropout = dropout,
  };
  if (!collect(call, hx, weights) || !fits(call)) return py::none();
  std::vector<Tensor> finals;
  Tensor y;
  {
    const py::gil_scoped_release release;
    y = run(call, finals);
    if (batch_first) y = y.transpose(0, 1);
  }
  return pack(y, finals);
}

// The next state or states (B, H) of one step, or None.
py::object run_step(int cell, py::handle input, py::handle hx, const py::list& weights,
                    bool biases) {
  Tensor x;
  if (!is_plain_context() || !unpack(input, x) || x.dim() != 2) return py::none();
  Call call{
      .cell = cell_info(CellKind(cell)),
      .x = x.unsqueeze(0),
      .states = {},
      .weights = {},
      .layers = 1,
      .directions = 1,
      .biases = biases,
      .dropout = 0,
  };
  if (!collect(call, hx, weights)) return py::none();
  for (Tensor& state : call.states) {
    if (state.dim() != 2) return py::none();
    state = state.unsqueeze(0);
  }
  if (!fits(call)) return py::none();
  std::vector<Tensor> finals;
  {
    const py::gil_scoped_release release;
    run(call, finals);
    for (Tensor& state : finals) state = state.squeeze(0);
  }
  if (finals.size() == 1) return py::cast(finals[0]);
  return py::make_tuple(finals[0], finals[1]);
}

}  // namespace rnnfast
