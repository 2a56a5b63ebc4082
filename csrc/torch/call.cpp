// The short path: runs a whole call of a module on the CPU in C++. The kernels are the same as on
// the general path, but Python and the dispatcher are avoided, which take most of the time of a
// single step of a small layer.
//
// Only plain calls run here. For anything else (wrong shapes, other devices, tensor subclasses,
// modes, autocast) the functions return None, and the caller takes the general path in Python,
// which runs the call or raises the error.
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

#include "cpu/frozen.h"
#include "torch/layer.h"
#include "torch/memory.h"
#include "torch/plain.h"
#include "torch/threads.h"
#include "torch/user_cells.h"

namespace rnnfast {
namespace {

namespace py = pybind11;
using at::Tensor;
using Tensors = c10::SmallVector<Tensor, 8>;  // allocates no memory for a layer

Tensor zeros(at::IntArrayRef shape, at::ScalarType type) {
  Tensor result = new_on_cpu(shape, type);
  std::memset(result.data_ptr(), 0, result.nbytes());
  return result;
}

// A call of a module: L layers, D directions.
struct Call {
  const CellInfo& cell;
  Tensor x;  // (T, B, I), or packed (N, I); I is 1 for tokens, which frozen layers read
  Tensors states;   // h (L*D, B, P) and c (L*D, B, C*H); (B, P) and (B, C*H) for a cell module
  // Per layer and direction: w_ih, w_hh[, b_ih, b_hh][, w_hr][, parameters]. Frozen ones have no
  // biases here.
  Tensors weights;
  bool step;  // a call of a cell module: states have no dimension of layers
  int64_t layers, directions;
  bool biases, projects;
  double dropout;  // between layers; 0 when not training
  bool recompute;  // do not save gates; the backward recomputes them
  Tensor lengths, reset;  // see LayerInputs; undefined if not given
  int64_t H = 0, P = 0;  // sizes of the states c and h, which are those of the weights

  bool packed() const { return x.dim() == 2; }
  bool has_tokens() const { return x.scalar_type() == at::kLong; }
  at::ScalarType type() const { return has_tokens() ? at::kFloat : x.scalar_type(); }
  int64_t batch() const { return packed() ? lengths.size(0) : x.size(1); }
  bool frozen() const { return weights[1].scalar_type() == at::kByte; }
  int64_t count() const { return layers * directions; }
  // Shape of a state of the call: k = 0 for h, k = 1 for c.
  c10::DimVector state_shape(size_t k) const {
    return step ? one_state_shape(k) : c10::DimVector{count(), batch(), state_size(k)};
  }
  // Shape of a state of one layer and direction. With a single one, the call's states are used
  // without a view, since making views would take longer than the step itself.
  c10::DimVector layer_state_shape(size_t k) const {
    return count() == 1 ? state_shape(k) : one_state_shape(k);
  }
  size_t per_layer() const { return size_t(2 + 2 * biases + projects + has_parameters()); }
  bool has_parameters() const { return cell.parameters > 0; }

 private:
  int64_t state_size(size_t k) const { return k == 0 ? P : cell.cells * H; }
  c10::DimVector one_state_shape(size_t k) const { return {batch(), state_size(k)}; }
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
  const auto type = call.type();
  if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf)
    return false;
  if (x.size(0) == 0 || call.batch() == 0) return false;
  const bool frozen = call.frozen(), tokens = call.has_tokens();
  if (frozen ? type != at::kFloat || call.cell.is_user_cell() : tokens) return false;
  if ((call.lengths.defined() || call.reset.defined() || call.projects || frozen) &&
      !CpuDevice::complete())
    return false;
  if (frozen && needs_grad(call)) return false;
  const int64_t H = call.H, P = call.P, rows = call.cell.gates * H;
  if (!call.projects && P != H) return false;
  if (call.cell.is_user_cell() && !prepare_kernels(call.cell, dtype_of(x)).empty()) return false;
  if (!has_memory(x)) return false;
  if (call.lengths.defined() && !lengths_fit(x, call.lengths)) return false;
  for (size_t k = 0; k < call.states.size(); ++k) {
    const Tensor& state = call.states[k];
    if (state.scalar_type() != type || state.sizes() != call.state_shape(k) || !has_memory(state))
      return false;
  }
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const Tensor& w = call.weights[i];
    const size_t layer = i / call.per_layer() / size_t(call.directions),
                 kind = i % call.per_layer();
    const int64_t columns = kind == 1    ? (call.cell.recurrent ? P : 0)
                            : layer == 0 ? x.size(-1)
                                         : call.directions * P;
    const bool last = kind == call.per_layer() - 1;
    const bool projection = call.projects && last, parameters = call.has_parameters() && last;
    if (!w.is_contiguous() || !has_memory(w)) return false;
    if (frozen) {
      const bool good = kind == 0 && layer == 0 && tokens
                            ? is_frozen_table(w, call.cell.gates, H, x)
                            : is_frozen(w, call.weights[1], projection ? 1 : call.cell.gates,
                                        projection ? P : H, projection ? H : columns);
      if (!good) return false;
      continue;
    }
    const bool shaped = parameters   ? w.sizes() == at::IntArrayRef({call.cell.parameters, H})
                        : projection ? w.sizes() == at::IntArrayRef({P, H})
                        : kind < 2   ? w.sizes() == at::IntArrayRef({rows, columns})
                                     : w.sizes() == at::IntArrayRef({rows});
    if (!shaped || w.scalar_type() != type) return false;
  }
  return true;
}

