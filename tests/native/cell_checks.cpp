// Checks of the cells' functions on tiles, against their formulas in long double. See checks.h.
#include <algorithm>

#include "native/checks.h"

using namespace rnnfast;
using namespace rnnfast::cpu;
using namespace rnnfast::cpu::checks;

namespace {

using Real = long double;

Real sigmoid(Real x) { return 1 / (1 + std::exp(-x)); }

// ---- the formulas, of one unit ----

struct Step {
  Real h = 0, c = 0, saved[4] = {};
};
// x and h are W_ih x + b_ih and W_hh h + b_hh, one number per gate.
Step step(CellKind cell, const Real* x, const Real* h, Real h_prev, Real c_prev) {
  Step s;
  if (cell == CellKind::kElmanTanh) s.h = std::tanh(x[0] + h[0]);
  if (cell == CellKind::kElmanRelu) s.h = std::max<Real>(0, x[0] + h[0]);
  if (cell == CellKind::kGru) {
    const Real r = sigmoid(x[0] + h[0]), z = sigmoid(x[1] + h[1]), n = std::tanh(x[2] + r * h[2]);
    s = {(1 - z) * n + z * h_prev, 0, {n, r, z, h[2]}};
  }
  if (cell == CellKind::kLstm) {
    const Real i = sigmoid(x[0] + h[0]), f = sigmoid(x[1] + h[1]), g = std::tanh(x[2] + h[2]),
               o = sigmoid(x[3] + h[3]);
    s.c = f * c_prev + i * g;
    s = {o * std::tanh(s.c), s.c, {i, f, g, o}};
  }
  return s;
}

struct Gradients {
  Real d_gates[4] = {}, d_c = 0, d_h_direct = 0, output = 0;
};
Gradients step_back(CellKind cell, const Real* saved, Real h, Real h_prev, Real c, Real c_prev,
                    Real d_h, Real d_c) {
  Gradients d;
  if (cell == CellKind::kElmanTanh) d.d_gates[0] = d_h * (1 - h * h);
  if (cell == CellKind::kElmanRelu) d.d_gates[0] = h > 0 ? d_h : 0;
  if (cell == CellKind::kGru) {
    const Real n = saved[0], r = saved[1], z = saved[2], hn = saved[3];
    const Real d_a = d_h * (1 - z) * (1 - n * n);
    d.d_gates[0] = d_a;
    d.d_gates[1] = d_a * hn * r * (1 - r);
    d.d_gates[2] = d_h * (h_prev - n) * z * (1 - z);
    d.d_gates[3] = d_a * r;
    d.d_h_direct = d_h * z;
  }
  if (cell == CellKind::kLstm) {
    const Real i = saved[0], f = saved[1], g = saved[2], o = saved[3], t = std::tanh(c);
    const Real all = d_c + d_h * o * (1 - t * t);
    d.d_gates[0] = all * g * i * (1 - i);
    d.d_gates[1] = all * c_prev * f * (1 - f);
    d.d_gates[2] = all * i * (1 - g * g);
    d.d_gates[3] = d_h * t * o * (1 - o);
    d.d_c = all * f;
    d.output = o * t;
  }
  return d;
}

// The numbers that every cell should have, written out, so that a wrong trait does not pass.
Cell numbers_of(CellKind cell) {
  switch (cell) {
    case CellKind::kGru:
      return {3, 4, 4, 0, 0, true, false, 0, true, {2, 0, 1}};
    case CellKind::kLstm:
      return {4, 4, 4, 1, 0, false, false, 0, true, {0, 1, 2, 3}};
    default:
      return {1, 0, 1, 0, 0, false, true, 0, true, {0}};
  }
}

// ---- tiles ----

// Tolerates the rounding errors of numbers of about 1 in A, and of a rounding to S unless the
// result is of type A.
void expect_near(const Kit& kit, const char* what, int64_t row, int64_t unit, const Numbers& actual,
                 int64_t i, Real expected, bool rounded = true) {
  Sum sum;
  sum.value = expected;
  sum.magnitude = std::max<Real>(1, std::fabs(expected));
  const double rounding = rounded && kit.S != kit.A ? 2 * epsilon(kit.S) : 0;
  expect(what, row, unit, actual[i], sum, 16 * epsilon(kit.A) + rounding);
}

// The position of a tile in a layer.
struct Place {
  int64_t H, first, units, whole;  // whole: units, rounded up to whole vectors

