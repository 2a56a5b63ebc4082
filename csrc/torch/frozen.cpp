// Frozen weights as tensors: the ops that pack and unpack blocks (cpu/frozen.h), the op that runs a
// layer with them, and the one that makes a table of tokens of an embedding.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/frozen.h"
#include "cpu/layer.h"
#include "torch/layer.h"
#include "torch/memory.h"

namespace rnnfast {

cpu::Machine this_machine();

namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

constexpr at::ScalarType kTypes[cpu::kWeightTypes] = {at::kFloat, at::kBFloat16, at::kHalf,
                                                      at::kChar};

const cpu::MicroKernels& kernels_of(at::ScalarType dtype) {
  const cpu::MicroKernels* kernels =
      dtype == at::kFloat ? cpu::engine().kernels(Dtype::kFloat32) : nullptr;
  TORCH_CHECK(kernels, "rnnfast: frozen weights have no kernels for ", dtype,
              " with the CPU capability '", cpu::capability(), "'");
  return *kernels;
}

cpu::FrozenHeader read_header(const Tensor& block) {
  TORCH_CHECK(block.scalar_type() == at::kByte && block.dim() == 1 && block.is_contiguous() &&
                  block.device().is_cpu() && has_memory(block),
              "rnnfast: expected packed weights, contiguous bytes on the CPU, got ",
              block.scalar_type(), " of shape ", block.sizes());
  return cpu::read_frozen(block.const_data_ptr(), block.nbytes());
}

// The type of weights (G*H, K). int8 needs scales (G*H), the other types have none.
cpu::WeightType type_of(const Tensor& weight, Optional scale) {
  for (int i = 0; i < cpu::kWeightTypes; ++i)
    if (weight.scalar_type() == kTypes[i]) {
      TORCH_CHECK(scale.has_value() == (kTypes[i] == at::kChar),
                  "rnnfast: expected a scale with int8 and with no other type of weights");
      return cpu::WeightType(i);
    }
  TORCH_CHECK(false, "rnnfast: expected weights of float32, bfloat16, float16 or int8, got ",
              weight.scalar_type());
}

Tensor pack_weights(const Tensor& weight, Optional scale, Optional bias, int64_t gates,
                    bool is_table) {
  TORCH_CHECK(weight.dim() == 2 && gates > 0 && gates <= 64 && weight.size(0) > 0 &&
                  weight.size(0) % gates == 0,
              "rnnfast: expected weights of shape (G*H, K), got ", weight.sizes(),
              " with G = ", gates);
  std::vector<Tensor> kept;
  const auto row = [&](Optional t, const char* name) -> float* {
    if (!t) return nullptr;
    TORCH_CHECK(t->sizes() == at::IntArrayRef({weight.size(0)}) && t->scalar_type() == at::kFloat &&
                    t->device().is_cpu(),
                "rnnfast: expected ", name, " of shape (", weight.size(0),
                "), float32 and on the CPU, got ", t->sizes(), " of ", t->scalar_type());
    return kept.emplace_back(t->contiguous()).mutable_data_ptr<float>();
  };
  TORCH_CHECK(weight.device().is_cpu(), "rnnfast: expected weights on the CPU, got ",
              weight.device());
  const Tensor values = weight.contiguous();
  const cpu::FrozenMatrix matrix{.type = type_of(weight, scale),
                                 .gates = int(gates),
                                 .H = weight.size(0) / gates,
                                 .K = weight.size(1),
                                 .weights = values.data_ptr(),
                                 .scales = row(scale, "scale"),
                                 .bias = row(bias, "bias"),
                                 .is_table = is_table};
  const cpu::MicroKernels& kernels = kernels_of(at::kFloat);
  Tensor block = at::empty({int64_t(cpu::frozen_bytes(kernels, matrix))}, at::kByte);
  cpu::pack_frozen(kernels, matrix, block.mutable_data_ptr());
  return block;
}

// Parts that a block lacks are empty.
std::tuple<Tensor, Tensor, Tensor> unpack_weights(const Tensor& block) {
  const cpu::FrozenHeader header = read_header(block);
  const int64_t rows = header.gates * header.H;
  const bool scaled = header.type == cpu::WeightType::kInt8;
  Tensor weight = at::empty({rows, header.K}, kTypes[int(header.type)]);
  Tensor scale = at::empty({scaled ? rows : 0}, at::kFloat);
  Tensor bias = at::empty({header.has_bias ? rows : 0}, at::kFloat);
  const auto memory = [](Tensor& t) {
    return t.numel() > 0 ? t.mutable_data_ptr<float>() : nullptr;
  };
  cpu::unpack_frozen(block.const_data_ptr(), {.type = header.type,
                                              .gates = header.gates,
                                              .H = header.H,
                                              .K = header.K,
                                              .weights = weight.mutable_data_ptr(),
                                              .scales = memory(scale),
                                              .bias = memory(bias)});
  return {weight, scale, bias};
}

// Whether a block can be read with the instruction set in use.
bool can_read_weights(const Tensor& block) {
  const cpu::MicroKernels* kernels = cpu::engine().kernels(Dtype::kFloat32);
  return kernels && cpu::is_readable(*kernels, read_header(block));
}

// The table of tokens whose vectors are the rows of x (V, I): W_ih x + b_ih of each, as a block.
Tensor frozen_table(c10::string_view name, const Tensor& x, const Tensor& w_ih, int64_t hidden) {
  const CellInfo& cell = cell_info(std::string(name));
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat && x.device().is_cpu(),
              "rnnfast::frozen_table: expected x of shape (V, I), float32 and on the CPU, got ",
              x.sizes(), " of ", x.scalar_type());
  const int64_t V = x.size(0), I = x.size(1);
  const at::ScalarType type = frozen_format(w_ih).type;
  check_block("frozen_table", "w_ih", w_ih, {cell.gates, hidden, I, type});
  check_memory("frozen_table", "x", x);
  const Tensor vectors = x.contiguous();
  const cpu::MicroKernels& kernels = kernels_of(at::kFloat);
  const cpu::FrozenMatrix matrix{.type = cpu::WeightType::kFloat32,
                                 .gates = cell.gates,
                                 .H = hidden,
                                 .K = V,
                                 .weights = nullptr,
                                 .scales = nullptr,
                                 .bias = nullptr,
                                 .is_table = true};
  Tensor block = at::empty({int64_t(cpu::frozen_bytes(kernels, matrix))}, at::kByte);
  cpu::write_frozen_header(kernels, matrix, block.mutable_data_ptr());
  if (V == 0) return block;
  const cpu::Engine& engine = cpu::engine();
  const cpu::LayerKind kind{cell.kind, Dtype::kFloat32, read_header(w_ih).type};
  cpu::TabulateJob job;
  job.args = {.w_ih = w_ih.const_data_ptr(),
              .H = hidden,
              .I = I,
              .tokens = V,
              .x = vectors.const_data_ptr<float>(),
              .table = reinterpret_cast<float*>(static_cast<char*>(block.mutable_data_ptr()) +
                                                sizeof(cpu::FrozenHeader))};
  // The product has as much work as one step of so many sequences.
  job.plan = engine.plan_forward(kind, {1, V, I, hidden}, this_machine(), 1);
  const c10::DataPtr workspace = new_workspace(engine.tabulate_workspace(kind, job.args, job.plan));
  job.workspace = workspace.get();
  engine.tabulate(kind, job);
  return block;
}

