#include "cpu/frozen.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace rnnfast::cpu {
namespace {

constexpr int64_t kFloat = sizeof(float);

bool is_int8(const FrozenHeader& h) { return h.type == WeightType::kInt8; }
int element_of(const FrozenHeader& h) {  // bytes of a weight
  return is_int8(h) ? 1 : h.type == WeightType::kFloat32 ? 4 : 2;
}

// Where the elements of a matrix are in a block of panels. This is the order of
// MicroKernels::pack_gates.
struct PanelLayout {
  explicit PanelLayout(const FrozenHeader& h)
      : gates(h.gates),
        lanes(h.lanes),
        H(h.H),
        K(h.K),
        word(h.word),
        element(element_of(h)),
        extra(is_int8(h) ? int(kFloat) : 0) {}

  const int gates, lanes;
  const int64_t H, K;
  const int word;  // elements of k in a word
  const int element;
  const int extra;  // bytes after the last word of a panel, per column

  int unit_vectors() const { return gates == 1 ? kMaxTileVectors : 1; }
  int64_t panels() const { return ceil_div(H, int64_t(unit_vectors()) * lanes); }
  int64_t width() const { return int64_t(gates) * unit_vectors() * lanes; }
  int64_t words() const { return ceil_div(K, word); }
  int64_t panel_bytes() const { return width() * (words() * word * element + extra); }
  int64_t bias_at() const { return int64_t(sizeof(FrozenHeader)) + panels() * panel_bytes(); }
  int64_t bytes() const { return bias_at() + panels() * width() * kFloat; }

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
           c.columns * words() * word * element + c.index * kFloat;
  }
  int64_t bias_at(const Column& c) const {
    return bias_at() + (c.panel * width() + c.index) * kFloat;
  }
};

// Where they are in a block that is a table.
struct TableLayout {
  explicit TableLayout(const FrozenHeader& h)
      : H(h.H),
        tokens(h.K),
        columns(h.gates * h.H),
        scales(is_int8(h) ? columns : 0),
        biases(h.has_bias ? columns : 0),
        element(element_of(h)) {}

  const int64_t H, tokens, columns, scales, biases;
  const int element;

  int64_t pitch() const { return columns * element; }
  int64_t scales_at() const {  // at a multiple of a float's size
    return int64_t(sizeof(FrozenHeader)) + ceil_div(tokens * pitch(), kFloat) * kFloat;
  }
  int64_t bias_at() const { return scales_at() + scales * kFloat; }
  int64_t bytes() const { return bias_at() + biases * kFloat; }

  int64_t column(int gate, int64_t unit) const { return gate * H + unit; }
  int64_t weight_at(int64_t column, int64_t k) const {
    return int64_t(sizeof(FrozenHeader)) + k * pitch() + column * element;
  }
  int64_t scale_at(int64_t column) const { return scales_at() + column * kFloat; }
  int64_t bias_at(int64_t column) const { return bias_at() + column * kFloat; }
};

// Calls f(layout) with the layout of a block with this header.
template <class F>
auto with_layout(const FrozenHeader& header, F&& f) {
  return header.is_table ? f(TableLayout(header)) : f(PanelLayout(header));
}
int64_t bytes_of(const FrozenHeader& header) {
  return with_layout(header, [](const auto& layout) { return layout.bytes(); });
}

FrozenHeader header_of(const MicroKernels& kernels, const FrozenMatrix& matrix) {
  const WeightFormat& format = *kernels.frozen[int(matrix.type)];
  FrozenHeader header{};
  std::memcpy(header.magic, FrozenHeader::kMagic, sizeof(header.magic));
  header.H = matrix.H, header.K = matrix.K;
  header.gates = matrix.gates, header.lanes = matrix.is_table ? 1 : kernels.lanes;
  header.type = matrix.type, header.has_bias = matrix.bias != nullptr;
  header.word = matrix.is_table ? 1 : format.word;
  header.flipped_bits = matrix.is_table ? 0 : format.flipped_bits;
  header.is_table = matrix.is_table;
  header.bytes = bytes_of(header);
  return header;
}

// Copies an element. Those of one byte are integers, some of whose bits may be stored flipped.
void copy(void* to, const void* from, int bytes, int flipped_bits) {
  std::memcpy(to, from, size_t(bytes));
  if (bytes == 1) *static_cast<uint8_t*>(to) ^= uint8_t(flipped_bits);
}

