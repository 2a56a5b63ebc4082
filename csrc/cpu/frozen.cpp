#include "cpu/frozen.h"

#include <cstring>
#include <stdexcept>

namespace rnnfast::cpu {
namespace {

// Where the elements of a matrix are in a block. This is the order of MicroKernels::pack_gates.
struct Layout {
  int gates, lanes;
  int64_t H, K;
  int word;  // elements of k in a word
  int element;  // bytes of a weight
  int extra;  // bytes after the last word of a panel, per column

  int unit_vectors() const { return gates == 1 ? kMaxTileVectors : 1; }
  int64_t panels() const { return ceil_div(H, int64_t(unit_vectors()) * lanes); }
  int64_t width() const { return int64_t(gates) * unit_vectors() * lanes; }
  int64_t words() const { return ceil_div(K, word); }
  int64_t panel_bytes() const { return width() * (words() * word * element + extra); }
  int64_t bias_at() const { return int64_t(sizeof(FrozenHeader)) + panels() * panel_bytes(); }
  int64_t bytes() const { return bias_at() + panels() * width() * int64_t(sizeof(float)); }

  // Where row `gate * H + unit` is.
  struct Column {
    int64_t panel, columns, index;  // of the columns of the panel
  };
  Column column(int gate, int64_t unit) const {
    const int64_t units = int64_t(unit_vectors()) * lanes;
    const int64_t panel = unit / units, first = panel * units;
    // With one gate, the last panel has only the vectors that its units need.
    const int64_t columns =
        gates > 1 || panel + 1 < panels() ? width() : ceil_div(H - first, lanes) * lanes;
    return {panel, columns, gate * units + unit - first};
  }
  int64_t weight_at(const Column& c, int64_t k) const {
    const int64_t in_panel = (k / word * c.columns + c.index) * word + k % word;
    return int64_t(sizeof(FrozenHeader)) + c.panel * panel_bytes() + in_panel * element;
  }
  int64_t scale_at(const Column& c) const {
    return int64_t(sizeof(FrozenHeader)) + c.panel * panel_bytes() +
           c.columns * words() * word * element + c.index * int64_t(sizeof(float));
  }
  int64_t bias_at(const Column& c) const {
    return bias_at() + (c.panel * width() + c.index) * int64_t(sizeof(float));
  }
};

Layout layout_of(const FrozenHeader& h) {
  const bool integers = h.type == WeightType::kInt8;
  return {.gates = h.gates,
          .lanes = h.lanes,
          .H = h.H,
          .K = h.K,
          .word = h.word,
          .element = integers                         ? 1
                     : h.type == WeightType::kFloat32 ? 4
                                                      : 2,
          .extra = integers ? int(sizeof(float)) : 0};
}

FrozenHeader header_of(const MicroKernels& kernels, const FrozenMatrix& matrix) {
  const WeightFormat& format = *kernels.frozen[int(matrix.type)];
  FrozenHeader header{};
  std::memcpy(header.magic, FrozenHeader::kMagic, sizeof(header.magic));
  header.H = matrix.H, header.K = matrix.K;
  header.gates = matrix.gates, header.lanes = kernels.lanes;
  header.type = matrix.type, header.has_bias = matrix.bias != nullptr;
  header.word = format.word, header.flipped_bits = format.flipped_bits;
  header.bytes = layout_of(header).bytes();
  return header;
}

// Copies an element. Those of one byte are integers, some of whose bits may be stored flipped.
void copy(void* to, const void* from, int bytes, int flipped_bits) {
  std::memcpy(to, from, size_t(bytes));
  if (bytes == 1) *static_cast<uint8_t*>(to) ^= uint8_t(flipped_bits);
}

// Calls f(address in the matrix, offset in the block, bytes) for every number of a matrix.
template <class F>
void for_all(const Layout& layout, const FrozenMatrix& m, F&& f) {
  const int element = layout.element;
  for (int gate = 0; gate < m.gates; ++gate)
    for (int64_t unit = 0; unit < m.H; ++unit) {
      const Layout::Column column = layout.column(gate, unit);
      const int64_t row = gate * m.H + unit;
      char* weights = static_cast<char*>(m.weights) + row * m.K * element;
      for (int64_t k = 0; m.weights && k < m.K; ++k)
        f(weights + k * element, layout.weight_at(column, k), element);
      if (m.scales) f(m.scales + row, layout.scale_at(column), int(sizeof(float)));
      if (m.bias) f(m.bias + row, layout.bias_at(column), int(sizeof(float)));
    }
}

}  // namespace

size_t frozen_bytes(const MicroKernels& kernels, const FrozenMatrix& matrix) {
  return size_t(header_of(kernels, matrix).bytes);
}

void pack_frozen(const MicroKernels& kernels, const FrozenMatrix& matrix, void* block) {
  const FrozenHeader header = header_of(kernels, matrix);
  std::memset(block, 0, size_t(header.bytes));
  std::memcpy(block, &header, sizeof(header));
  for_all(layout_of(header), matrix, [&](const void* from, int64_t to, int bytes) {
    copy(static_cast<char*>(block) + to, from, bytes, header.flipped_bits);
  });
}

FrozenHeader read_frozen(const void* block, size_t bytes) {
  FrozenHeader h{};
  if (bytes >= sizeof(h)) std::memcpy(&h, block, sizeof(h));
  if (std::memcmp(h.magic, FrozenHeader::kMagic, sizeof(h.magic)) != 0)
    throw std::invalid_argument("rnnfast: expected packed weights, got other bytes");
  constexpr int64_t kMost = int64_t(1) << 40;  // no product of these overflows
  const bool sound = h.H > 0 && h.K >= 0 && h.gates > 0 && h.gates <= 64 && h.lanes > 0 &&
                     h.lanes <= 64 && int(h.type) >= 0 && int(h.type) < kWeightTypes &&
                     h.word > 0 && h.word <= 4 && (h.flipped_bits == 0 || h.flipped_bits == 0x80) &&
                     h.H < kMost / 4096 && h.K < kMost / 4096 && (h.K == 0 || h.H < kMost / h.K) &&
                     h.bytes == int64_t(bytes) && h.bytes == layout_of(h).bytes();
  if (!sound) throw std::invalid_argument("rnnfast: the packed weights are damaged");
  return h;
}

void unpack_frozen(const void* block, const FrozenMatrix& matrix) {
  FrozenHeader header;
  std::memcpy(&header, block, sizeof(header));
  for_all(layout_of(header), matrix, [&](void* to, int64_t from, int bytes) {
    copy(to, static_cast<const char*>(block) + from, bytes, header.flipped_bits);
  });
}

}  // namespace rnnfast::cpu