LayerOutputs allocate(const Call& call, const LayerInputs& in, bool save) {
  const CellInfo& cell = call.cell;
  const int64_t hidden = call.H;
  const auto type = call.type();
  LayerOutputs out;
  out.y = new_on_cpu(in.shape(call.P), type);
  out.h_n = new_on_cpu(call.layer_state_shape(0), type);
  if (cell.has_c()) out.c_n = new_on_cpu(call.layer_state_shape(1), type);
  if (save)
    out.gates = call.recompute && cell.recomputes && CpuDevice::complete()
                    ? new_on_cpu({0}, type)
                    : new_on_cpu(in.shape(cell.saved * hidden), type);
  if (save && cell.has_c())
    out.cells = new_on_cpu(in.shape(cell.cells * hidden), compute_type(type));
  return out;
}

// The autograd node of calls that run here; autograd.cpp has that of the ops. A node
// is one layer with all of its directions, so that their backwards can run at the same time.
class LayerFunction : public torch::autograd::Function<LayerFunction> {
  using List = torch::autograd::variable_list;
  using In = LayerInputs;
  // x, which both directions share, and kOwn inputs of each direction have gradients.
  static constexpr size_t kInputs = kDifferentiable.size(), kOwn = kInputs - 1;

 public:
  // A layer whose forward has already run, to be put into the graph by `record`.
  struct Done {
    const CellInfo& cell;
    std::span<const LayerForward> directions;
  };

  // Adds a node to the autograd graph and makes the layer's outputs its results, without copies.
  static void record(const Done& done) {
    const auto optional = [](const Tensor& t) {
      return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
    };
    const auto input = [&](size_t direction, Tensor In::* member) {
      return direction < done.directions.size() ? optional(done.directions[direction].in.*member)
                                                : std::nullopt;
    };
    apply(done, done.directions[0].in.x, input(0, &In::h0), input(0, &In::c0), input(0, &In::w_ih),
          input(0, &In::w_hh), input(0, &In::b_ih), input(0, &In::b_hh), input(0, &In::w_hr),
          input(0, &In::parameters), input(1, &In::h0), input(1, &In::c0), input(1, &In::w_ih),
          input(1, &In::w_hh), input(1, &In::b_ih), input(1, &In::b_hh), input(1, &In::w_hr),
          input(1, &In::parameters));
  }

  template <class... Inputs>
  static List forward(torch::autograd::AutogradContext* context, const Done& done, const Tensor& x,
                      const Inputs&...) {
    List saved{x}, results;
    for (const auto& [in, out] : done.directions) {
      for (size_t i = 1; i < kInputs; ++i) saved.push_back(in.*kDifferentiable[i]);
      saved.insert(saved.end(), {in.lengths, in.reset, out.y, out.gates, out.cells});
      results.insert(results.end(), {out.y, out.h_n});
      if (done.cell.has_c()) results.push_back(out.c_n);
    }
    const LayerInputs& first = done.directions[0].in;
    context->saved_data["record"] = c10::IValue::make_capsule(
        c10::make_intrusive<Record>(done.cell, first.reverse, format_of(first)));
    context->set_materialize_grads(false);
    context->save_for_backward(std::move(saved));
    return results;
  }