  Place(const Kit& kit, const Cell& cell, int64_t panel, int64_t H_) : H(H_) {
    const int64_t width = (cell.gates == 1 ? 4 : 1) * kit.lanes;
    first = panel * width;
    units = std::min(width, H - first);
    whole = (units + kit.lanes - 1) / kit.lanes * kit.lanes;
  }
  // The length of a row with room for whole vectors.
  int64_t room() const { return std::max(H, first + whole); }
};

struct OfCell {
  CellKind kind;
  const CellFunctions& functions;
  const Cell& cell;
  int unit_vectors;

  OfCell(const Kit& kit, int i)
      : kind(CellKind(i)),
        functions(kit.k.cells[i]),
        cell(functions.cell),
        unit_vectors(cell.gates == 1 ? 4 : 1) {
    const Cell expected = numbers_of(kind);
    if (cell.gates != expected.gates || cell.saved != expected.saved ||
        cell.grad_blocks != expected.grad_blocks || cell.cells != expected.cells ||
        cell.parameters != expected.parameters || cell.norm_eps != expected.norm_eps ||
        cell.recurrent != expected.recurrent || cell.direct != expected.direct ||
        cell.reads_h != expected.reads_h ||
        !std::equal(cell.input_gate, cell.input_gate + cell.gates, expected.input_gate))
      fail("numbers of cell %d", i);
  }
};

// Calls f(cell, place) for every cell, and for tiles of every number of units.
template <class F>
void for_places(Kit& kit, F&& f) {
  for (int i = 0; i < kCellKinds; ++i) {
    const OfCell of(kit, i);
    for (int64_t units = 1; units <= of.unit_vectors * kit.lanes; ++units)
      for (const int64_t panel : {0, 1}) {
        // The tile has the last units of the layer, or there are others beyond it.
        const int64_t before = panel * of.unit_vectors * kit.lanes;
        f(of, Place(kit, of.cell, panel, before + units));
      }
    f(of, Place(kit, of.cell, 1, 3 * of.unit_vectors * kit.lanes + 1));
  }
}

// One row of a forward tile, with its own memory.
struct RowForward {
  Numbers h_prev, c_prev, h, c, saved, c_copy;
  std::vector<Real> h_before, c_before;
  ForwardRow row;

  // The bits of `options` omit h, c, saved, c_copy and c_prev, and make the update in place.
  RowForward(Kit& kit, const Cell& cell, const Place& at, int options)
      : h_prev(kit.E, at.H, kit.random.below(2)),
        c_prev(kit.A, at.H, kit.random.below(2)),
        h(kit.E, at.room(), kit.random.below(2)),
        c(kit.A, at.room(), kit.random.below(2)),
        saved(kit.S, cell.saved * at.H, kit.random.below(2)),
        c_copy(kit.A, at.H, kit.random.below(2)) {
    const bool in_place = options & 32;
    Numbers& from_h = in_place && cell.direct ? h : h_prev;
    Numbers& from_c = in_place ? c : c_prev;
    for (int64_t u = at.first; u < at.first + at.units; ++u) {
      from_h.set(u, kit.random.real());
      from_c.set(u, kit.random.real());
      h_before.push_back(from_h[u]);
      c_before.push_back(options & 16 ? 0 : from_c[u]);
    }
    row = {.h_prev = cell.direct ? from_h.data() : nullptr,
           .c_prev = cell.cells > 0 && !(options & 16) ? from_c.data() : nullptr,
           .h = options & 1 ? nullptr : h.data(),
           .c = options & 2 ? nullptr : c.data(),
           .saved = options & 4 ? nullptr : saved.data(),
           .c_copy = options & 8 ? nullptr : c_copy.data()};
  }
  void check_around(const Cell& cell, const Place& at, bool half_states) const {
    const auto check = [&](const char* what, const Numbers& memory, int64_t begin, int64_t end) {
      memory.check_border(what);
      memory.check_not_written(what, 0, begin);
      memory.check_not_written(what, end, memory.count());
    };
    check("h_prev", h_prev, at.first, at.first + at.units);
    check("h", h, at.first, at.first + (half_states ? at.units : at.whole));
    check("c", c, at.first, at.first + at.whole);
    check("c_copy", c_copy, at.first, at.first + at.units);
    saved.check_border("saved");
    for (int k = 0; k < cell.saved; ++k) {
      saved.check_not_written("saved", k * at.H, k * at.H + at.first);
      saved.check_not_written("saved", k * at.H + at.first + at.units, (k + 1) * at.H);
    }
  }
};

struct GateInputs {
  int64_t stride;
  Numbers memory;
  // Rows end with the last vector that has units.
  GateInputs(Kit& kit, const OfCell& of, const Place& at, int count, Real scale)
      : stride(of.cell.gates * of.unit_vectors * kit.lanes + kit.random.below(2)),
        memory(kit.A,
               (count - 1) * stride + (of.cell.gates - 1) * of.unit_vectors * kit.lanes + at.whole,
               kit.random.below(2)) {
    for (int64_t i = 0; i < memory.count(); ++i) memory.set(i, double(scale) * kit.random.real());
  }
  Real at(const Kit& kit, const OfCell& of, int64_t row, int gate, int64_t unit) const {
    return memory[row * stride + gate * of.unit_vectors * kit.lanes + unit];
  }
};

}  // namespace

