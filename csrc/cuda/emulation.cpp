// The CUDA driver on the host: same driver, same functors, same translation to column-major
// products, with loops where the GPU has kernels. For tests on machines without a GPU.
#include <cstring>
#include <stdexcept>

#include "cpu/kernels.h"
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
  // What cublasGemmEx computes, by its definition; it sums in a better order than this loop, hence
  // double.
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

cpu::Plan plan(const Sizes& size) {
  return {1, cpu::Split::kNone, cpu::Packing::kNone, cpu::Packing::kNone, cuda::block_steps(size),
          0};
}

template <class Cell, class S>
constexpr cpu::Kernels make_kernels() {
  return {
      [](const Sizes& size, const cpu::Machine&, int64_t) { return plan(size); },
      [](const Sizes& size, const cpu::Machine&) { return plan(size); },
      [](const ForwardArgs& args, const cpu::Plan&) {
        Arena arena(nullptr);
        cuda::Forward<Cell, S>(args, arena);
        return arena.used();
      },
      [](std::span<cpu::ForwardJob> jobs) {
        Host host;
        for (const cpu::ForwardJob& job : jobs) {
          Arena arena(job.workspace);
          cuda::Forward<Cell, S>(job.args, arena).run(host);
        }
      },
      [](const BackwardArgs& args, const cpu::Plan&) {
        Arena arena(nullptr);
        cuda::Backward<Cell, S>(args, arena);
        return arena.used();
      },
      [](std::span<cpu::BackwardJob> jobs) {
        Host host;
        for (const cpu::BackwardJob& job : jobs) {
          Arena arena(job.workspace);
          cuda::Backward<Cell, S>(job.args, arena).run(host);
        }
      },
      nullptr,
      nullptr,
      nullptr,
  };
}

}  // namespace

const cpu::KernelTable& kernel_table() {
#define RNNFAST_ROW(Cell)                                                                 \
  {make_kernels<Cell, double>(), make_kernels<Cell, float>(), make_kernels<Cell, bf16>(), \
   make_kernels<Cell, f16>()},
  static constexpr cpu::KernelTable table{{RNNFAST_FOR_EACH_CELL(RNNFAST_ROW)}, false, false};
#undef RNNFAST_ROW
  return table;
}

}  // namespace rnnfast::cuda_emulation
