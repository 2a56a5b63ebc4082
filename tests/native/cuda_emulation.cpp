// The CUDA driver on the host: same driver, same functors, same translation to column-major
// products, with loops where the GPU has kernels. For tests on machines without a GPU.
#include <cstring>
#include <stdexcept>

#include "cpu/layer.h"
#include "cuda/cublas_call.h"
#include "cuda/sequence.h"

namespace rnnfast::cuda_emulation {
namespace {

using cuda::ColumnMajorProduct;
using cuda::load;
using cuda::Product;
using cuda::store;

class Host {
 public:
  template <class In, class Out>
  void gemm(const Product& p, const In* a, const In* b, Out* c) const {
    column_major_gemm(cuda::column_major(p), p.add, b, a, c);
  }

  template <class F>
  void for_each(int64_t n, const F& f) const {
    for (int64_t i = 0; i < n; ++i) f(i);
  }

  void copy(void* to, const void* from, size_t bytes) const { std::memcpy(to, from, bytes); }

 private:
  // What cublasGemmEx computes, by its definition. Sums are in double, because this loop adds terms
  // one after another, which in float would be less exact than cuBLAS.
  template <class In, class Out>
  static void column_major_gemm(const ColumnMajorProduct& p, bool add, const In* a, const In* b,
                                Out* c) {
    if (p.lda < (p.transpose_a ? p.k : p.m) || p.ldb < (p.transpose_b ? p.n : p.k) || p.ldc < p.m)
      throw std::logic_error("a leading dimension that cuBLAS refuses");
    for (int64_t j = 0; j < p.n; ++j) {
      for (int64_t i = 0; i < p.m; ++i) {
        Out* to = c + i + j * p.ldc;
        double sum = add ? load(to) : 0;
        for (int64_t k = 0; k < p.k; ++k)
          sum += double(load(a + (p.transpose_a ? k + i * p.lda : i + k * p.lda))) *
                 load(b + (p.transpose_b ? j + k * p.ldb : k + j * p.ldb));
        store(to, Compute<Out>(sum));
      }
    }
  }
};

// Calls f.operator()<Cell, S>() for a kind of layer.
template <class F>
auto dispatch(cpu::LayerKind kind, F&& f) {
  const auto of_dtype = [&]<class Cell>() {
    switch (kind.dtype) {
      case Dtype::kFloat64:
        return f.template operator()<Cell, double>();
      case Dtype::kFloat32:
        return f.template operator()<Cell, float>();
      case Dtype::kBFloat16:
        return f.template operator()<Cell, bf16>();
      default:
        return f.template operator()<Cell, f16>();
    }
  };
#define RNNFAST_CASE(Cell) \
  case CellKind::k##Cell:  \
    return of_dtype.template operator()<Cell>();
  switch (kind.cell) {
    RNNFAST_FOR_EACH_CELL(RNNFAST_CASE)
    default:
      throw std::logic_error("no such cell");
  }
#undef RNNFAST_CASE
}

class Emulation final : public cpu::Engine {
 public:
  cpu::Plan plan_forward(cpu::LayerKind, const Sizes& size, const cpu::Machine&,
                         int64_t) const override {
    return plan(size);
  }
  cpu::Plan plan_backward(cpu::LayerKind, const Sizes& size, const cpu::Machine&) const override {
    return plan(size);
  }
  size_t forward_workspace(cpu::LayerKind kind, const ForwardArgs& args,
                           const cpu::Plan&) const override {
    return dispatch(kind, [&]<class Cell, class S>() {
      Arena arena(nullptr);
      cuda::Forward<Cell, S>(args, arena);
      return arena.used();
    });
  }
  size_t backward_workspace(cpu::LayerKind kind, const BackwardArgs& args,
                            const cpu::Plan&) const override {
    return dispatch(kind, [&]<class Cell, class S>() {
      Arena arena(nullptr);
      cuda::Backward<Cell, S>(args, arena);
      return arena.used();
    });
  }
  void forward(cpu::LayerKind kind, std::span<cpu::ForwardJob> jobs) const override {
    dispatch(kind, [&]<class Cell, class S>() {
      Host host;
      for (const cpu::ForwardJob& job : jobs) {
        Arena arena(job.workspace);
        cuda::Forward<Cell, S>(job.args, arena).run(host);
      }
    });
  }
  void backward(cpu::LayerKind kind, std::span<cpu::BackwardJob> jobs) const override {
    dispatch(kind, [&]<class Cell, class S>() {
      Host host;
      for (const cpu::BackwardJob& job : jobs) {
        Arena arena(job.workspace);
        cuda::Backward<Cell, S>(job.args, arena).run(host);
      }
    });
  }
  bool takes_strides() const override { return false; }
  bool is_complete() const override { return false; }

 private:
  static cpu::Plan plan(const Sizes& size) {
    return {.threads = 1,
            .row_shares = 1,
            .unit_shares = 1,
            .input = cpu::Packing::kNone,
            .hidden = cpu::Packing::kNone,
            .block_steps = cuda::block_steps(size),
            .cycles = 0};
  }
};

}  // namespace
}  // namespace rnnfast::cuda_emulation

extern "C" __attribute__((visibility("default"))) const void* rnnfast_engine() {
  static const rnnfast::cuda_emulation::Emulation engine;
  return static_cast<const rnnfast::cpu::Engine*>(&engine);
}
