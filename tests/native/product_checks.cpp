// Checks of the micro-kernels that pack and multiply, against sums in double. See checks.h.
#include <algorithm>
#include <limits>

#include "native/checks.h"

using namespace rnnfast;
using namespace rnnfast::cpu;
using namespace rnnfast::cpu::checks;

namespace {

// lhs rows in a weight format, made from rows of S, at equal or unequal distances.
struct Lhs {
  std::vector<Numbers> sources;
  std::vector<Buffer> memory;
  std::vector<const void*> rows;

  Lhs(Kit& kit, const WeightFormat& format, int count, int64_t K, bool exact, bool equal) {
    equal |= format.converts_lhs;
    sources = kit.rows(kit.S, count, K, exact);
    // The extra bytes at the end of a row are padding, and not read.
    const int64_t pitch = format.row_bytes(K), bytes = pitch - format.row_extra_bytes;
    if (equal) memory.emplace_back((count - 1) * pitch + bytes);
    for (int i = 0; i < count; ++i) {
      if (!equal) memory.emplace_back(bytes, 2 * kit.random.below(3));
      char* row = memory.back().data() + (equal ? i * pitch : 0);
      if (!format.load_lhs(row, sources[size_t(i)].data(), K)) fail("load_lhs refuses numbers");
      rows.push_back(row);
    }
    for (const Buffer& one : memory) one.check_border("load_lhs");
  }
};

// The columns of a panel, as rows of S along k, of which some are null (zeros).
struct Rhs {
  std::vector<Numbers> sources;
  std::vector<const void*> rows;
  int64_t first, columns;  // the panel begins at column `first` of `columns` columns

  Rhs(Kit& kit, int vectors, int64_t K, bool exact) {
    first = kit.random.below(2) * 4 * kit.lanes;
    columns = first + vectors * kit.lanes - kit.random.below(kit.lanes);
    sources = kit.rows(kit.S, K, columns, exact);
    rows = pointers(sources);
    for (const void*& row : rows)
      if (kit.random.below(8) == 0) row = nullptr;
  }
  double operator()(int64_t k, int64_t j) const {
    return rows[size_t(k)] && first + j < columns ? sources[size_t(k)][first + j] : 0;
  }
  Buffer pack(Kit& kit, const WeightFormat& format, int vectors) const {
    const auto K = int64_t(rows.size());
    Buffer panel(format.panel_bytes(vectors, K), 2 * kit.random.below(3));
    for (int64_t k = 0; k < K; k += 32)
      format.pack_columns(rows.data() + k, std::min<int64_t>(32, K - k), first, columns, vectors,
                          panel.data() + format.panel_bytes(vectors, k));
    panel.check_border("pack_columns");
    return panel;
  }
};

struct CountedWork : Deferred {
  int64_t done = 0;
  explicit CountedWork(int64_t pieces) : Deferred{&some_of_it, pieces} {}
  static void some_of_it(Deferred& deferred, int64_t pieces) {
    auto& work = static_cast<CountedWork&>(deferred);
    if (pieces <= 0 || work.left <= 0) fail("deferred work called with nothing to do");
    pieces = std::min(pieces, work.left);
    work.left -= pieces;
    work.done += pieces;
  }
};

// The memory of a tile's results, and its contents before the product.
struct Out {
  int64_t stride, width;
  Numbers memory, before;