  static List backward(torch::autograd::AutogradContext* context, const List& grads) {
    const auto record =
        c10::static_intrusive_pointer_cast<Record>(context->saved_data["record"].toCapsule());
    const CellInfo& cell = record->cell;
    const List saved = context->get_saved_variables();
    List results(1 + kInputs + kOwn);  // results[0] belongs to `done` and stays undefined
    bool any = false, plain = true;
    for (const Tensor& grad : grads) {
      any = any || grad.defined();
      plain = plain && (!grad.defined() || is_plain(grad));
    }
    if (!any) return results;
    // Saved-tensor hooks may have returned any kind of tensor.
    for (const Tensor& t : saved) plain = plain && (!t.defined() || is_plain(t));

    const size_t outputs = cell.has_c() ? 3 : 2;
    std::vector<Direction> directions(grads.size() / outputs);
    size_t edge = 1;  // undefined inputs have no edge in the graph
    auto next = saved.begin() + 1;
    for (size_t d = 0; d < directions.size(); ++d) {
      auto& [layer, wanted] = directions[d];
      LayerInputs& in = layer.in;
      in.x = saved[0], in.reverse = d == 0 ? record->reverse : true;
      for (size_t i = 1; i < kInputs; ++i) in.*kDifferentiable[i] = *next++;
      for (Tensor* t : {&in.lengths, &in.reset, &layer.out.y, &layer.out.gates, &layer.out.cells})
        *t = *next++;
      const Tensor* grad = &grads[d * outputs];
      layer.grad_out.y = grad[0], layer.grad_out.h_n = grad[1];
      if (cell.has_c()) layer.grad_out.c_n = grad[2];
      if (plain) {
        check_inputs(cell, record->format, in);
        check_saved(cell, record->format, layer.out);
        check_grad_outputs(cell, record->format, layer.grad_out);
      }
      wanted[0] = context->needs_input_grad(0);
      for (size_t i = 1; i < kInputs; ++i)
        wanted[i] = (in.*kDifferentiable[i]).defined() && context->needs_input_grad(edge++);
    }
    const auto found = plain && !at::GradMode::is_enabled() ? run_kernel(*record, directions)
                                                            : run_ops(cell, directions);
    for (size_t d = 0; d < found.size(); ++d) {
      const Tensor& d_x = found[d][0];
      if (d_x.defined()) results[1] = results[1].defined() ? results[1].add(d_x) : d_x;
      std::copy(found[d].begin() + 1, found[d].end(), results.begin() + 2 + d * kOwn);
    }
    return results;
  }

 private:
  // What the backward needs besides tensors.
  struct Record : torch::CustomClassHolder {
    Record(const CellInfo& c, bool r, LayerFormat f) : cell(c), reverse(r), format(std::move(f)) {}
    const CellInfo& cell;
    const bool reverse;  // of the first direction
    const LayerFormat format;
  };
  struct Direction {
    LayerBackward layer;
    Wanted wanted{};
  };

  static std::vector<List> run_kernel(const Record& record, std::vector<Direction>& directions) {
    const auto type = record.format.dtype;
    std::vector<LayerBackward> layers;
    for (auto& [layer, wanted] : directions) {
      const auto allocate = [&](size_t i, at::ScalarType as) {
        return wanted[i] ? new_on_cpu((layer.in.*kDifferentiable[i]).sizes(), as) : Tensor();
      };
      const auto parameters = compute_type(type);
      layer.grads = {allocate(0, type),       allocate(1, type),       allocate(2, type),
                     allocate(3, parameters), allocate(4, parameters), allocate(5, parameters),
                     allocate(6, parameters), allocate(7, parameters), allocate(8, parameters)};
      layers.push_back(std::move(layer));
    }
    CpuDevice::backward(record.cell, layers);
    std::vector<List> found;
    for (const LayerBackward& layer : layers) {
      const LayerGrads& d = layer.grads;
      found.push_back({d.x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr, d.parameters});
      for (Tensor& grad : found.back())
        if (grad.defined() && grad.scalar_type() != type) grad = grad.to(type);
    }
    return found;
  }