// c_n is empty for cells without c.
std::tuple<Tensor, Tensor, Tensor> frozen_layer(c10::string_view name, const Tensor& x,
                                                const Tensor& h0, Optional c0, const Tensor& w_ih,
                                                const Tensor& w_hh, Optional w_hr, bool reverse,
                                                Optional lengths, Optional reset) {
  const CellInfo& cell = cell_info(std::string(name));
  TORCH_CHECK(c0.has_value() == cell.has_c() && (!w_hr || cell.has_c()),
              "rnnfast::frozen_layer: ", cell.name,
              cell.has_c() ? " needs c0" : " takes neither c0 nor w_hr");
  TORCH_CHECK(w_hh.scalar_type() == at::kByte, "rnnfast::frozen_layer: expected packed weights");
  const auto given = [](Optional t) { return t.value_or(Tensor()); };
  const LayerInputs in = check_inputs(cell, {.x = x,
                                             .h0 = h0,
                                             .c0 = given(c0),
                                             .w_ih = w_ih,
                                             .w_hh = w_hh,
                                             .b_ih = {},
                                             .b_hh = {},
                                             .reverse = reverse,
                                             .w_hr = given(w_hr),
                                             .parameters = {},
                                             .lengths = given(lengths),
                                             .reset = given(reset)});
  LayerOutputs out = allocate_outputs(cell, in, false, false);
  if (x.size(0) > 0 && h0.numel() > 0) {
    CpuDevice::forward(cell, in, out);
  } else {
    out.h_n.copy_(in.h0);
    if (cell.has_c()) out.c_n.copy_(in.c0);
  }
  return {out.y, out.h_n, cell.has_c() ? out.c_n : at::empty({0}, h0.options())};
}

}  // namespace

