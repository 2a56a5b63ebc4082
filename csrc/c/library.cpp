// The C library (rnnfast.h): loads frozen layers from files, and runs them as streams.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "c/rnnfast.h"
#include "c/safetensors.h"
#include "cells/all.h"
#include "cpu/frozen.h"
#include "cpu/layer.h"
#include "cpu/stream.h"

using namespace rnnfast;

namespace {

struct Freed {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<void, Freed>;

Memory allocate(size_t bytes) {
  return Memory(::operator new(std::max<size_t>(bytes, 1), std::align_val_t(64)));
}

[[noreturn]] void refuse(const std::string& reason) { throw std::runtime_error(reason); }

// Numbers of the metadata, and sizes that come from them, are below this.
constexpr int64_t kMost = int64_t(1) << 24;

const std::string& text_of(const c::SavedTensors& saved, const char* key) {
  const auto found = saved.metadata.find(key);
  if (found == saved.metadata.end())
    refuse(std::string("not a file of frozen layers: its metadata have no ") + key);
  return found->second;
}
int64_t number_of(const c::SavedTensors& saved, const char* key, int64_t least) {
  const std::string& text = text_of(saved, key);
  int64_t value = 0;
  bool good = !text.empty() && text.size() < 9;
  for (const char digit : text) {
    good = good && digit >= '0' && digit <= '9';
    value = 10 * value + (digit - '0');
  }
  if (!good || value < least || value > kMost) refuse(std::string(key) + " is " + text);
  return value;
}

struct CellName {
  const char* name;
  CellKind kind;
  int gates;
  bool has_c;
};
#define RNNFAST_NAME(C) {C::kName, CellKind::k##C, C::kGates, (C::kCells > 0)},
constexpr CellName kCellNames[] = {RNNFAST_FOR_EACH_CELL(RNNFAST_NAME)};
#undef RNNFAST_NAME

const CellName& cell_of(const std::string& name) {
  for (const CellName& one : kCellNames)
    if (name == one.name) return one;
  refuse("unknown cell " + name);
}

struct SavedType {
  const char* weights;  // in the metadata
  const char* dtype;  // of the matrices
  cpu::WeightType type;
};
constexpr SavedType kTypes[] = {{"float32", "F32", cpu::WeightType::kFloat32},
                                {"bfloat16", "BF16", cpu::WeightType::kBFloat16},
                                {"float16", "F16", cpu::WeightType::kFloat16},
                                {"int8", "I8", cpu::WeightType::kInt8}};

const SavedType& type_of(const std::string& weights) {
  for (const SavedType& one : kTypes)
    if (weights == one.weights) return one;
  refuse("unknown type of weights " + weights);
}

// Sets the processor's floating-point mode for as long as it lives: round to nearest, no
// exceptions, and denormal numbers are zeros.
class OurFloats {
#if defined(__x86_64__)
 public:
  OurFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
  ~OurFloats() { _mm_setcsr(before_); }
  OurFloats(const OurFloats&) = delete;
  OurFloats& operator=(const OurFloats&) = delete;

 private:
  const unsigned before_;
#endif
};

// Runs f and returns what it returns; or null, with the reason in `error`.
template <class F>
auto or_null(char* error, size_t error_size, F&& f) -> decltype(f()) {
  const auto note = [&](const char* reason) {
    if (error_size > 0) std::snprintf(error, error_size, "%s", reason);
  };
  try {
    return f();
  } catch (const std::bad_alloc&) {
    note("out of memory");
  } catch (const std::exception& exception) {
    note(exception.what());
  } catch (...) {
    note("unknown error");
  }
  return nullptr;
}

}  // namespace

struct rnnfast_model {
  const cpu::Engine& engine = cpu::engine();
  const CellName& cell;
  int64_t inputs = 0, hidden = 0, outputs = 0;
  std::vector<Memory> blocks;
  std::vector<cpu::Stream::Layer> layers;

  explicit rnnfast_model(const c::SavedTensors& saved) : cell(cell_of(text_of(saved, "cell"))) {
    if (text_of(saved, "format") != "rnnfast") refuse("the format is not rnnfast");
    if (text_of(saved, "version") != "1")
      refuse("version " + text_of(saved, "version") + " of the format; this library reads 1");
    const SavedType& type = type_of(text_of(saved, "weights"));
    const std::string& module = text_of(saved, "module");
    if (module != "cell" && module != "layers") refuse("module is " + module);
    const bool is_cell = module == "cell";
    const int64_t bias = number_of(saved, "bias", 0), count = number_of(saved, "num_layers", 1);
    inputs = number_of(saved, "input_size", 1), hidden = number_of(saved, "hidden_size", 1);
    const int64_t projected = number_of(saved, "proj_size", 0);
    outputs = projected > 0 ? projected : hidden;
    if (count > (is_cell ? 1 : 1024) || bias > 1 || (projected > 0 && (is_cell || !cell.has_c)))
      refuse("the sizes do not fit each other");
    for (int64_t k = 0; k < count; ++k) {
      const std::string end = is_cell ? "" : "_l" + std::to_string(k);
      const auto matrix = [&](const std::string& name, int gates, int64_t H, int64_t K,
                              bool has_bias) {
        return pack(saved, type, name + end, gates, H, K, has_bias);
      };
      cpu::Stream::Layer layer{};
      layer.w_ih = matrix("ih", cell.gates, hidden, k == 0 ? inputs : outputs, bias);
      layer.w_hh = matrix("hh", cell.gates, hidden, outputs, bias);
      if (projected > 0) layer.w_hr = matrix("hr", 1, projected, hidden, false);
      layers.push_back(layer);
    }
    if (read_ != saved.tensors.size()) refuse("there are more tensors than the metadata say");
  }

