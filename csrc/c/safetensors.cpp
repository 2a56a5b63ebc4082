#include "c/safetensors.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string_view>

namespace rnnfast::c {
namespace {

[[noreturn]] void refuse(const std::string& reason) {
  throw std::runtime_error("not a safetensors file: " + reason);
}

// Reads the part of JSON that such headers have: objects, strings, arrays of whole numbers.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  // Calls member(name) for each member of an object, which has to read the value.
  template <class F>
  void object(F&& member) {
    expect('{');
    if (skip('}')) return;
    do {
      const std::string name = string();
      expect(':');
      member(name);
    } while (skip(','));
    expect('}');
  }
  std::vector<int64_t> numbers() {
    std::vector<int64_t> all;
    expect('[');
    if (skip(']')) return all;
    do all.push_back(number());
    while (skip(','));
    expect(']');
    return all;
  }
  std::string string() {
    expect('"');
    std::string result;
    while (next() != '"') {
      char c = take();
      if (c == '\\') {
        c = take();
        // What JSON writes with a backslash and a letter is not in any name that is looked for.
        if (c != '"' && c != '\\' && c != '/') result += '\\';
      }
      result += c;
    }
    take();
    return result;
  }
  void end() {
    skip_space();
    if (at_ != text_.size()) refuse("the header goes on after its end");
  }

 private:
  int64_t number() {
    skip_space();
    constexpr int64_t kMost = int64_t(1) << 48;
    int64_t value = 0;
    const size_t begin = at_;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      value = 10 * value + (text_[at_] - '0');
      if (value > kMost) refuse("a number is too large");
    }
    if (at_ == begin) refuse("expected a number");
    return value;
  }
  char next() const {
    if (at_ == text_.size()) refuse("the header ends too early");
    return text_[at_];
  }
  char take() {
    const char c = next();
    ++at_;
    return c;
  }
  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) && text_[at_] != '\0') ++at_;
  }
  bool skip(char c) {
    skip_space();
    if (next() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!skip(c)) refuse(std::string("expected '") + c + "' in the header");
  }

  const std::string_view text_;
  size_t at_ = 0;
};

int64_t bytes_of(const std::string& dtype) {
  static const std::map<std::string, int64_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"I16", 2}, {"U16", 2}, {"F16", 2}, {"BF16", 2},
      {"I32", 4},  {"U32", 4}, {"F32", 4}, {"F64", 8}, {"I64", 8}, {"U64", 8}};
  const auto found = sizes.find(dtype);
  if (found == sizes.end()) refuse("unknown dtype " + dtype);
  return found->second;
}

SavedTensor read_tensor(Reader& reader, std::span<const std::byte> data) {
  SavedTensor tensor;
  std::vector<int64_t> offsets;
  reader.object([&](const std::string& key) {
    if (key == "dtype")
      tensor.dtype = reader.string();
    else if (key == "shape")
      tensor.shape = reader.numbers();
    else if (key == "data_offsets")
      offsets = reader.numbers();
    else
      refuse("unknown key " + key);
  });
  if (offsets.size() != 2 || offsets[0] > offsets[1] || uint64_t(offsets[1]) > data.size())
    refuse("the bytes of a tensor are not in the file");
  int64_t bytes = bytes_of(tensor.dtype);
  for (const int64_t size : tensor.shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) refuse("a shape is too large");
  if (bytes != offsets[1] - offsets[0]) refuse("a tensor has another size than its shape");
  tensor.data = data.subspan(size_t(offsets[0]), size_t(bytes));
  return tensor;
}

// The tensors have to fill the data, one after the other.
void check_order(const SavedTensors& saved, std::span<const std::byte> data) {
  std::map<const std::byte*, const std::byte*> parts;
  for (const auto& [name, tensor] : saved.tensors)
    if (const auto& part = tensor.data; !part.empty())
      if (!parts.emplace(part.data(), part.data() + part.size()).second)
        refuse("two tensors have the same bytes");
  const std::byte* at = data.data();
  for (const auto& [begin, end] : parts) {
    if (begin != at) refuse("tensors overlap, or leave bytes out");
    at = end;
  }
  if (at != data.data() + data.size()) refuse("there are bytes after the last tensor");
}

}  // namespace

SavedTensors read_safetensors(std::span<const std::byte> file) {
  uint64_t length = 0;
  if (file.size() < sizeof(length)) refuse("it is too short");
  std::memcpy(&length, file.data(), sizeof(length));  // little-endian, as this processor
  const auto rest = file.subspan(sizeof(length));
  if (length > rest.size()) refuse("its header is longer than the file");
  const auto data = rest.subspan(size_t(length));
  Reader reader({reinterpret_cast<const char*>(rest.data()), size_t(length)});
  SavedTensors result;
  reader.object([&](const std::string& name) {
    if (name == "__metadata__") {
      reader.object([&](const std::string& key) { result.metadata[key] = reader.string(); });
    } else if (!result.tensors.emplace(name, read_tensor(reader, data)).second) {
      refuse("two tensors are named " + name);
    }
  });
  reader.end();
  check_order(result, data);
  return result;
}

}  // namespace rnnfast::c