// Checks sigmoid and tanh over their whole range, through an LSTM's first gate and an Elman cell.
RNNFAST_CHECK(activations) {
  if (kit.S != kit.A) return;
  const bool is_double = kit.A == Dtype::kFloat64;
  std::vector<double> points{0, -0., INFINITY, -INFINITY, NAN, 1e-40, -1e-40, 1e300, -1e300};
  for (int i = -4000; i <= 4000; ++i) points.push_back(i * (is_double ? 0.2 : 0.03));
  for (int i = -60; i < 4; ++i)
    for (const double factor : {1., 1.3, 1.7, -1., -1.3}) points.push_back(std::ldexp(factor, i));
  // Evaluates all points, in tiles of a vector. The other operand of the gates' sums is zero.
  const auto run = [&](CellKind kind) {
    const OfCell of(kit, int(kind));
    const Place at(kit, of.cell, 0, kit.lanes);
    RowForward row(kit, of.cell, at, 0);
    GateInputs from_x(kit, of, at, 1, 0);
    const GateInputs from_h(kit, of, at, 1, 0);
    std::vector<double> found;
    for (size_t first = 0; first < points.size(); first += size_t(kit.lanes)) {
      for (int64_t i = 0; i < kit.lanes; ++i)
        from_x.memory.set(i, points[std::min(first + size_t(i), points.size() - 1)]);
      of.functions.forward(
          {at.H, 0, at.units, &row.row, 1, from_x.memory.data(), 0, from_h.memory.data(), 0});
      const Numbers& result = kind == CellKind::kLstm ? row.saved : row.h;
      for (int64_t i = 0; i < kit.lanes; ++i) found.push_back(result[i]);
    }
    return found;
  };
  const std::vector<double> of_sigmoid = run(CellKind::kLstm), of_tanh = run(CellKind::kElmanTanh);
  for (size_t i = 0; i < points.size(); ++i) {
    const double x = is_double ? points[i] : double(float(points[i]));
    now("at %.17g", x);
    // Where exp underflows to zero, results may be off by the smallest normal number.
    const Real smallest = is_double ? 0x1p-1020L : 0x1p-124L;
    const auto check = [&](const char* what, double actual, Real expected) {
      if (std::isnan(expected)
              ? std::isnan(actual)
              : std::fabs(actual - expected) <= 8 * epsilon(kit.A) * std::fabs(expected) + smallest)
        return;
      fail("%s is %.17g, not %.17g", what, actual, double(expected));
    };
    check("sigmoid", of_sigmoid[i], sigmoid(x));
    check("tanh", of_tanh[i], std::tanh(Real(x)));
  }
}