 private:
  size_t read_ = 0;  // tensors

  // Copies a tensor of the file to aligned memory.
  Memory read(const c::SavedTensors& saved, const std::string& name, const char* dtype,
              const std::vector<int64_t>& shape) {
    const auto found = saved.tensors.find(name);
    if (found == saved.tensors.end()) refuse("there is no " + name);
    const c::SavedTensor& tensor = found->second;
    if (tensor.dtype != dtype) refuse(name + " is " + tensor.dtype + ", expected " + dtype);
    if (tensor.shape != shape) refuse(name + " has another shape than the metadata say");
    Memory memory = allocate(tensor.data.size());
    std::memcpy(memory.get(), tensor.data.data(), tensor.data.size());
    ++read_;
    return memory;
  }

  const void* pack(const c::SavedTensors& saved, const SavedType& type, const std::string& name,
                   int gates, int64_t H, int64_t K, bool has_bias) {
    const std::string weight = "weight_" + name;
    const Memory weights = read(saved, weight, type.dtype, {gates * H, K});
    Memory scales, bias;
    if (type.type == cpu::WeightType::kInt8)
      scales = read(saved, weight + "_scale", "F32", {gates * H});
    if (has_bias) bias = read(saved, "bias_" + name, "F32", {gates * H});
    const cpu::FrozenMatrix matrix{.type = type.type,
                                   .gates = gates,
                                   .H = H,
                                   .K = K,
                                   .weights = weights.get(),
                                   .scales = static_cast<float*>(scales.get()),
                                   .bias = static_cast<float*>(bias.get())};
    const cpu::MicroKernels& kernels = *engine.kernels(Dtype::kFloat32);
    blocks.push_back(allocate(cpu::frozen_bytes(kernels, matrix)));
    cpu::pack_frozen(kernels, matrix, blocks.back().get());
    return blocks.back().get();
  }
};

struct rnnfast_stream {
  cpu::Stream stream;
  std::vector<float> h, c;

  rnnfast_stream(const rnnfast_model& model, int64_t batch)
      : stream(model.engine, model.cell.kind, model.layers, batch),
        h(size_t(stream.layers() * batch * model.outputs)),
        c(model.cell.has_c ? size_t(stream.layers() * batch * model.hidden) : 0) {}
};

#define RNNFAST_API extern "C" __attribute__((visibility("default")))

RNNFAST_API rnnfast_model* rnnfast_load_memory(const void* data, size_t size, char* error,
                                               size_t error_size) {
  return or_null(error, error_size, [&]() -> rnnfast_model* {
    if (!data) refuse("no data");
    return new rnnfast_model(c::read_safetensors({static_cast<const std::byte*>(data), size}));
  });
}

RNNFAST_API rnnfast_model* rnnfast_load(const char* path, char* error, size_t error_size) {
  return or_null(error, error_size, [&]() -> rnnfast_model* {
    if (!path) refuse("no path");
    std::ifstream file(path, std::ios::binary);
    if (!file) refuse(std::string("cannot open ") + path);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    return new rnnfast_model(c::read_safetensors(std::as_bytes(std::span(bytes))));
  });
}

RNNFAST_API void rnnfast_free(rnnfast_model* model) { delete model; }

RNNFAST_API size_t rnnfast_input_size(const rnnfast_model* model) { return size_t(model->inputs); }
RNNFAST_API size_t rnnfast_output_size(const rnnfast_model* model) {
  return size_t(model->outputs);
}

RNNFAST_API rnnfast_stream* rnnfast_stream_new(const rnnfast_model* model, size_t batch,
                                               char* error, size_t error_size) {
  return or_null(error, error_size, [&]() -> rnnfast_stream* {
    if (!model) refuse("no model");
    if (batch == 0 || batch > size_t(kMost)) refuse("the batch is empty or too large");
    return new rnnfast_stream(*model, int64_t(batch));
  });
}

RNNFAST_API void rnnfast_stream_free(rnnfast_stream* stream) { delete stream; }

RNNFAST_API void rnnfast_run(rnnfast_stream* s, size_t steps, const float* input, float* output) {
  const OurFloats mode;
  s->stream.run(int64_t(steps), input, output, s->h.data(), s->c.empty() ? nullptr : s->c.data());
}

RNNFAST_API void rnnfast_step(rnnfast_stream* stream, const float* input, float* output) {
  rnnfast_run(stream, 1, input, output);
}

RNNFAST_API void rnnfast_reset(rnnfast_stream* s) {
  std::fill(s->h.begin(), s->h.end(), 0.0f);
  std::fill(s->c.begin(), s->c.end(), 0.0f);
}

RNNFAST_API const char* rnnfast_capability(void) {
  static const std::string name = [] {
    try {
      return cpu::capability();
    } catch (const std::exception&) {  // the environment names one that is not there
      return std::string();
    }
  }();
  return name.c_str();
}
