// rnnfast._C.Generation: samples from a language model in C++, without returning to Python for each
// token.
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <mutex>

#include "cpu/layer.h"
#include "torch/layer.h"
#include "torch/memory.h"

namespace rnnfast {

namespace py = pybind11;
using at::Tensor;

cpu::Machine this_machine();

// A generation: packs the weights once, keeps the states, and samples tokens on each `run`.
class Generation {
 public:
  // `weights` are w_ih, w_hh[, b_ih, b_hh] of each layer, where the first w_ih is a table (V, G*H);
  // or blocks of frozen weights (cpu/frozen.h), with the biases within. `states` are (L, B, H)
  // each.
  Generation(int kind, const std::vector<Tensor>& weights, bool biases,
             const std::vector<Tensor>& states, const Tensor& head_weight,
             const std::optional<Tensor>& head_bias, double temperature, int64_t top_k,
             double top_p)
      : engine_(complete_engine()), kind_(layer_kind(kind, weights, states)) {
    const CellInfo& cell = cell_info(CellKind(kind));
    const size_t per_layer = biases ? 4 : 2;
    TORCH_CHECK(!weights.empty() && weights.size() % per_layer == 0, "expected ", per_layer,
                " tensors per layer, got ", weights.size(), " in total");
    TORCH_CHECK(!(biases && kind_.frozen), "expected no biases beside packed weights");
    TORCH_CHECK(states[0].dim() == 3 && head_weight.dim() == 2,
                "expected states (L, B, H) and a head (V, H), got ", states[0].sizes(), " and ",
                head_weight.sizes());
    const int64_t layers = int64_t(weights.size() / per_layer), B = states[0].size(1),
                  H = states[0].size(2), V = head_weight.size(0), rows = cell.gates * H;
    TORCH_CHECK(B > 0 && H > 0 && V > 0, "expected positive sizes");
    dtype_ = states[0].scalar_type();
    for (size_t i = 0; i < size_t(layers); ++i) {
      cpu::GenerateArgs::Layer layer{};
      const Tensor* own = &weights[i * per_layer];
      if (kind_.frozen) {
        const at::ScalarType type = frozen_format(own[1]).type;
        layer.w_ih = keep_block(
            own[0], i == 0 ? FrozenFormat{cell.gates, H, V, frozen_format(own[0]).type, true}
                           : FrozenFormat{cell.gates, H, H, type});
        layer.w_hh = keep_block(own[1], {cell.gates, H, H, type});
      } else {
        layer.w_ih = keep(own[0], i == 0 ? at::IntArrayRef{V, rows} : at::IntArrayRef{rows, H});
        layer.w_hh = keep(own[1], {rows, H});
      }
      if (biases) layer.b_ih = keep(own[2], {rows}), layer.b_hh = keep(own[3], {rows});
      layers_.push_back(layer);
    }
    job_.args = {
        .layers = layers,
        .B = B,
        .H = H,
        .V = V,
        .layer = layers_.data(),
        .head_weight = keep(head_weight, {V, H}),
        .head_bias = head_bias ? keep(*head_bias, {V}) : nullptr,
        .h0 = keep(states[0], {layers, B, H}),
        .c0 = cell.has_c() ? keep(states.at(1), {layers, B, H}) : nullptr,
        .sampling = {temperature, top_k, top_p},
    };
    const int64_t many = 1000;  // the number of steps is not known yet: plan a long sequence
    job_.plan = engine_.plan_forward(kind_, {many, B, H, H}, this_machine(), many);
    job_.samplers.resize(size_t(job_.plan.threads));
    const size_t bytes = engine_.generate_workspace(kind_, job_.args, job_.plan);
    workspace_ = new_on_cpu({int64_t(bytes)}, at::kByte);
    job_.workspace = workspace_.data_ptr();
    const py::gil_scoped_release release;
    engine_.start_generating(kind_, job_);
  }

