// Reads files of the safetensors format: a length, a header in JSON, and the bytes of the tensors.
// https://huggingface.co/docs/safetensors
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace rnnfast::c {

struct SavedTensor {
  std::string dtype;  // such as "F32" or "I8"
  std::vector<int64_t> shape;
  std::span<const std::byte> data;  // in the file; may begin at any address
};

struct SavedTensors {
  std::map<std::string, std::string> metadata;
  std::map<std::string, SavedTensor> tensors;
};

// Throws std::runtime_error, with the reason, if the bytes are not such a file.
SavedTensors read_safetensors(std::span<const std::byte> file);

}  // namespace rnnfast::c
