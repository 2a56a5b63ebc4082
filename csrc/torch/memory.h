// Memory of results and workspaces on the CPU, kept from call to call. malloc may map large blocks
// anew in every call. The system then hands out each page on first use, cleared, and for a small
// sequence that takes as long as the kernels.
#pragma once

#include <ATen/core/Tensor.h>

namespace rnnfast {

// An ordinary tensor with undefined contents, whose memory comes from the pool if it is large.
at::Tensor new_on_cpu(at::IntArrayRef shape, at::ScalarType type);
// The same on any device.
at::Tensor new_tensor(at::IntArrayRef shape, const at::TensorOptions& options);
// Scratch memory of one call: at least `bytes` bytes.
at::Tensor new_workspace(size_t bytes);

// Returns idle memory of the pool to the system. The result is the number of bytes returned.
size_t release_memory();

}  // namespace rnnfast