// Calls f(address in the matrix, offset in the block, bytes) for every number of a matrix.
template <class F>
void for_all(const FrozenHeader& header, const FrozenMatrix& m, F&& f) {
  with_layout(header, [&](const auto& layout) {
    // Neighbours in a block come from different rows. They are visited while they are in cache.
    constexpr int64_t kAtOnce = 64;
    const int element = layout.element;
    for (int64_t first = 0; m.weights && first < m.K; first += kAtOnce)
      for (int gate = 0; gate < m.gates; ++gate)
        for (int64_t unit = 0; unit < m.H; ++unit) {
          const auto column = layout.column(gate, unit);
          char* row = static_cast<char*>(m.weights) + (gate * m.H + unit) * m.K * element;
          const int64_t end = std::min(m.K, first + kAtOnce);
          for (int64_t k = first; k < end; ++k)
            f(row + k * element, layout.weight_at(column, k), element);
        }
    for (int gate = 0; gate < m.gates; ++gate)
      for (int64_t unit = 0; unit < m.H; ++unit) {
        const auto column = layout.column(gate, unit);
        const int64_t row = gate * m.H + unit;
        if (m.scales) f(m.scales + row, layout.scale_at(column), int(kFloat));
        if (m.bias) f(m.bias + row, layout.bias_at(column), int(kFloat));
      }
  });
}

}  // namespace

size_t frozen_bytes(const MicroKernels& kernels, const FrozenMatrix& matrix) {
  return size_t(header_of(kernels, matrix).bytes);
}

void write_frozen_header(const MicroKernels& kernels, const FrozenMatrix& matrix, void* block) {
  const FrozenHeader header = header_of(kernels, matrix);
  std::memcpy(block, &header, sizeof(header));
}

void pack_frozen(const MicroKernels& kernels, const FrozenMatrix& matrix, void* block) {
  const FrozenHeader header = header_of(kernels, matrix);
  std::memset(block, 0, size_t(header.bytes));
  std::memcpy(block, &header, sizeof(header));
  for_all(header, matrix, [&](const void* from, int64_t to, int bytes) {
    copy(static_cast<char*>(block) + to, from, bytes, header.flipped_bits);
  });
}

FrozenHeader read_frozen(const void* block, size_t bytes) {
  FrozenHeader h{};
  if (bytes >= sizeof(h)) std::memcpy(&h, block, sizeof(h));
  if (std::memcmp(h.magic, FrozenHeader::kMagic, sizeof(h.magic)) != 0)
    throw std::invalid_argument("rnnfast: expected packed weights, got other bytes");
  constexpr int64_t kMost = int64_t(1) << 40;  // no product of these overflows
  const bool laid_out = h.is_table == 1
                            ? h.lanes == 1 && h.word == 1 && h.flipped_bits == 0
                            : h.is_table == 0 && h.lanes > 0 && h.lanes <= 64 && h.word > 0 &&
                                  h.word <= 4 && (h.flipped_bits == 0 || h.flipped_bits == 0x80);
  const bool sound = laid_out && h.H > 0 && h.K >= 0 && h.gates > 0 && h.gates <= 64 &&
                     int(h.type) >= 0 && int(h.type) < kWeightTypes && h.H < kMost / 4096 &&
                     h.K < kMost / 4096 && (h.K == 0 || h.H < kMost / h.K) &&
                     h.bytes == int64_t(bytes) && h.bytes == bytes_of(h);
  if (!sound) throw std::invalid_argument("rnnfast: the packed weights are damaged");
  return h;
}

void unpack_frozen(const void* block, const FrozenMatrix& matrix) {
  FrozenHeader header;
  std::memcpy(&header, block, sizeof(header));
  for_all(header, matrix, [&](void* to, int64_t from, int bytes) {
    copy(to, static_cast<const char*>(block) + from, bytes, header.flipped_bits);
  });
}

FrozenTable frozen_table(const void* block) {
  FrozenHeader header;
  std::memcpy(&header, block, sizeof(header));
  const TableLayout layout(header);
  const auto start = static_cast<const char*>(block);
  const auto floats = [&](int64_t count, int64_t place) {
    return count > 0 ? reinterpret_cast<const float*>(start + place) : nullptr;
  };
  return {.type = header.type,
          .rows = start + sizeof(header),
          .pitch = layout.pitch(),
          .scales = floats(layout.scales, layout.scales_at()),
          .bias = floats(layout.biases, layout.bias_at())};
}

}  // namespace rnnfast::cpu