  Out(Kit& kit, int rows, int vectors, bool exact)
      : stride(vectors * kit.lanes + kit.random.below(3)),
        width(vectors * kit.lanes),
        memory(kit.A, (rows - 1) * stride + width, kit.random.below(2)),
        before(kit.numbers(kit.A, rows * width, exact)) {}
  // Without this call the memory holds NaN.
  void fill(int rows) {
    for (int i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; ++j) memory.set(i * stride + j, before[i * width + j]);
  }
  void check_gaps(const char* what, int rows) const {
    memory.check_border(what);
    for (int i = 0; i + 1 < rows; ++i)
      memory.check_not_written(what, i * stride + width, (i + 1) * stride);
  }
};

void check_tile(Kit& kit, const WeightFormat& format, int vectors, int rows, int64_t K, bool exact,
                bool add, bool has_bias) {
  const bool equal = kit.random.coin();
  now("%s K=%lld, %d rows, %d vectors, exact=%d add=%d bias=%d equal=%d", format.name, (long long)K,
      rows, vectors, exact, add, has_bias, equal);
  const Lhs lhs(kit, format, rows, K, exact, equal);
  const Rhs rhs(kit, vectors, K, exact);
  const Buffer panel = rhs.pack(kit, format, vectors);
  const Numbers bias = kit.numbers(kit.A, vectors * kit.lanes, exact, kit.random.below(2));
  Out out(kit, rows, vectors, exact);
  if (add) out.fill(rows);
  CountedWork work(kit.random.below(40));
  const int64_t pieces = work.left;
  // The length of a chain, in words (steps in split precision): for one chain, or several.
  const int64_t chain = kit.random.coin() ? format.chain : format.converts_lhs ? 1 : 16;
  TileOptions options{.chain = chain, .add = add};
  if (kit.random.coin()) options.deferred = &work;
  if (kit.random.coin()) {
    options.prefetch = panel.data() + panel.bytes() / 2;
    options.prefetch_bytes = kit.random.below(20000);
  }
  const TileFunction tile = format.tiles[vectors - 1][rows - 1];
  const void* given_bias = has_bias ? bias.data() : nullptr;
  tile(rows, K, lhs.rows.data(), panel.data(), given_bias, out.memory.data(), out.stride, options);
  out.check_gaps("out", rows);
  const double tolerance = exact ? 0 : double(K + 4) * epsilon(kit.A);
  for (int i = 0; i < rows; ++i)
    for (int64_t j = 0; j < out.width; ++j) {
      Sum sum;
      for (int64_t k = 0; k < K; ++k) sum.add((long double)lhs.sources[size_t(i)][k] * rhs(k, j));
      if (has_bias) sum.add(bias[j]);
      if (add) sum.add(out.before[i * out.width + j]);
      expect("out", i, j, out.memory[i * out.stride + j], sum, tolerance);
    }
  const bool runs_deferred = format.defers && options.deferred && K >= 32;
  if (!format.defers && work.done > 0) fail("deferred work was done");
  if (runs_deferred && work.done != pieces)
    fail("%lld of %lld pieces of deferred work done", (long long)work.done, (long long)pieces);

  // The bits must not depend on the tile's rows and vectors, on the distances of rows, or on
  // options.
  std::vector<Buffer> copies;
  Numbers one(kit.A, kit.lanes);
  const int64_t step_bytes = format.panel_step_bytes, steps = format.steps(K);
  Buffer vector(steps * step_bytes);
  const int j = int(kit.random.below(vectors));
  for (int64_t step = 0; step < steps; ++step)
    std::memcpy(vector.data() + step * step_bytes, panel.data() + (step * vectors + j) * step_bytes,
                size_t(step_bytes));
  const TileOptions alone{.chain = chain, .add = add};
  for (int i = 0; i < rows; ++i) {
    for (int64_t lane = 0; add && lane < kit.lanes; ++lane)
      one.set(lane, out.before[i * out.width + j * kit.lanes + lane]);
    format.tiles[0][0](1, K, &lhs.rows[size_t(i)], vector.data(),
                       has_bias ? bias.at(j * kit.lanes) : nullptr, one.data(), kit.lanes, alone);
    if (std::memcmp(one.data(), out.memory.at(i * out.stride + j * kit.lanes),
                    size_t(one.bytes())) != 0)
      fail("row %d, vector %d has other bits than alone", i, j);
  }
}

// Columns [gate][unit] of a panel of weights (G*H, K).
struct Gates {
  GateShape shape;
  int64_t panel, K;
  int lanes;
  const Numbers& w;

