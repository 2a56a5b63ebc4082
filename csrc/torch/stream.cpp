// rnnfast._C.Stream: a stack of frozen layers that keeps its states (cpu/stream.h), for tensors.
#include <ATen/MemoryOverlap.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstring>
#include <optional>

#include "cpu/frozen.h"
#include "cpu/stream.h"
#include "torch/layer.h"
#include "torch/memory.h"
#include "torch/plain.h"

namespace rnnfast {

namespace py = pybind11;
using at::Tensor;

class Stream {
 public:
  // `blocks` are w_ih, w_hh[, w_hr] of each layer, `states` h (L, B, P) and maybe c (L, B, H).
  Stream(int kind, std::vector<Tensor> blocks, bool projects, std::vector<Tensor> states)
      : blocks_(std::move(blocks)), states_(std::move(states)), per_layer_(projects ? 3 : 2) {
    const cpu::MicroKernels* kernels = cpu::engine().kernels(Dtype::kFloat32);
    for (const Tensor& block : blocks_) {
      headers_.push_back(cpu::read_frozen(block.const_data_ptr(), block.nbytes()));
      TORCH_CHECK(kernels && cpu::is_readable(*kernels, headers_.back()),
                  "a block is packed for another instruction set");
    }
    stream_.emplace(cpu::engine(), CellKind(kind), layers(), states_.at(0).size(1));
  }

  // Runs the steps of `input` from the states on, and writes the outputs. With `steps` both have a
  // first dimension of time. For a single sequence both may lack the dimension of the batch.
  void run(py::handle input, py::handle output, bool steps) {
    Tensor x, y;
    TORCH_CHECK(unpack(input, x) && unpack(output, y) && is_plain_context(),
                "a stream takes plain tensors on the CPU, outside of autocast, tracing and modes");
    const int64_t T = check(x, stream_->inputs(), steps, "input");
    TORCH_CHECK(check(y, stream_->outputs(), steps, "out") == T && x.dim() == y.dim(),
                "Expected input and out of the same shape but for the last dimension, got ",
                x.sizes(), " and ", y.sizes());
    TORCH_CHECK(y.is_contiguous(), "Expected out to be contiguous, got strides ", y.strides());
    TORCH_CHECK(!c10::GradMode::is_enabled() || !(x.requires_grad() || y.requires_grad()),
                "a stream has no gradients: detach its input");
    TORCH_CHECK(!is_dual(x), "a stream has no derivatives, in forward mode either");
    x = x.contiguous();
    at::assert_no_partial_overlap(x, y);
    for (size_t i = 0; i < blocks_.size(); ++i)
      TORCH_CHECK(
          has_memory(blocks_[i]) && int64_t(blocks_[i].nbytes()) == headers_[i].bytes &&
              std::memcmp(blocks_[i].const_data_ptr(), &headers_[i], sizeof(headers_[i])) == 0,
          "the module's packed weights were freed or damaged");
    TORCH_CHECK(!busy_.exchange(true), "another thread is running this stream");
    {
      const Release release(busy_);
      const py::gil_scoped_release no_gil;
      for (size_t i = 0; i < size_t(stream_->layers()); ++i) stream_->move(i, layer(i));
      stream_->run(T, x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), state(0), state(1));
    }
    if (!y.is_inference()) y.unsafeGetTensorImpl()->bump_version();  // autograd may have saved it
  }

 private:
  static bool is_dual(const Tensor& t) {
    return t.unsafeGetTensorImpl()->autograd_meta() && t._fw_grad(0).defined();
  }

  struct Release {
    explicit Release(std::atomic<bool>& flag) : flag_(flag) {}
    ~Release() { flag_.store(false); }
    std::atomic<bool>& flag_;
  };

  cpu::Stream::Layer layer(size_t i) const {
    const Tensor* own = &blocks_[i * per_layer_];
    return {own[0].const_data_ptr(), own[1].const_data_ptr(),
            per_layer_ > 2 ? own[2].const_data_ptr() : nullptr};
  }
  std::vector<cpu::Stream::Layer> layers() const {
    TORCH_CHECK(!blocks_.empty() && blocks_.size() % per_layer_ == 0, "expected ", per_layer_,
                " blocks per layer, got ", blocks_.size());
    std::vector<cpu::Stream::Layer> all;
    for (size_t i = 0; i < blocks_.size() / per_layer_; ++i) all.push_back(layer(i));
    return all;
  }
  float* state(size_t i) {
    return i < states_.size() ? states_[i].mutable_data_ptr<float>() : nullptr;
  }

  // Returns the number of steps of a tensor (T, B, n), or (B, n) without steps.
  int64_t check(const Tensor& t, int64_t n, bool steps, const char* name) const {
    const int64_t B = stream_->batch(), dims = t.dim() - steps;
    const bool batched = dims == 2 && t.size(steps) == B;
    const bool single = dims == 1 && B == 1;
    TORCH_CHECK(t.scalar_type() == at::kFloat, "Expected ", name, " of float32, got ",
                t.scalar_type());
    TORCH_CHECK((batched || single) && t.size(-1) == n, "Expected ", name, " of shape (",
                steps ? "T, " : "", B, ", ", n, ")",
                B > 1   ? ""
                : steps ? " or (T, "
                        : " or (",
                B > 1 ? "" : std::to_string(n) + ")", ", got ", t.sizes());
    TORCH_CHECK(has_memory(t), name, " has no memory");
    return steps ? t.size(0) : 1;
  }

  const std::vector<Tensor> blocks_;
  std::vector<cpu::FrozenHeader> headers_;  // of the blocks
  std::vector<Tensor> states_;
  const size_t per_layer_;
  std::optional<cpu::Stream> stream_;
  std::atomic<bool> busy_{false};
};

void bind_stream(py::module_& m) {
  py::class_<Stream>(m, "Stream")
      .def(py::init<int, std::vector<Tensor>, bool, std::vector<Tensor>>())
      .def("run", &Stream::run);
}

}  // namespace rnnfast