  // For derivatives of derivatives and batched gradients. States of the ops are (B, H).
  static std::vector<List> run_ops(const CellInfo& cell, std::vector<Direction>& directions) {
    const auto flatten = [](Tensor& t) {
      if (t.defined() && t.dim() == 3) t = t.squeeze(0);
    };
    std::vector<List> results;
    for (auto& [layer, wanted] : directions) {
      auto& [grad_out, in, out, _] = layer;
      const bool flat = in.h0.dim() == 2;
      for (Tensor* t : {&grad_out.h_n, &grad_out.c_n, &in.h0, &in.c0}) flatten(*t);
      List found = call_backward(cell, grad_out, in, out, wanted);
      for (const size_t state : {1, 2})
        if (!flat && found[state].defined()) found[state] = found[state].unsqueeze(0);
      results.push_back(std::move(found));
    }
    return results;
  }
};

// Runs all layers and directions. Returns the output, and appends the final states (L*D, B, H) to
// `finals`.
Tensor run(const Call& call, Tensors& finals) {
  RECORD_FUNCTION(call.cell.name, std::vector<c10::IValue>());
  const bool record = needs_grad(call);
  const int64_t count = call.count();
  const bool given = !call.states.empty();
  const Tensor no_h = given ? Tensor() : zeros(call.layer_state_shape(0), call.type());
  const Tensor no_c = given || !(call.projects || call.cell.cells > 1)
                          ? no_h
                          : zeros(call.layer_state_shape(1), call.type());
  const auto state = [&](size_t k, int64_t i) {
    if (!given) return k == 0 ? no_h : no_c;
    return (count == 1 ? call.states[k] : call.states[k].select(0, i)).contiguous();
  };
  Tensors h_n, c_n;
  Tensor x = last_stride_one(call.x);
  // The number of layers or directions that are passed to the kernels together: both directions of
  // a layer, or as many layers of a stack as there are threads. The limit saves memory, since the
  // outputs of all of them are allocated first.
  const bool stacked = call.directions == 1 && call.dropout == 0;
  const size_t together =
      size_t(stacked ? std::min<int64_t>(count, usable_threads()) : call.directions);
  for (size_t begin = 0; begin < size_t(count); begin += together) {
    if (begin > 0 && call.dropout > 0) x = at::dropout(x, call.dropout, true);
    std::vector<LayerForward> layers(std::min(together, size_t(count) - begin));
    for (size_t k = 0; k < layers.size(); ++k) {
      const size_t i = begin + k;
      const Tensor* w = &call.weights[i * call.per_layer()];
      auto& [in, out] = layers[k];
      in = {.x = stacked && k > 0 ? layers[k - 1].out.y : x,
            .h0 = state(0, int64_t(i)),
            .c0 = call.cell.has_c() ? state(1, int64_t(i)) : Tensor(),
            .w_ih = w[0],
            .w_hh = w[1],
            .b_ih = call.biases ? w[2] : Tensor(),
            .b_hh = call.biases ? w[3] : Tensor(),
            .reverse = !stacked && k == 1,
            .w_hr = call.projects ? w[call.per_layer() - 1] : Tensor(),
            .parameters = call.has_parameters() ? w[call.per_layer() - 1] : Tensor(),
            .lengths = call.lengths,
            .reset = call.reset};
      out = allocate(call, in, record);
    }
    CpuDevice::forward(call.cell, layers, stacked);
    if (record) {
      const size_t in_node = size_t(call.directions);
      for (size_t k = 0; k < layers.size(); k += in_node)
        LayerFunction::record({call.cell, std::span(layers).subspan(k, in_node)});
    }
    for (const LayerForward& layer : layers) {
      h_n.push_back(layer.out.h_n);
      c_n.push_back(layer.out.c_n);
    }
    x = call.directions == 1 ? layers.back().out.y
                             : at::cat({layers[0].out.y, layers[1].out.y}, -1);
  }
  const auto join = [&](const Tensors& states) {
    return count == 1 ? states[0] : at::stack(states);
  };
  finals.push_back(join(h_n));
  if (call.cell.has_c()) finals.push_back(join(c_n));
  return x;
}