std::optional<cpu::WeightType> frozen_type(const Tensor& w_hh) {
  if (w_hh.scalar_type() != at::kByte) return {};
  return read_header(w_hh).type;
}

FrozenFormat frozen_format(const Tensor& t) {
  const cpu::FrozenHeader header = read_header(t);
  return {header.gates, header.H, header.K, kTypes[int(header.type)], header.is_table != 0};
}

bool is_frozen(const Tensor& t, const Tensor& like, int gates, int64_t H, int64_t K) {
  return t.scalar_type() == at::kByte && can_read_weights(t) &&
         frozen_format(t) == FrozenFormat{gates, H, K, frozen_format(like).type};
}

bool is_frozen_table(const Tensor& t, int gates, int64_t H, const Tensor& tokens) {
  if (t.scalar_type() != at::kByte || !can_read_weights(t)) return false;
  const FrozenFormat found = frozen_format(t);
  const Tensor all = tokens.contiguous();
  const int64_t* token = all.const_data_ptr<int64_t>();
  bool good = found == FrozenFormat{gates, H, found.K, found.type, true};
  for (int64_t i = 0; i < all.numel(); ++i) good &= token[i] >= 0 && token[i] < found.K;
  return good;
}

void check_block(const char* op, const char* name, const Tensor& t, const FrozenFormat& expected) {
  const auto words = [](const FrozenFormat& format) {
    return c10::str("(", format.gates, "*", format.H, ", ", format.K, ") in ", format.type,
                    format.is_table ? " as a table of tokens" : "");
  };
  const FrozenFormat found = frozen_format(t);
  TORCH_CHECK(can_read_weights(t), "rnnfast::", op, ": ", name,
              " was packed for another instruction set than '", cpu::capability(), "'");
  TORCH_CHECK(found == expected, "rnnfast::", op, ": expected ", name, " of shape ",
              words(expected), ", got ", words(found));
}

void check_frozen(const CellInfo& cell, const LayerFormat& format, const LayerInputs& in) {
  TORCH_CHECK(!in.b_ih.defined(), "rnnfast::", cell.name,
              ": packed weights have the biases within");
  kernels_of(format.dtype);  // refuses other types
  const at::ScalarType type = frozen_format(in.w_hh).type;
  const bool tokens = in.has_tokens();
  check_block(cell.name, "w_ih", in.w_ih,
              {cell.gates, format.H, tokens ? format.V : format.I,
               tokens ? frozen_format(in.w_ih).type : type, tokens});
  check_block(cell.name, "w_hh", in.w_hh, {cell.gates, format.H, format.P, type});
  if (in.w_hr.defined()) check_block(cell.name, "w_hr", in.w_hr, {1, format.P, format.H, type});
}

TORCH_LIBRARY_FRAGMENT(rnnfast, library) {
  library.def(
      "pack_weights(Tensor weight, Tensor? scale, Tensor? bias, int gates, "
      "bool is_table=False) -> Tensor");
  library.def("unpack_weights(Tensor block) -> (Tensor weight, Tensor scale, Tensor bias)");
  library.def("can_read_weights(Tensor block) -> bool");
  library.def("frozen_table(str cell, Tensor x, Tensor w_ih, int hidden) -> Tensor");
  library.def(
      "frozen_layer(str cell, Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, "
      "Tensor? w_hr, bool reverse, Tensor? lengths=None, Tensor? reset=None) -> "
      "(Tensor y, Tensor h_n, Tensor c_n)");
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, library) {
  library.impl("pack_weights", TORCH_FN(pack_weights));
  library.impl("unpack_weights", TORCH_FN(unpack_weights));
  library.impl("can_read_weights", TORCH_FN(can_read_weights));
  library.impl("frozen_table", TORCH_FN(frozen_table));
  library.impl("frozen_layer", TORCH_FN(frozen_layer));
}

}  // namespace rnnfast
