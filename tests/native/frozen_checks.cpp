// Checks of the products with frozen weights, against sums in double. See checks.h. How panels are
// packed is checked through modules, in test_frozen.py.
#include "native/checks.h"

using namespace rnnfast;
using namespace rnnfast::cpu;
using namespace rnnfast::cpu::checks;

namespace {

// A panel in the order that its format has, and the weights in it: exact numbers.
struct Panel {
  WeightType type;
  int64_t width;
  std::vector<double> weights;  // [k][column]
  std::vector<double> scales;   // [column]
  Buffer memory;

  Panel(Kit& kit, const WeightFormat& format, WeightType of, int vectors, int64_t K)
      : type(of),
        width(vectors * kit.lanes),
        weights(size_t(K * width)),
        scales(size_t(width), 1),
        memory(format.panel_bytes(vectors, K), kit.random.below(3)) {
    const bool integers = type == WeightType::kInt8;
    const int64_t steps = format.steps(K), step_bytes = vectors * format.panel_step_bytes;
    std::memset(memory.data(), 0, size_t(memory.bytes()));
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < width; ++j) {
        const double value = kit.random.whole(integers ? 127 : 8);
        weights[size_t(k * width + j)] = value;
        char* step = memory.data() + k / format.step * step_bytes;
        const int64_t at = j * format.step + k % format.step;
        if (integers)
          reinterpret_cast<uint8_t*>(step)[at] =
              uint8_t(uint8_t(int8_t(value)) ^ format.flipped_bits);
        else
          put(kTypes[int(type)], step, at, value);
      }
    for (int64_t j = 0; integers && j < width; ++j) {
      scales[size_t(j)] = std::exp2(kit.random.whole(3));
      put(Dtype::kFloat32, memory.data() + steps * step_bytes, j, scales[size_t(j)]);
    }
  }
  double operator()(int64_t k, int64_t j) const {
    return weights[size_t(k * width + j)] * scales[size_t(j)];
  }

 private:
  static constexpr Dtype kTypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
};

// Rows of float whose numbers need not be rounded to be the integers that int8 products take. The
// largest is one of 13 bits, or of 8 bits where a word has four.
std::vector<Numbers> whole_rows(Kit& kit, const WeightFormat& format, int count, int64_t K) {
  const int64_t largest = format.word == 4 ? 127 : 4095;
  auto made = kit.rows(Dtype::kFloat32, count, K, true);
  for (Numbers& row : made)
    for (int64_t k = 0; k < K; ++k) row.set(k, k == K / 2 ? largest : kit.random.whole(largest));
  return made;
}

void check_tile(Kit& kit, WeightType type, int vectors, int rows, int64_t K) {
  const WeightFormat& format = *kit.k.frozen[int(type)];
  const bool add = kit.random.coin(), has_bias = !add && kit.random.coin();
  now("%s K=%lld, %d rows, %d vectors, add=%d bias=%d", format.name, (long long)K, rows, vectors,
      add, has_bias);
  const Panel panel(kit, format, type, vectors, K);
  const auto sources = whole_rows(kit, format, rows, K);
  std::vector<Buffer> lhs;
  std::vector<const void*> given;
  for (const Numbers& source : sources) {
    lhs.emplace_back(format.row_bytes(K), 2 * kit.random.below(3));
    if (!format.load_lhs(lhs.back().data(), source.data(), K)) fail("load_lhs refuses numbers");
    lhs.back().check_border("load_lhs");
    given.push_back(lhs.back().data());
  }
  const Numbers bias = kit.numbers(Dtype::kFloat32, panel.width, true, kit.random.below(2));
  const int64_t stride = panel.width + kit.random.below(3);
  Numbers out(Dtype::kFloat32, (rows - 1) * stride + panel.width, kit.random.below(2));
  const Numbers before = kit.numbers(Dtype::kFloat32, rows * panel.width, true);
  for (int i = 0; add && i < rows; ++i)
    for (int64_t j = 0; j < panel.width; ++j) out.set(i * stride + j, before[i * panel.width + j]);
  TileOptions options{.chain = format.chain, .add = add};
  if (kit.random.coin()) {
    options.prefetch = panel.memory.data();
    options.prefetch_bytes = kit.random.below(20000);
  }
  format.tiles[vectors - 1][rows - 1](rows, K, given.data(), panel.memory.data(),
                                      has_bias ? bias.data() : nullptr, out.data(), stride,
                                      options);
  out.check_border("out");
  for (int i = 0; i < rows; ++i) {
    if (i + 1 < rows) out.check_not_written("out", i * stride + panel.width, (i + 1) * stride);
    for (int64_t j = 0; j < panel.width; ++j) {
      Sum sum;
      for (int64_t k = 0; k < K; ++k) sum.add((long double)sources[size_t(i)][k] * panel(k, j));
      if (has_bias) sum.add(bias[j]);
      if (add) sum.add(before[i * panel.width + j]);
      expect("out", i, j, out[i * stride + j], sum, double(K + 4) * epsilon(Dtype::kFloat32));
    }
  }
}

}  // namespace