  int64_t panel_units() const { return int64_t(shape.unit_vectors) * lanes; }
  int vectors() const {
    if (shape.gates > 1) return shape.gates;
    return int(std::min(panel_units(), shape.H - panel * panel_units()) + lanes - 1) / lanes;
  }
  int64_t full_width() const { return shape.gates * panel_units(); }
  // The row of w for column j of the panel, or -1 beyond H.
  int64_t row(int64_t j) const {
    const int64_t unit = panel * panel_units() + j % panel_units();
    return unit < shape.H ? j / panel_units() * shape.H + unit : -1;
  }
};

// Calls f(shape, panels) for some sizes of H and every number of gates.
template <class F>
void for_shapes(const Kit& kit, F&& f) {
  const int64_t lanes = kit.lanes;
  for (int gates = 1; gates <= 4; ++gates)
    for (const int64_t H : {int64_t(1), lanes - 1, lanes, lanes + 1, 3 * lanes + 1, 4 * lanes,
                            4 * lanes + 3, 9 * lanes - 1}) {
      const GateShape shape{H, gates, gates == 1 ? 4 : 1};
      const int64_t units = shape.unit_vectors * lanes;
      f(shape, (H + units - 1) / units);
    }
}

}  // namespace

// Checks every tile of every format.
RNNFAST_CHECK(products) {
  for (const WeightFormat* format : kit.formats())
    for (int vectors = 1; vectors <= kMaxTileVectors; ++vectors) {
      const int height = format->tile_rows[vectors - 1];
      if (height > kMaxTileRows) fail("too high a tile");
      for (int rows = 1; rows <= height; ++rows)
        for (const int64_t K : {0, 1, 2, 17, 31, 32, 33, 95, 600}) {
          // Other options are random, since all combinations would take too long.
          if (K == 600 && (rows + vectors) % 8 != 0) continue;
          for (const bool exact : {true, false}) {
            const bool add = kit.random.coin();
            check_tile(kit, *format, vectors, rows, K, exact, add, !add && kit.random.coin());
          }
        }
    }
}

// Checks the lengths of chains: a small number is lost only if it is added to a large one of its
// chain.
RNNFAST_CHECK(chains) {
  const int digits = kit.A == Dtype::kFloat64 ? 53 : 24;
  for (const WeightFormat* format : kit.formats()) {
    if (format->defers && !format->converts_lhs) continue;  // AMX adds whole steps of pairs
    for (const int64_t chain : {8, 4}) {
      now("%s, 8 terms in chains of %lld", format->name, (long long)chain);
      const int64_t K = 8 * format->step;
      Numbers lhs(kit.S, K), rhs(kit.S, K);
      for (int64_t k = 0; k < K; ++k) {
        lhs.set(k, k == 0 ? std::exp2(digits / 2) : k % format->step == 0);
        rhs.set(k, k == 0 ? std::exp2(digits - digits / 2) : 1);
      }
      Buffer row(format->row_bytes(K)), panel(format->panel_bytes(1, K));
      format->load_lhs(row.data(), lhs.data(), K);
      format->pack_gates({1, 1, 4}, rhs.data(), K, 0, panel.data());
      Numbers out(kit.A, kit.lanes);
      const void* rows[] = {row.data()};
      format->tiles[0][0](1, K, rows, panel.data(), nullptr, out.data(), kit.lanes, {chain});
      expect_same("out", 0, out[0], std::exp2(digits) + (chain == 8 ? 0 : 4));
    }
  }
}

