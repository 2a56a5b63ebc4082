// Checks of the micro-kernels on rows: conversions between types, and sums. See checks.h.
#include "native/checks.h"

using namespace rnnfast;
using namespace rnnfast::cpu;
using namespace rnnfast::cpu::checks;

namespace {

using Convert = void (*)(void* to, const void* from, int64_t n);

// AVX512-BF16 converts subnormal numbers to zeros.
bool flushes(const Kit& kit) { return kit.S == Dtype::kBFloat16 && kit.E == Dtype::kBFloat16; }

double rounded(const Kit& kit, Dtype type, double value) {
  if (type == Dtype::kBFloat16 && flushes(kit) && std::fabs(value) < 0x1p-126)
    return std::copysign(0.0, value);
  char memory[8];
  put(type, memory, 0, value);
  return get(type, memory, 0);
}

// Checks rows of every length up to two vectors and one element. `through` is a type to which
// numbers are rounded on the way.
void check_rows(Kit& kit, const char* name, Convert convert, Dtype to, Dtype from, Dtype through) {
  for (int64_t n = 0; n <= 2 * kit.lanes + 1; ++n)
    for (const int slack : {0, 1}) {
      now("%s, %lld elements, slack %d", name, (long long)n, slack);
      const Numbers source = kit.numbers(from, n, false, slack);
      Numbers result(to, n, 1 - slack);
      convert(result.data(), source.data(), n);
      result.check_border(name);
      for (int64_t i = 0; i < n; ++i)
        expect_same(name, i, result[i], rounded(kit, to, rounded(kit, through, source[i])));
    }
}

// The expected sum of two numbers of A, of which one may be missing: it is rounded after each
// addition and then to the type `to`.
void expect_rounded_sum(Kit& kit, const Numbers& result, int64_t i, const Sum& sum) {
  expect("result", i, 0, result[i], sum,
         2 * epsilon(kit.A) + (result.type == kit.A ? 0 : epsilon(result.type)));
}

}  // namespace

// Checks load, store, load_state, store_state and round_state.
RNNFAST_CHECK(conversions) {
  check_rows(kit, "load", kit.k.load, kit.A, kit.S, kit.S);
  check_rows(kit, "store", kit.k.store, kit.S, kit.A, kit.A);
  check_rows(kit, "load_state", kit.k.load_state, kit.E, kit.S, kit.S);
  check_rows(kit, "store_state", kit.k.store_state, kit.S, kit.E, kit.E);
  check_rows(kit, "round_state", kit.k.round_state, kit.E, kit.A, kit.S);
  for (int64_t n = 0; n <= 2 * kit.lanes + 1; ++n) {
    now("load null, %lld elements", (long long)n);
    Numbers zeros(kit.A, n, 1);
    kit.k.load(zeros.data(), nullptr, n);
    zeros.check_border("load");
    for (int64_t i = 0; i < n; ++i) expect_same("load", i, zeros[i], 0);
  }
}

// Checks conversions of all numbers of a half type in both directions, and of the numbers halfway
// between neighbours, and next to those.
RNNFAST_CHECK(halves) {
  if (!kit.k.converts()) return;
  constexpr int64_t kAll = 65536;
  Numbers all(kit.S, kAll), wide(kit.A, kAll), back(kit.S, kAll);
  for (int64_t i = 0; i < kAll; ++i) std::memcpy(all.at(i), &i, 2);
  now("load of all numbers");
  kit.k.load(wide.data(), all.data(), kAll);
  for (int64_t i = 0; i < kAll; ++i)
    expect_same("number", i, wide[i], half_value(kit.S, uint16_t(i)));
  now("store of all numbers");
  kit.k.store(back.data(), wide.data(), kAll);
  for (int64_t i = 0; i < kAll; ++i) expect_same("number", i, back[i], rounded(kit, kit.S, all[i]));

  // Rounding treats 2^(exponent + 1) as the number after the largest one.
  for (const double sign : {1., -1.})
    for (const int part : {-1, 0, 1}) {
      now("store half way between numbers, sign %g, part %d", sign, part);
      Numbers between(kit.A, kAll / 2), result(kit.S, kAll / 2);
      const int infinite = int(half_bits(kit.S, INFINITY));
      for (int i = 0; i < infinite; ++i) {
        const double low = half_value(kit.S, uint16_t(i));
        const double below = i > 0 ? low - half_value(kit.S, uint16_t(i - 1)) : 0;
        const double high = i + 1 < infinite ? half_value(kit.S, uint16_t(i + 1)) : low + below;
        auto middle = float((low + high) / 2);
        if (part != 0) middle = std::nextafter(middle, part * INFINITY);
        between.set(i, sign * double(middle));
      }
      kit.k.store(result.data(), between.data(), infinite);
      for (int i = 0; i < infinite; ++i) {
        const int expected = part < 0 || (part == 0 && i % 2 == 0) ? i : i + 1;
        const bool flushed = flushes(kit) && std::fabs(between[i]) < 0x1p-126;
        expect_same("number", i, result[i],
                    sign * (flushed ? 0 : half_value(kit.S, uint16_t(expected))));
      }
    }
  now("store of numbers out of range");
  const double special[] = {INFINITY, -INFINITY, NAN, 3.4e38, -3.4e38, 1e-45, -1e-45, 0, -0.};
  for (const double value : special) {
    Numbers one(kit.A, 1), result(kit.S, 1);
    one.set(0, value);
    kit.k.store(result.data(), one.data(), 1);
    expect_same("number", 0, result[0], rounded(kit, kit.S, one[0]));
    if (kit.E == kit.S) continue;
    Numbers state(kit.E, 1);
    kit.k.round_state(state.data(), one.data(), 1);
    expect_same("state", 0, state[0], rounded(kit, kit.S, one[0]));
  }
}

