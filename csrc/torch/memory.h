// Memory of results and workspaces on the CPU, kept from call to call. What malloc maps anew in
// every call costs as much as the kernels do in the time of a small sequence: pages are given out
// one by one, and cleared.
#pragma once

#include <ATen/core/Tensor.h>

namespace rnnfast {

// An ordinary tensor with undefined contents, whose memory comes from the pool if it is large.
at::Tensor new_on_cpu(at::IntArrayRef shape, at::ScalarType type);
// The same on any device.
at::Tensor new_tensor(at::IntArrayRef shape, const at::TensorOptions& options);
// Bytes for the length of a call; may be more than asked for.
at::Tensor new_workspace(size_t bytes);

// Gives back to the system what is not in use; returns how many bytes that was.
size_t release_memory();

}  // namespace rnnfast
