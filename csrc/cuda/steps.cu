// The CUDA kernels: each runs one functor of steps.h, with one thread per element.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/steps.h"

namespace rnnfast::cuda {
namespace {

constexpr int kThreads = 256;

template <class F>
__global__ void __launch_bounds__(kThreads) for_each(F f, int64_t n) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) f(i);
}

}  // namespace

template <class F>
void launch(const F& f, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t blocks = std::min((n + kThreads - 1) / kThreads, kMaxBlocks);
  for_each<<<unsigned(blocks), kThreads, 0, stream>>>(f, n);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("rnnfast: kernel launch failed: ") +
                             cudaGetErrorString(error));
}

#define RNNFAST_LAUNCH(...) template void launch(const __VA_ARGS__&, int64_t, cudaStream_t);
#define RNNFAST_LAUNCH_STEPS(Cell, S)  \
  RNNFAST_LAUNCH(ForwardStep<Cell, S>) \
  RNNFAST_LAUNCH(BackwardStep<Cell, S>)
#define RNNFAST_LAUNCH_CELL(Cell)    \
  RNNFAST_LAUNCH_STEPS(Cell, double) \
  RNNFAST_LAUNCH_STEPS(Cell, float)  \
  RNNFAST_LAUNCH_STEPS(Cell, bf16)   \
  RNNFAST_LAUNCH_STEPS(Cell, f16)
RNNFAST_FOR_EACH_CELL(RNNFAST_LAUNCH_CELL)

#define RNNFAST_LAUNCH_DTYPE(S) \
  RNNFAST_LAUNCH(Fill<S>)       \
  RNNFAST_LAUNCH(GradState<S>)
RNNFAST_LAUNCH_DTYPE(double)
RNNFAST_LAUNCH_DTYPE(float)
RNNFAST_LAUNCH_DTYPE(bf16)
RNNFAST_LAUNCH_DTYPE(f16)
RNNFAST_LAUNCH(Convert<double, double>)
RNNFAST_LAUNCH(Convert<float, float>)
RNNFAST_LAUNCH(Convert<float, bf16>)
RNNFAST_LAUNCH(Convert<bf16, float>)
RNNFAST_LAUNCH(Convert<float, f16>)
RNNFAST_LAUNCH(Convert<f16, float>)

}  // namespace rnnfast::cuda