// Every cell, in tiles of every number of units.
RNNFAST_CHECK(forward) {
  for_places(kit, [&](const OfCell& of, const Place& at) {
    const int options = int(kit.random.below(64)), count = int(kit.random.below(8)) + 1;
    now("cell %d, H=%lld, %lld units from %lld on, %d rows, options %d", int(of.kind),
        (long long)at.H, (long long)at.units, (long long)at.first, count, options);
    std::vector<RowForward> rows;
    std::vector<ForwardRow> of_rows;
    for (int r = 0; r < count; ++r) rows.emplace_back(kit, of.cell, at, options);
    for (const RowForward& row : rows) of_rows.push_back(row.row);
    const GateInputs from_x(kit, of, at, count, 2), from_h(kit, of, at, count, 2);
    of.functions.forward({at.H, at.first, at.units, of_rows.data(), count, from_x.memory.data(),
                          from_x.stride, from_h.memory.data(), from_h.stride});
    for (int r = 0; r < count; ++r) {
      const RowForward& row = rows[size_t(r)];
      row.check_around(of.cell, at, kit.E != kit.A);
      for (int64_t u = 0; u < at.units; ++u) {
        Real x[4], h[4];
        for (int g = 0; g < of.cell.gates; ++g) {
          x[g] = from_x.at(kit, of, r, g, u);
          h[g] = from_h.at(kit, of, r, g, u);
        }
        const Step s = step(of.kind, x, h, row.h_before[size_t(u)], row.c_before[size_t(u)]);
        if (row.row.h) expect_near(kit, "h", r, u, row.h, at.first + u, s.h);
        if (of.cell.cells > 0 && row.row.c)
          expect_near(kit, "c", r, u, row.c, at.first + u, s.c, false);
        if (of.cell.cells > 0 && row.row.c_copy)
          expect_near(kit, "c_copy", r, u, row.c_copy, at.first + u, s.c, false);
        for (int k = 0; row.row.saved && k < of.cell.saved; ++k)
          expect_near(kit, "saved", r, u, row.saved, k * at.H + at.first + u, s.saved[k]);
      }
      // The bits must be those of a row by itself.
      RowForward alone(kit, of.cell, at, options & 31);
      for (int64_t u = 0; u < at.units; ++u) {
        alone.h_prev.set(at.first + u, double(row.h_before[size_t(u)]));
        alone.c_prev.set(at.first + u, double(row.c_before[size_t(u)]));
      }
      of.functions.forward({at.H, at.first, at.units, &alone.row, 1,
                            from_x.memory.at(r * from_x.stride), 0,
                            from_h.memory.at(r * from_h.stride), 0});
      const auto same = [&](const Numbers& a, const Numbers& b, int64_t i) {
        if (std::memcmp(a.at(i), b.at(i), size_t(size_of(a.type))) != 0)
          fail("row %d, number %lld has other bits than alone", r, (long long)i);
      };
      for (int64_t u = at.first; u < at.first + at.units; ++u) {
        if (row.row.h) same(alone.h, row.h, u);
        if (of.cell.cells > 0 && row.row.c) same(alone.c, row.c, u);
        for (int k = 0; row.row.saved && k < of.cell.saved; ++k)
          same(alone.saved, row.saved, k * at.H + u);
      }
    }
  });
}