// Formats must report numbers that they cannot represent, and no others.
RNNFAST_CHECK(representations) {
  for (const WeightFormat* format : kit.formats()) {
    const bool is_split = format->converts_lhs;
    for (const int64_t K : {1, 16, 17, 40})
      for (const int64_t at : {int64_t(0), K / 2, K - 1})
        for (const double value : {double(INFINITY), -double(INFINITY), double(NAN),
                                   double(std::numeric_limits<float>::max()), 3.3e38}) {
          now("%s K=%lld, %g at %lld", format->name, (long long)K, value, (long long)at);
          Numbers row = kit.numbers(kit.S, K, false);
          row.set(at, value);
          const bool has = !is_split || value == 3.3e38;
          Buffer lhs(format->row_bytes(K) - format->row_extra_bytes);
          if (format->load_lhs(lhs.data(), row.data(), K) != has) fail("load_lhs");
          Buffer panel(format->panel_bytes(1, K));
          if (format->pack_gates({1, 1, 4}, row.data(), K, 0, panel.data()) != has)
            fail("pack_gates");
        }
  }
}

// Checks weights in panels of units: packing, and the product with a bias.
RNNFAST_CHECK(gates) {
  for (const WeightFormat* format : kit.formats())
    for_shapes(kit, [&](const GateShape& shape, int64_t panels) {
      for (const int64_t K : {1, 2, 15, 16, 17, 33, 70}) {
        const bool exact = kit.random.coin();
        const Numbers w = kit.numbers(kit.S, shape.gates * shape.H * K, exact, K % 2);
        const Numbers bias = kit.numbers(kit.S, shape.gates * shape.H, exact);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const Gates of{shape, panel, K, kit.lanes, w};
          const int vectors = of.vectors(), rows = int(kit.random.below(3)) + 1;
          now("%s H=%lld, %d gates, panel %lld, K=%lld, exact=%d", format->name, (long long)shape.H,
              shape.gates, (long long)panel, (long long)K, exact);
          Buffer packed(format->panel_bytes(vectors, K), 2 * kit.random.below(3));
          if (!format->pack_gates(shape, w.data(), K, panel, packed.data())) fail("refused");
          packed.check_border("pack_gates");
          Numbers packed_bias(kit.A, of.full_width(), kit.random.below(2));
          kit.k.pack_bias(shape, bias.data(), panel, panel + 1, packed_bias.data());
          packed_bias.check_border("pack_bias");
          for (int64_t j = 0; j < of.full_width(); ++j)
            expect_same("bias", j, packed_bias[j], of.row(j) < 0 ? 0 : bias[of.row(j)]);
          const Lhs lhs(kit, *format, rows, K, exact, true);
          Out out(kit, rows, vectors, exact);
          format->tiles[vectors - 1][rows - 1](rows, K, lhs.rows.data(), packed.data(),
                                               packed_bias.data(), out.memory.data(), out.stride,
                                               {format->chain});
          out.check_gaps("out", rows);
          for (int i = 0; i < rows; ++i)
            for (int64_t j = 0; j < out.width; ++j) {
              Sum sum;
              const int64_t row = of.row(j);
              for (int64_t k = 0; row >= 0 && k < K; ++k)
                sum.add((long double)lhs.sources[size_t(i)][k] * w[row * K + k]);
              if (row >= 0) sum.add(bias[row]);
              expect("out", i, j, out.memory[i * out.stride + j], sum,
                     exact ? 0 : double(K + 4) * epsilon(kit.A));
            }
        }
      }
    });
}

// Checks pack_bias for all panels at once, and zeros instead of a bias.
RNNFAST_CHECK(biases) {
  for_shapes(kit, [&](const GateShape& shape, int64_t panels) {
    const Numbers bias = kit.numbers(kit.S, shape.gates * shape.H, false, 1);
    for (const bool there : {true, false})
      for (int64_t begin = 0; begin <= panels; ++begin) {
        now("H=%lld, %d gates, panels from %lld on, bias=%d", (long long)shape.H, shape.gates,
            (long long)begin, there);
        const int64_t width = Gates{shape, 0, 0, kit.lanes, bias}.full_width();
        Numbers to(kit.A, (panels - begin) * width, 1);
        kit.k.pack_bias(shape, there ? bias.data() : nullptr, begin, panels, to.data());
        to.check_border("pack_bias");
        for (int64_t j = 0; j < to.count(); ++j) {
          const int64_t row = Gates{shape, begin + j / width, 0, kit.lanes, bias}.row(j % width);
          expect_same("bias", j, to[j], there && row >= 0 ? bias[row] : 0);
        }
      }
  });
}

