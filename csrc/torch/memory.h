// A pool for the memory of results and workspaces on the CPU. malloc may map large blocks afresh in
// every call. The system then clears each page on first use, which takes as long as the kernels of
// a small sequence.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

namespace rnnfast {

// Returns an ordinary tensor with undefined contents, whose memory comes from the pool if it is
// large.
at::Tensor new_on_cpu(at::IntArrayRef shape, at::ScalarType type);
// As new_on_cpu, on any device. Only memory on the CPU comes from the pool.
at::Tensor new_tensor(at::IntArrayRef shape, const at::TensorOptions& options);
// Returns scratch memory for one call: at least `bytes` bytes, aligned to a cache line. The calling
// thread must give it back.
c10::DataPtr new_workspace(size_t bytes);

// Returns idle memory of the pool to the system, and the number of its bytes to the caller.
size_t release_memory();

}  // namespace rnnfast