// Checks every tile of every type of frozen weights.
RNNFAST_CHECK(frozen) {
  for (int type = 0; type < kWeightTypes; ++type) {
    const WeightFormat* format = kit.k.frozen[type];
    if (!format) {
      if (kit.S == Dtype::kFloat32) fail("float has no format for frozen weights");
      continue;
    }
    for (int vectors = 1; vectors <= kMaxTileVectors; ++vectors)
      for (int rows = 1; rows <= format->tile_rows[vectors - 1]; ++rows)
        for (const int64_t K : {0, 1, 2, 15, 16, 17, 33, 70, 5000}) {
          if (K == 5000 && (rows + vectors) % 8 != 0) continue;
          check_tile(kit, WeightType(type), vectors, rows, K);
        }
  }
}

// Checks the look-up of tokens in tables of every type.
RNNFAST_CHECK(frozen_tokens) {
  constexpr Dtype kTypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
  const auto check = [&](WeightType type, const GateShape& shape, int64_t panel) {
    const int64_t columns = shape.gates * shape.H, units = shape.unit_vectors * kit.lanes;
    const int64_t left = (shape.H - panel * units + kit.lanes - 1) / kit.lanes;
    const int64_t vectors = std::min<int64_t>(shape.unit_vectors, left);
    const int64_t width = shape.gates * units,
                  used = (shape.gates - 1) * units + vectors * kit.lanes;
    const int count = int(kit.random.below(4)) + 1;
    const bool integers = type == WeightType::kInt8, has_bias = kit.random.coin();
    now("type %d, H=%lld, %d gates, panel %lld, %d rows", int(type), (long long)shape.H,
        shape.gates, (long long)panel, count);
    std::vector<std::vector<double>> values;
    std::vector<Buffer> rows;
    std::vector<const void*> given;
    for (int i = 0; i < count; ++i) {
      Buffer row(columns * (integers ? 1 : size_of(kTypes[int(type)])), kit.random.below(3));
      std::vector<double> of_row;
      for (int64_t j = 0; j < columns; ++j) {
        of_row.push_back(kit.random.whole(integers ? 127 : 8));
        if (integers)
          row.data()[j] = char(int8_t(of_row.back()));
        else
          put(kTypes[int(type)], row.data(), j, of_row.back());
      }
      values.push_back(of_row);
      rows.push_back(std::move(row));
      given.push_back(rows.back().data());
    }
    const Numbers scales = kit.numbers(Dtype::kFloat32, columns, false, kit.random.below(2));
    const Numbers bias = kit.numbers(Dtype::kFloat32, columns, false, kit.random.below(2));
    Numbers to(Dtype::kFloat32, (count - 1) * width + used, kit.random.below(2));
    kit.k.gather_frozen_tokens[int(type)](
        shape, given.data(), count,
        integers ? reinterpret_cast<const float*>(scales.data()) : nullptr,
        has_bias ? bias.data() : nullptr, panel, to.data());
    to.check_border("to");
    for (int i = 0; i < count; ++i)
      for (int64_t j = 0; j < used; ++j) {
        const int64_t unit = panel * units + j % units, column = j / units * shape.H + unit;
        Sum sum;
        if (unit < shape.H) {
          sum.add((long double)values[size_t(i)][size_t(column)] * (integers ? scales[column] : 1));
          if (has_bias) sum.add(bias[column]);
        }
        expect("to", i, j, to[i * width + j], sum, 2 * epsilon(Dtype::kFloat32));
      }
  };
  for (int type = 0; type < kWeightTypes; ++type) {
    if (!kit.k.gather_frozen_tokens[type]) {
      if (kit.S == Dtype::kFloat32) fail("float has no tables of frozen weights");
      continue;
    }
    for (int gates = 1; gates <= 4; ++gates)
      for (const int64_t H : {1, kit.lanes - 1, kit.lanes, kit.lanes + 1, 9 * kit.lanes - 1}) {
        const GateShape shape{H, gates, gates == 1 ? 4 : 1};
        const int64_t units = shape.unit_vectors * kit.lanes;
        for (int64_t panel = 0; panel * units < H; ++panel) check(WeightType(type), shape, panel);
      }
  }
}
