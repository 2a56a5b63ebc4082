// Frozen weights as tensors: the ops that pack and unpack blocks (cpu/frozen.h), and the op that
// runs a layer with them.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/frozen.h"
#include "cpu/layer.h"
#include "torch/layer.h"
#include "torch/memory.h"

namespace rnnfast {
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

cpu::FrozenHeader header_of(const Tensor& block) {
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

Tensor pack_weights(const Tensor& weight, Optional scale, Optional bias, int64_t gates) {
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
                                 .bias = row(bias, "bias")};
  const cpu::MicroKernels& kernels = kernels_of(at::kFloat);
  Tensor block = at::empty({int64_t(cpu::frozen_bytes(kernels, matrix))}, at::kByte);
  cpu::pack_frozen(kernels, matrix, block.mutable_data_ptr());
  return block;
}

// Parts that a block lacks are empty.
std::tuple<Tensor, Tensor, Tensor> unpack_weights(const Tensor& block) {
  const cpu::FrozenHeader header = header_of(block);
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
  return kernels && cpu::is_readable(*kernels, header_of(block));
}

// c_n is empty for cells without c.
std::tuple<Tensor, Tensor, Tensor> frozen_layer(c10::string_view name, const Tensor& x,
                                                const Tensor& h0, Optional c0, const Tensor& w_ih,
                                                const Tensor& w_hh, Optional w_hr, bool reverse,
                                                Optional lengths, Optional reset) {
  const CellInfo& cell = cell_info(std::string(name));
  TORCH_CHECK(c0.has_value() == cell.has_cell && (!w_hr || cell.has_cell),
              "rnnfast::frozen_layer: ", cell.name,
              cell.has_cell ? " needs c0" : " takes neither c0 nor w_hr");
  TORCH_CHECK(w_hh.scalar_type() == at::kByte, "rnnfast::frozen_layer: expected packed weights");
  const LayerInputs in = check_inputs(cell, x, h0, c0.value_or(Tensor()), w_ih, w_hh, {}, {}, w_hr,
                                      reverse, lengths, reset);
  LayerOutputs out = allocate_outputs(cell, in, false, false);
  if (x.size(0) > 0 && h0.numel() > 0) {
    CpuDevice::forward(cell, in, out);
  } else {
    out.h_n.copy_(in.h0);
    if (cell.has_cell) out.c_n.copy_(in.c0);
  }
  return {out.y, out.h_n, cell.has_cell ? out.c_n : at::empty({0}, h0.options())};
}

}  // namespace

bool is_frozen(const Tensor& t, const Tensor& like, at::ScalarType dtype, int gates, int64_t H,
               int64_t K) {
  if (dtype != at::kFloat || t.scalar_type() != at::kByte) return false;
  const cpu::MicroKernels* kernels = cpu::engine().kernels(Dtype::kFloat32);
  const cpu::FrozenHeader header = header_of(t);
  return kernels && cpu::is_readable(*kernels, header) && header.type == header_of(like).type &&
         header.gates == gates && header.H == H && header.K == K;
}

void check_frozen(const CellInfo& cell, const LayerFormat& format, const LayerInputs& in) {
  TORCH_CHECK(!in.has_tokens() && !in.b_ih.defined(), "rnnfast::", cell.name,
              ": packed weights have the biases within, and no kernels for tokens");
  const cpu::MicroKernels& kernels = kernels_of(format.dtype);
  const cpu::WeightType type = header_of(in.w_hh).type;
  const auto check = [&](const Tensor& block, const char* what, int gates, int64_t H, int64_t K) {
    const cpu::FrozenHeader header = header_of(block);
    TORCH_CHECK(cpu::is_readable(kernels, header), "rnnfast::", cell.name, ": ", what,
                " was packed for another instruction set than '", cpu::capability(), "'");
    TORCH_CHECK(header.gates == gates && header.H == H && header.K == K && header.type == type,
                "rnnfast::", cell.name, ": expected ", what, " of shape (", gates, "*", H, ", ", K,
                ") in ", kTypes[int(type)], ", got (", header.gates, "*", header.H, ", ", header.K,
                ") in ", kTypes[int(header.type)]);
  };
  check(in.w_ih, "w_ih", cell.gates, format.H, format.I);
  check(in.w_hh, "w_hh", cell.gates, format.H, format.P);
  if (in.w_hr.defined()) check(in.w_hr, "w_hr", 1, format.P, format.H);
}

TORCH_LIBRARY_FRAGMENT(rnnfast, library) {
  library.def("pack_weights(Tensor weight, Tensor? scale, Tensor? bias, int gates) -> Tensor");
  library.def("unpack_weights(Tensor block) -> (Tensor weight, Tensor scale, Tensor bias)");
  library.def("can_read_weights(Tensor block) -> bool");
  library.def(
      "frozen_layer(str cell, Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, "
      "Tensor? w_hr, bool reverse, Tensor? lengths=None, Tensor? reset=None) -> "
      "(Tensor y, Tensor h_n, Tensor c_n)");
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, library) {
  library.impl("pack_weights", TORCH_FN(pack_weights));
  library.impl("unpack_weights", TORCH_FN(unpack_weights));
  library.impl("can_read_weights", TORCH_FN(can_read_weights));
  library.impl("frozen_layer", TORCH_FN(frozen_layer));
}

}  // namespace rnnfast
