// Which tensors and which state of torch the calls from Python can take that avoid the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

namespace rnnfast {

// Whether a tensor is an ordinary CPU tensor: no subclass, and no lazy operation such as a pending
// conjugation.
bool is_plain(const at::Tensor& t);

// Whether no mode, tracing or autocast is active.
bool is_plain_context();

// Unpacks a Python object into `tensor`. Returns false if its type is not exactly torch.Tensor or
// Parameter (subclasses do not count), or if it is not plain.
bool unpack(pybind11::handle object, at::Tensor& tensor);

}  // namespace rnnfast