// Checks gather_tokens and gather_gates.
RNNFAST_CHECK(gathers) {
  for_shapes(kit, [&](const GateShape& shape, int64_t panels) {
    const int count = int(kit.random.below(4)) + 1;
    const auto tokens = kit.rows(kit.S, count, shape.gates * shape.H, false);
    const auto projected = kit.rows(kit.A, count, shape.gates * shape.H, false);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Gates of{shape, panel, 0, kit.lanes, tokens[0]};
      const int64_t width = of.full_width(), used = int64_t(of.vectors()) * kit.lanes;
      now("H=%lld, %d gates, panel %lld, %d rows", (long long)shape.H, shape.gates,
          (long long)panel, count);
      const bool has_bias = kit.random.coin();
      const Numbers bias = kit.numbers(kit.S, shape.gates * shape.H, false, kit.random.below(2));
      for (const bool from_tokens : {true, false}) {
        const auto& rows = from_tokens ? tokens : projected;
        Numbers to(kit.A, (count - 1) * width + used, kit.random.below(2));
        if (from_tokens)
          kit.k.gather_tokens(shape, pointers(rows).data(), count, nullptr,
                              has_bias ? bias.data() : nullptr, panel, to.data());
        else
          kit.k.gather_gates(shape, pointers(rows).data(), count, panel, to.data());
        to.check_border("to");
        for (int i = 0; i < count; ++i) {
          if (i + 1 < count) to.check_not_written("to", i * width + used, (i + 1) * width);
          for (int64_t j = 0; j < used; ++j) {
            Sum sum;
            if (of.row(j) >= 0) sum.add(rows[size_t(i)][of.row(j)]);
            if (from_tokens && has_bias && of.row(j) >= 0) sum.add(bias[of.row(j)]);
            expect("to", i, j, to[i * width + j], sum, epsilon(kit.A));
          }
        }
      }
    }
  });
}

// Checks products with unpacked weights.
RNNFAST_CHECK(dots) {
  if (kit.k.dot_rows < 1 || kit.k.dot_rows > 4) fail("dot_rows");
  const int64_t lanes = kit.lanes;
  const auto check = [&](const GateShape& shape, int64_t panel, int rows, int64_t K) {
    const bool exact = kit.random.coin();
    now("H=%lld, %d gates, panel %lld, K=%lld, %d rows, exact=%d", (long long)shape.H, shape.gates,
        (long long)panel, (long long)K, rows, exact);
    const Numbers w = kit.numbers(kit.S, shape.gates * shape.H * K, exact, kit.random.below(2));
    const Gates of{shape, panel, K, kit.lanes, w};
    const auto lhs = kit.rows(kit.E, rows, K, exact);
    const Numbers bias = kit.numbers(kit.A, of.vectors() * lanes, exact, kit.random.below(2));
    Out out(kit, rows, of.vectors(), exact);
    kit.k.dots(shape, rows, K, pointers(lhs).data(), w.data(), panel, bias.data(),
               out.memory.data(), out.stride);
    out.check_gaps("out", rows);
    for (int i = 0; i < rows; ++i)
      for (int64_t j = 0; j < out.width; ++j) {
        const int64_t row = of.row(j);
        if (row < 0) continue;  // a column beyond H, whose result is unspecified
        Sum sum;
        for (int64_t k = 0; k < K; ++k) sum.add((long double)lhs[size_t(i)][k] * w[row * K + k]);
        sum.add(bias[j]);
        expect("out", i, j, out.memory[i * out.stride + j], sum,
               exact ? 0 : double(K + 4) * epsilon(kit.A));
      }
  };
  for_shapes(kit, [&](const GateShape& shape, int64_t panels) {
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int rows = 1; rows <= kit.k.dot_rows; ++rows)
        for (const int64_t K : {int64_t(1), lanes - 1, lanes, lanes + 1, 3 * lanes + 1})
          check(shape, panel, rows, K);
  });
  // More than one chain in every lane.
  for (int rows = 1; rows <= kit.k.dot_rows; ++rows) check({5, 1, 4}, 0, rows, 300 * lanes + 3);
}