// Checks add, add_elements and store_sum.
RNNFAST_CHECK(sums) {
  for (int64_t n = 0; n <= 2 * kit.lanes + 1; ++n)
    for (const int slack : {0, 1})
      for (const bool add : {false, true}) {
        now("add, %lld elements, slack %d, add=%d", (long long)n, slack, add);
        const Numbers a = kit.numbers(kit.A, n, false, slack),
                      before = kit.numbers(kit.A, n, false);
        const auto result = [&] {
          Numbers made(kit.A, n, 1 - slack);
          if (add) std::memcpy(made.data(), before.data(), size_t(made.bytes()));
          return made;
        };
        const Numbers sum = result();
        kit.k.add(sum.data(), a.data(), n, add);
        sum.check_border("add");
        for (int64_t i = 0; i < n; ++i) {
          Sum expected;
          expected.add(a[i]);
          if (add) expected.add(before[i]);
          expect("sum", i, 0, sum[i], expected, add ? epsilon(kit.A) : 0);
        }
        for (const int count : {0, 1, 2, 5}) {
          const int64_t begin = kit.random.below(4);
          now("add_elements, %lld elements from %lld on of %d rows, slack %d, add=%d", (long long)n,
              (long long)begin, count, slack, add);
          const auto rows = kit.rows(kit.E, count, begin + n, true);
          const Numbers of_rows = result();
          kit.k.add_elements(of_rows.data(), pointers(rows).data(), count, begin, n, add);
          of_rows.check_border("add_elements");
          for (int64_t i = 0; i < n; ++i) {
            Sum expected;
            for (const Numbers& row : rows) expected.add(row[begin + i]);
            if (add) expected.add(before[i]);
            expect("sum", i, 0, of_rows[i], expected, add ? epsilon(kit.A) : 0);
          }
        }
      }
  for (int64_t n = 0; n <= 2 * kit.lanes + 1; ++n)
    for (int given = 0; given < 4; ++given) {
      now("store_sum, %lld elements, given %d", (long long)n, given);
      const Numbers a = kit.numbers(kit.A, n, false, n % 2), b = kit.numbers(kit.A, n, false);
      Numbers result(kit.S, n, given % 2);
      kit.k.store_sum(result.data(), given & 1 ? a.data() : nullptr, given & 2 ? b.data() : nullptr,
                      n);
      result.check_border("store_sum");
      for (int64_t i = 0; i < n; ++i) {
        Sum sum;
        if (given & 1) sum.add(a[i]);
        if (given & 2) sum.add(b[i]);
        expect_rounded_sum(kit, result, i, sum);
      }
    }
}

// Checks gather_grad.
RNNFAST_CHECK(gathered_gradients) {
  for (int64_t n = 0; n <= 2 * kit.lanes + 1; ++n)
    for (int given = 0; given < 8; ++given) {
      now("%lld elements, given %d", (long long)n, given);
      const Numbers grad_y = kit.numbers(kit.S, n, false, n % 2);
      const Numbers a = kit.numbers(kit.A, n, false), b = kit.numbers(kit.A, n, false, 1);
      Numbers result(kit.E, n, given % 2);
      kit.k.gather_grad(result.data(), given & 1 ? grad_y.data() : nullptr,
                        given & 2 ? a.data() : nullptr, given & 4 ? b.data() : nullptr, n);
      result.check_border("gather_grad");
      for (int64_t i = 0; i < n; ++i) {
        Sum sum;
        if (given & 1) sum.add(grad_y[i]);
        if (given & 2) sum.add(a[i]);
        if (given & 4) sum.add(b[i]);
        expect_rounded_sum(kit, result, i, sum);
      }
    }
}
