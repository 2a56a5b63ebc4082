// Launches the kernels of steps.cu from host code that nvcc does not compile.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rnnfast::cuda {

// Runs f(0) ... f(n - 1) on the stream. Throws std::runtime_error if the launch fails. Instantiated
// in steps.cu for every functor of steps.h.
template <class F>
void launch(const F& f, int64_t n, cudaStream_t stream);

}  // namespace rnnfast::cuda