// Checks outer products of few rows.
RNNFAST_CHECK(outer_few) {
  const int64_t lanes = kit.lanes;
  for (int count = 1; count <= 4; ++count)
    for (const int64_t rows : {int64_t(1), lanes - 1, lanes, 2 * lanes + 1})
      for (int64_t columns = 1; columns <= 2 * lanes + 1; ++columns) {
        const int64_t begin = kit.random.below(3);
        const bool exact = kit.random.coin(), add = kit.random.coin();
        now("%d rows, %lld x %lld from %lld on, exact=%d, add=%d", count, (long long)rows,
            (long long)columns, (long long)begin, exact, add);
        const auto lhs = kit.rows(kit.E, count, begin + rows, exact);
        const auto rhs = kit.rows(kit.S, count, columns, exact);
        const Numbers before = kit.numbers(kit.A, rows * columns, exact);
        Numbers to(kit.A, rows * columns, kit.random.below(2));
        if (add) std::memcpy(to.data(), before.data(), size_t(to.bytes()));
        kit.k.outer_few(pointers(lhs).data(), pointers(rhs).data(), count, begin, rows, columns,
                        to.data(), add);
        to.check_border("to");
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t n = 0; n < columns; ++n) {
            Sum sum;
            for (size_t r = 0; r < size_t(count); ++r)
              sum.add((long double)lhs[r][begin + i] * rhs[r][n]);
            if (add) sum.add(before[i * columns + n]);
            expect("to", i, n, to[i * columns + n], sum, exact ? 0 : 8 * epsilon(kit.A));
          }
      }
}

// Checks transpose_lhs and sum_lhs.
RNNFAST_CHECK(transposed) {
  const int64_t lanes = kit.lanes;
  for (const WeightFormat* format : kit.formats())
    for (const int64_t count : {int64_t(1), int64_t(2), lanes - 1, lanes, lanes + 1, 2 * lanes + 1})
      for (int64_t n = 1; n <= 2 * lanes + 1; ++n) {
        const int64_t begin = kit.random.below(3);
        now("%s, %lld rows, %lld elements from %lld on", format->name, (long long)count,
            (long long)n, (long long)begin);
        const auto rows = kit.rows(kit.E, count, begin + n, true);
        // Rows are filled to whole vectors of words.
        const int64_t whole = format->converts_lhs ? format->step : lanes * format->word;
        const int64_t depth = (count + whole - 1) / whole * whole;
        const int64_t bytes = format->steps(depth) * format->row_step_bytes;
        const int64_t pitch = bytes + 4 * kit.random.below(20);
        Buffer to((n - 1) * pitch + bytes, 2 * kit.random.below(3));
        format->transpose_lhs(pointers(rows).data(), count, begin, begin + n, to.data(), pitch);
        to.check_border("to");
        Numbers sums(kit.A, n, kit.random.below(2));
        format->sum_lhs(to.data(), pitch, n, count, sums.data());
        sums.check_border("sums");
        for (int64_t m = 0; m < n; ++m) {
          Numbers column(kit.S, depth);
          Sum sum;
          for (int64_t k = 0; k < depth; ++k)
            column.set(k, k < count ? rows[size_t(k)][begin + m] : 0);
          for (int64_t k = 0; k < count; ++k) sum.add(column[k]);
          expect("sums", m, 0, sums[m], sum, 0);
          Buffer row(bytes);
          format->load_lhs(row.data(), column.data(), depth);
          if (std::memcmp(row.data(), to.data() + m * pitch, size_t(bytes)) != 0)
            fail("row %lld is not the column", (long long)m);
          if (m + 1 < n) to.check_untouched("to", m * pitch + bytes, (m + 1) * pitch);
        }
      }
}