// Fills in the states and weights of a call whose x is set. Returns false if one is not plain, and
// the call must take the general path.
bool collect(Call& call, py::handle hx, const py::list& weights) {
  if (!hx.is_none()) {
    const size_t states = call.cell.has_c() ? 2 : 1;
    call.states.resize(states);
    if (states == 1) {
      if (!unpack(hx, call.states[0])) return false;
    } else {
      const bool pair = PyTuple_CheckExact(hx.ptr()) || PyList_CheckExact(hx.ptr());
      if (!pair || PySequence_Fast_GET_SIZE(hx.ptr()) != 2) return false;
      for (size_t k = 0; k < states; ++k)
        if (!unpack(PySequence_Fast_GET_ITEM(hx.ptr(), Py_ssize_t(k)), call.states[k]))
          return false;
    }
  }
  call.weights.resize(weights.size());
  for (size_t i = 0; i < weights.size(); ++i)
    if (!unpack(PyList_GET_ITEM(weights.ptr(), Py_ssize_t(i)), call.weights[i])) return false;
  if (call.weights.size() != size_t(call.count()) * call.per_layer()) return false;
  const Tensor& w_hh = call.weights[1];
  if (call.frozen()) {
    if (!w_hh.is_contiguous() || !has_memory(w_hh)) return false;
    const cpu::FrozenHeader header = cpu::read_frozen(w_hh.const_data_ptr(), w_hh.nbytes());
    call.H = header.H, call.P = header.K;
  } else {
    if (w_hh.dim() != 2) return false;
    call.H = w_hh.size(0) / call.cell.gates, call.P = call.cell.recurrent ? w_hh.size(1) : call.H;
  }
  return true;
}

py::object pack(const Tensor& first, const Tensors& states) {
  if (states.size() == 1) return py::make_tuple(first, states[0]);
  return py::make_tuple(first, py::make_tuple(states[0], states[1]));
}

}  // namespace

// The index of the first tensor whose storage does not hold all of its elements, or -1. Only plain
// CPU tensors are checked.
int64_t find_freed(const std::vector<std::optional<Tensor>>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i] && tensors[i]->defined() && is_plain(*tensors[i]) && !has_memory(*tensors[i]))
      return int64_t(i);
  return -1;
}

// Runs a stack of layers. Returns (output, states), shaped as torch.nn's, or None for a call that
// must take the general path. Lengths and resets are None or already checked, see LayerInputs;
// `reset` is (T, B) even with batch_first.
py::object run_layers(int cell, py::handle input, py::handle hx, const py::list& weights,
                      int64_t layers, bool biases, int64_t proj_size, double dropout,
                      bool batch_first, bool bidirectional, bool recompute, py::handle lengths,
                      py::handle reset) {
  Tensor x, all_lengths, all_resets;
  if (!is_plain_context() || !unpack(input, x)) return py::none();
  if (!lengths.is_none() && !unpack(lengths, all_lengths)) return py::none();
  if (!reset.is_none() && !unpack(reset, all_resets)) return py::none();
  const bool packed = x.dim() == 2 && all_lengths.defined();
  if (x.dim() != 3 && !packed) return py::none();
  batch_first = batch_first && !packed;
  Call call{
      .cell = cell_info(CellKind(cell)),
      .x = batch_first ? x.transpose(0, 1) : x,
      .states = {},
      .weights = {},
      .step = false,
      .layers = layers,
      .directions = bidirectional ? 2 : 1,
      .biases = biases,
      .projects = proj_size > 0,
      .dropout = dropout,
      .recompute = recompute,
      .lengths = all_lengths.defined() ? all_lengths.contiguous() : Tensor(),
      .reset = all_resets.defined() ? all_resets.contiguous() : Tensor(),
  };
  if (!collect(call, hx, weights) || !fits(call)) return py::none();
  Tensors finals;
  Tensor y;
  {
    const py::gil_scoped_release release;
    y = run(call, finals);
    if (batch_first) y = y.transpose(0, 1);
  }
  return pack(y, finals);
}

// Runs one step of a cell module. Returns the next state or states (B, H), or None for a call that
// must take the general path.
py::object run_step(int cell, py::handle input, py::handle hx, const py::list& weights,
                    bool biases) {
  Tensor x;
  if (!is_plain_context() || !unpack(input, x) || x.dim() != 2 || !has_memory(x)) return py::none();
  Call call{
      .cell = cell_info(CellKind(cell)),
      .x = x.unsqueeze(0),
      .states = {},
      .weights = {},
      .step = true,
      .layers = 1,
      .directions = 1,
      .biases = biases,
      .projects = false,
      .dropout = 0,
      .recompute = false,
      .lengths = {},
      .reset = {},
  };
  if (!collect(call, hx, weights) || !fits(call)) return py::none();
  Tensors finals;
  {
    const py::gil_scoped_release release;
    run(call, finals);
  }
  if (finals.size() == 1) return py::cast(finals[0]);
  return py::make_tuple(finals[0], finals[1]);
}

}  // namespace rnnfast