// Every cell, in tiles of every number of units.
RNNFAST_CHECK(backward) {
  for_places(kit, [&](const OfCell& of, const Place& at) {
    const Cell& cell = of.cell;
    const int count = int(kit.random.below(4)) + 1;
    now("cell %d, H=%lld, %lld units from %lld on, %d rows", int(of.kind), (long long)at.H,
        (long long)at.units, (long long)at.first, count);
    // Rows that may be read only to their end, and rows that may be read in whole vectors.
    struct Row {
      Numbers saved, h, h_prev, c, c_prev, grad_c, grad_y, d_h_rest, d_gates, d_c, d_h_direct,
          output, d_c_before, d_h_before;
    };
    std::vector<Row> rows;
    std::vector<BackwardRow> of_rows;
    const int64_t stride = at.whole + kit.random.below(3);
    const Numbers from_weights =
        kit.numbers(kit.A, (count - 1) * stride + at.whole, false, kit.random.below(2));
    for (int r = 0; r < count; ++r) {
      const auto full = [&](Dtype type, int64_t n) {
        return kit.numbers(type, n, false, kit.random.below(2));
      };
      const auto empty = [&](Dtype type, int64_t n) {
        return Numbers(type, n, kit.random.below(2));
      };
      rows.push_back({full(kit.S, cell.saved * at.H), full(kit.S, at.H), full(kit.S, at.H),
                      full(kit.A, at.H), full(kit.A, at.H), full(kit.A, at.H), full(kit.S, at.H),
                      full(kit.A, at.room()), empty(kit.E, cell.grad_blocks * at.H),
                      full(kit.A, at.room()), empty(kit.A, at.room()), empty(kit.S, at.H),
                      empty(kit.A, at.room()), empty(kit.A, at.room())});
      Row& row = rows.back();
      std::memcpy(row.d_c_before.data(), row.d_c.data(), size_t(row.d_c.bytes()));
      std::memcpy(row.d_h_before.data(), row.d_h_rest.data(), size_t(row.d_h_rest.bytes()));
      const auto maybe = [&](Numbers& from) { return kit.random.coin() ? from.data() : nullptr; };
      // d_h_rest and d_h_direct may be the same memory, as in the driver.
      Numbers& direct = kit.random.coin() ? row.d_h_rest : row.d_h_direct;
      of_rows.push_back({.saved = row.saved.data(),
                         .h = cell.reads_h ? row.h.data() : nullptr,
                         .h_prev = cell.direct ? row.h_prev.data() : nullptr,
                         .c = cell.cells > 0 ? row.c.data() : nullptr,
                         .c_prev = cell.cells > 0 ? row.c_prev.data() : nullptr,
                         .grad_c = cell.cells > 0 ? maybe(row.grad_c) : nullptr,
                         .grad_y = maybe(row.grad_y),
                         .d_h_rest = maybe(row.d_h_rest),
                         .takes_weights = kit.random.coin(),
                         .cut = kit.random.below(4) == 0,
                         .d_gates = row.d_gates.data(),
                         .d_c = cell.cells > 0 ? row.d_c.data() : nullptr,
                         .d_h_direct = cell.direct ? direct.data() : nullptr,
                         .output = cell.cells > 0 ? maybe(row.output) : nullptr});
    }
    const bool has_weights = kit.random.below(4) > 0;
    of.functions.backward({at.H, at.first, at.units, of_rows.data(), count,
                           has_weights ? from_weights.data() : nullptr, stride});
    for (int r = 0; r < count; ++r) {
      const Row& row = rows[size_t(r)];
      const BackwardRow& given = of_rows[size_t(r)];
      const Numbers& direct =
          given.d_h_direct == row.d_h_rest.data() ? row.d_h_rest : row.d_h_direct;
      for (int64_t u = 0; u < at.units; ++u) {
        const int64_t i = at.first + u;
        Real saved[4] = {};
        for (int k = 0; k < cell.saved; ++k) saved[k] = row.saved[k * at.H + i];
        const Real d_h =
            (given.grad_y ? Real(row.grad_y[i]) : 0) +
            (given.d_h_rest ? Real(row.d_h_before[i]) : 0) +
            (has_weights && given.takes_weights ? Real(from_weights[r * stride + u]) : 0);
        const Real d_c = row.d_c_before[i] + (given.grad_c ? Real(row.grad_c[i]) : 0);
        const Gradients d =
            step_back(of.kind, saved, row.h[i], row.h_prev[i], row.c[i], row.c_prev[i], d_h, d_c);
        for (int k = 0; k < cell.grad_blocks; ++k)
          expect_near(kit, "d_gates", r, u, row.d_gates, k * at.H + i, d.d_gates[k]);
        if (cell.cells > 0) expect_near(kit, "d_c", r, u, row.d_c, i, given.cut ? 0 : d.d_c, false);
        if (cell.direct)
          expect_near(kit, "d_h_direct", r, u, direct, i, given.cut ? 0 : d.d_h_direct, false);
        if (given.output) expect_near(kit, "output", r, u, row.output, i, d.output);
      }
      for (const Numbers* one :
           {&row.d_gates, &row.d_c, &row.d_h_direct, &row.output, &row.d_h_rest})
        one->check_border("a result");
      for (int k = 0; k < cell.grad_blocks; ++k) {
        row.d_gates.check_not_written("d_gates", k * at.H, k * at.H + at.first);
        row.d_gates.check_not_written("d_gates", k * at.H + at.first + at.units, (k + 1) * at.H);
      }
      row.output.check_not_written("output", 0, at.first);
      row.output.check_not_written("output", at.first + at.units, at.H);
      row.d_h_direct.check_not_written("d_h_direct", 0, at.first);
      row.d_h_direct.check_not_written("d_h_direct", at.first + at.whole, row.d_h_direct.count());
      for (const auto& [now_there, before] :
           {std::pair{&row.d_c, &row.d_c_before}, std::pair{&row.d_h_rest, &row.d_h_before}})
        for (int64_t i = 0; i < now_there->count(); ++i)
          if (i < at.first || i >= at.first + at.whole)
            expect_same("beyond the tile", i, (*now_there)[i], (*before)[i]);
    }
  });
}