  // Takes the last tokens (B) and random numbers from [0, 1), float64 (N, B); returns the next N
  // tokens of each sequence (N, B).
  Tensor run(const Tensor& tokens, const Tensor& uniforms) {
    const auto& [layers, B, H, V, layer, head_weight, head_bias, h0, c0, sampling] = job_.args;
    TORCH_CHECK(uniforms.dim() == 2 && uniforms.size(1) == B &&
                    uniforms.scalar_type() == at::kDouble && uniforms.device().is_cpu(),
                "expected uniforms of shape (N, ", B, "), float64 and on the CPU, got ",
                uniforms.sizes(), " of ", uniforms.scalar_type());
    const py::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    TORCH_CHECK_VALUE(!failed_, "an earlier run of this generation has failed");
    TORCH_CHECK(tokens.sizes() == at::IntArrayRef({B}) && tokens.scalar_type() == at::kLong &&
                    tokens.device().is_cpu(),
                "expected tokens of shape (", B, "), int64 and on the CPU, got ", tokens.sizes(),
                " of ", tokens.scalar_type());
    TORCH_CHECK_INDEX(tokens.ge(0).logical_and(tokens.lt(V)).all().item<bool>(),
                      "index out of range: expected tokens from 0 to ", V - 1);
    const Tensor numbers = uniforms.contiguous();
    Tensor all = at::empty({uniforms.size(0) + 1, B}, tokens.options());
    all[0].copy_(tokens);
    job_.steps.count = uniforms.size(0);
    job_.steps.uniforms = numbers.const_data_ptr<double>();
    job_.steps.tokens = all.data_ptr<int64_t>();
    failed_ = true;  // if generate throws, the states may be those of half a step
    engine_.generate(kind_, job_);
    failed_ = false;
    job_.steps.done += job_.steps.count;
    const Tensor result = all.slice(0, 1);
    for (int64_t i = B; i < all.numel(); ++i) failed_ = failed_ || all.data_ptr<int64_t>()[i] < 0;
    TORCH_CHECK_VALUE(!failed_, "the model's scores are not finite");
    return result;
  }

 private:
  static const cpu::Engine& complete_engine() {
    TORCH_CHECK(cpu::engine().is_complete(), "rnnfast: the kernels in use cannot generate");
    return cpu::engine();
  }
  static cpu::LayerKind layer_kind(int kind, const std::vector<Tensor>& weights,
                                   const std::vector<Tensor>& states) {
    TORCH_CHECK(0 <= kind && kind < kCellKinds, "rnnfast: there is no cell ", kind);
    return {CellKind(kind), dtype_of(states.at(0)), frozen_type(weights.at(1))};
  }

  const void* keep(const Tensor& t, at::IntArrayRef shape) {
    TORCH_CHECK(t.sizes() == shape && t.scalar_type() == dtype_ && t.device().is_cpu(),
                "expected a tensor of shape ", shape, ", ", dtype_, " and on the CPU, got ",
                t.sizes(), " of ", t.scalar_type(), " on ", t.device());
    check_memory("generation", "a tensor", t);
    kept_.push_back(t.detach().contiguous());
    return kept_.back().const_data_ptr();
  }
  const void* keep_block(const Tensor& t, const FrozenFormat& format) {
    TORCH_CHECK(dtype_ == at::kFloat, "expected float32 states with packed weights, got ", dtype_);
    check_block("generation", "weights", t, format);
    kept_.push_back(t);
    return t.const_data_ptr();
  }

  const cpu::Engine& engine_;
  const cpu::LayerKind kind_;
  at::ScalarType dtype_;
  std::vector<Tensor> kept_;
  std::vector<cpu::GenerateArgs::Layer> layers_;
  Tensor workspace_;
  cpu::GenerateJob job_;
  std::mutex mutex_;  // guards job_ and failed_ in `run`
  bool failed_ = false;
};

// Samples tokens (B) from scores (B, V) and random numbers (B) in [0, 1), as `Generation` does.
Tensor sample(const Tensor& scores, const Tensor& uniforms, double temperature, int64_t top_k,
              double top_p) {
  TORCH_CHECK(scores.device().is_cpu() && scores.dim() == 2 && scores.size(1) > 0 &&
                  uniforms.numel() == scores.size(0),
              "expected scores (B, V) and uniforms (B), got ", scores.sizes(), " and ",
              uniforms.sizes());
  const Tensor from = scores.to(at::kDouble).contiguous(),
               numbers = uniforms.to(at::kDouble).contiguous();
  Tensor tokens = at::empty({scores.size(0)}, at::kLong);
  cpu::Sampler sampler;
  for (int64_t b = 0; b < scores.size(0); ++b) {
    const int64_t token = sampler(cpu::Sampling{temperature, top_k, top_p},
                                  from.const_data_ptr<double>() + b * scores.size(1),
                                  scores.size(1), numbers.const_data_ptr<double>()[b]);
    TORCH_CHECK_VALUE(token >= 0, "the model's scores are not finite");
    tokens.data_ptr<int64_t>()[b] = token;
  }
  return tokens;
}

void bind_generation(py::module_& m) {
  py::class_<Generation>(m, "Generation")
      .def(py::init<int, const std::vector<Tensor>&, bool, const std::vector<Tensor>&,
                    const Tensor&, const std::optional<Tensor>&, double, int64_t, double>(),
           py::arg("kind"), py::arg("weights"), py::arg("biases"), py::arg("states"),
           py::arg("head_weight"), py::arg("head_bias"), py::arg("temperature"), py::arg("top_k"),
           py::arg("top_p"))
      .def("run", &Generation::run, py::arg("tokens"), py::arg("uniforms"));
  m.def("sample", &sample, py::arg("scores"), py::arg("uniforms"), py::arg("temperature"),
        py::arg("top_k"), py::arg("top_p"));
}

}  // namespace rnnfast