// The normalisation of the gates of a row, and its backward. What fills the last vectors of units
// is NaN and must not matter.
RNNFAST_CHECK(normalization) {
  for (const int G : {1, 3, 4}) {
    for (const int64_t H : {int64_t(1), int64_t(kit.lanes), int64_t(kit.lanes) + 3, int64_t(70)}) {
      const GateShape shape{H, G, G == 1 ? 4 : 1};
      const int64_t width = int64_t(shape.unit_vectors) * kit.lanes;
      const int64_t n = G * H, all = (H + width - 1) / width * width * G;
      const double eps = 0.01;
      now("%d gates of %lld units", G, (long long)H);
      const auto place = [&](int64_t i) {  // in a row of panels
        const int64_t gate = i / H, unit = i % H;
        return (unit / width * G + gate) * width + unit % width;
      };
      Numbers row(kit.A, all), weight(kit.A, all), bias(kit.A, all), saved(kit.S, n);
      Numbers before(kit.S, n), d_gates(kit.E, n), own_weight(kit.A, n), d_weight(kit.E, n),
          d_bias(kit.E, n);
      Numbers d_before(kit.E, n);
      for (int64_t i = 0; i < n; ++i) {
        row.set(place(i), kit.random.real());
        weight.set(place(i), kit.random.real());
        bias.set(place(i), kit.random.real());
        before.set(i, kit.random.real());
        own_weight.set(i, kit.random.real());
        d_gates.set(i, kit.random.real());
        d_before.set(i, d_gates[i]);
      }
      const auto moments = [&](auto&& value) {
        Real mean = 0, variance = 0;
        for (int64_t i = 0; i < n; ++i) mean += value(i) / Real(n);
        for (int64_t i = 0; i < n; ++i) variance += (value(i) - mean) * (value(i) - mean) / Real(n);
        return std::pair{mean, 1 / std::sqrt(variance + Real(eps))};
      };
      std::vector<Real> gates;
      for (int64_t i = 0; i < n; ++i) gates.push_back(row[place(i)]);
      const auto [mean, scale] = moments([&](int64_t i) { return gates[size_t(i)]; });
      kit.k.normalize_gates(shape, row.data(), weight.data(), bias.data(), eps, saved.data());
      for (int64_t i = 0; i < n; ++i) {
        const Real normal = (gates[size_t(i)] - mean) * scale;
        expect_near(kit, "saved", 0, i, saved, i, gates[size_t(i)]);
        expect_near(kit, "normalised", 0, i, row, place(i),
                    normal * weight[place(i)] + bias[place(i)], false);
      }
      const auto [mean_before, scale_before] = moments([&](int64_t i) { return Real(before[i]); });
      Real sum = 0, product = 0;
      const auto normal_of = [&, m = mean_before, s = scale_before](int64_t i) {
        return (before[i] - m) * s;
      };
      for (int64_t i = 0; i < n; ++i) {
        const Real d_normal = Real(d_before[i]) * own_weight[i];
        sum += d_normal / Real(n), product += d_normal * normal_of(i) / Real(n);
      }
      kit.k.normalize_gates_backward(n, d_gates.data(), before.data(), own_weight.data(), eps,
                                     d_weight.data(), d_bias.data());
      for (int64_t i = 0; i < n; ++i) {
        const Real d_normal = Real(d_before[i]) * own_weight[i];
        expect_near(kit, "d_gates", 0, i, d_gates, i,
                    (d_normal - sum - normal_of(i) * product) * scale_before);
        expect_near(kit, "d_weight", 0, i, d_weight, i, d_before[i] * normal_of(i));
        expect_near(kit, "d_bias", 0, i, d_bias, i, d_before[i]);
      }
      for (const Numbers* one : {&row, &saved, &d_gates, &d_weight, &d_bias})
        one->check_border("a result");
    }
  }
}
