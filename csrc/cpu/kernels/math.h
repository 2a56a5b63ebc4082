// exp, sigmoid and tanh with errors of a few ulp over the whole range, for several vectors at once.
#pragma once

#include "cells/half.h"
#include "cpu/kernels/vec.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

// N vectors that go through the same operations. Gate maths is one long dependency chain per
// vector; the chains of the N vectors are interleaved, which hides latency.
template <class V, int N>
struct Wide {
  V v[N];
};

template <class F, class V, int N, class... More>
RNNFAST_INLINE auto each(F&& f, const Wide<V, N>& first, const Wide<More, N>&... more) {
  Wide<std::decay_t<decltype(f(first.v[0], more.v[0]...))>, N> result;
  unrolled<N>([&](auto i)
                  __attribute__((always_inline)) { result.v[i] = f(first.v[i], more.v[i]...); });
  return result;
}

#define RNNFAST_FOR_WIDE(op)                                                  \
  template <class V, int N>                                                   \
  RNNFAST_INLINE auto operator op(const Wide<V, N>& a, const Wide<V, N>& b) { \
    return each([](V x, V y) { return x op y; }, a, b);                       \
  }                                                                           \
  template <class V, int N>                                                   \
  RNNFAST_INLINE auto operator op(const Wide<V, N>& a, ElementOf<V> b) {      \
    return each([b](V x) { return x op b; }, a);                              \
  }                                                                           \
  template <class V, int N>                                                   \
  RNNFAST_INLINE auto operator op(ElementOf<V> a, const Wide<V, N>& b) {      \
    return each([a](V x) { return a op x; }, b);                              \
  }
RNNFAST_FOR_WIDE(+)
RNNFAST_FOR_WIDE(-)
RNNFAST_FOR_WIDE(*)
RNNFAST_FOR_WIDE(/)
RNNFAST_FOR_WIDE(<)
RNNFAST_FOR_WIDE(<=)
RNNFAST_FOR_WIDE(>)
#undef RNNFAST_FOR_WIDE

template <class A>
constexpr A inverse_factorial(int k) {
  return k <= 1 ? A(1) : A(1) / A(k) * inverse_factorial<A>(k - 1);
}
template <class A, int... K>
constexpr std::array<A, sizeof...(K)> taylor_series(std::integer_sequence<int, K...>) {
  return {inverse_factorial<A>(K + 1)...};
}

// kSeries: coefficients of expm1(r) / r, of which the first is 1
template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLog2E = 0x1.715476p0f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the mantissa
  static constexpr float kLimit = 88.0f;  // exp_parts(-limit) has scale 0
  static constexpr int kMantissa = 23, kBias = 127;
  // minimax in the relative error over |r| <= ln(2) / 2: 1.6e-8
  static constexpr float kSeries[] = {
      1, 0.5f, 0x1.5554bp-3f, 0x1.555486p-5f, 0x1.122838p-7f, 0x1.6d995cp-10f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kLog2E = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLimit = 709.0;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr auto kSeries = taylor_series<double>(std::make_integer_sequence<int, 13>());
};

// The maths that the cells' formulas call (see cells/elman.h). sigmoid and tanh return q or 1 - q
// with a small q, so a result near 1 is rounded only once. This matters since the backward formulas
// subtract it from 1.
struct Math {
  // a * b + c and c - a * b, rounded once if the target has FMA
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> fma(const Wide<V, N>& a, const Wide<V, N>& b,
                                       const Wide<V, N>& c) {
    return each([](V x, V y, V z) { return RNNFAST_TARGET::fma(x, y, z); }, a, b, c);
  }
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> fnma(const Wide<V, N>& a, const Wide<V, N>& b,
                                        const Wide<V, N>& c) {
    return each([](V x, V y, V z) { return RNNFAST_TARGET::fnma(x, y, z); }, a, b, c);
  }
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> one_minus_square(const Wide<V, N>& a) {
    return each([](V x) { return RNNFAST_TARGET::fnma(x, x, V{} + 1); }, a);
  }

  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> sigmoid(const Wide<V, N>& x) {
    const auto [scale, rest] = exp_parts(minus_magnitude(x));
    const auto e = fma(scale, rest, scale);
    const auto q = e / (1 + e);
    return select(x < Wide<V, N>{}, q, 1 - q);
  }

  // With e = exp(-2 |x|), tanh |x| = (1 - e) / (1 + e). For small x the numerator is computed as
  // -expm1(-2 |x|), for larger x the quotient as 1 - 2 e / (1 + e).
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> tanh(const Wide<V, N>& x) {
    const auto y = 2 * minus_magnitude(x);
    const auto [scale, rest] = exp_parts(y);
    const auto e = fma(scale, rest, scale);
    const auto minus_expm1 = fnma(scale, rest, 1 - scale);
    const auto small = y > ElementOf<V>(-1.386);  // e > 1/4, and known earlier than e
    const auto q = select(small, minus_expm1, 2 * e) / (1 + e);
    return each(
        [](V magnitude, V one) {
          return bit_cast<V>(bit_cast<Integer<V>>(magnitude) |
                             (bit_cast<Integer<V>>(one) & sign_bit<V>()));
        },
        select(small, q, 1 - q), x);
  }

  // Per lane: `yes` if the condition holds, else `no`.
  template <class Mask, class V, int N>
  RNNFAST_INLINE static Wide<V, N> select(const Wide<Mask, N>& condition, const Wide<V, N>& yes,
                                          const Wide<V, N>& no) {
    return each([](Mask c, V a, V b) { return V(c ? a : b); }, condition, yes, no);
  }

 private:
  template <class V>
  using Integer = typename VectorOf<ElementOf<V>>::integer;
  template <class V>
  RNNFAST_INLINE static Integer<V> sign_bit() {
    using Element = ElementOf<Integer<V>>;
    return Integer<V>{} + (Element(1) << (sizeof(Element) * 8 - 1));
  }
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> minus_magnitude(const Wide<V, N>& x) {
    return each([](V one) { return bit_cast<V>(bit_cast<Integer<V>>(one) | sign_bit<V>()); }, x);
  }

  // For x <= 0: exp(x) = scale + scale * rest. scale is a power of two, or 0 at the limit, and
  // rest = expm1(x - log(scale)).
  template <class V, int N>
  struct ExpParts {
    Wide<V, N> scale, rest;
  };
  template <class V, int N>
  RNNFAST_INLINE static ExpParts<V, N> exp_parts(Wide<V, N> x) {
    using A = ElementOf<V>;
    using C = ExpConstants<A>;
    const V limit = V{} - C::kLimit;
    x = each([limit](V one) { return maximum(limit, one); }, x);
    const auto constant = [](A value) { return Wide<V, N>{} + value; };
    const auto shifted = fma(x, constant(C::kLog2E), constant(C::kRound));
    const auto n = shifted - C::kRound;
    // |r| <= ln(2) / 2
    const auto r = fnma(n, constant(C::kLn2Low), fnma(n, constant(C::kLn2High), x));
    const auto scale = each(
        [](V one) { return bit_cast<V>((bit_cast<Integer<V>>(one) + C::kBias) << C::kMantissa); },
        shifted);
    // r + r^2 q(r). The even and the odd terms of q are two polynomials in r^2, two shorter chains.
    constexpr int last = int(std::size(C::kSeries)) - 1;
    const auto r2 = r * r;
    const auto sum_from = [&](int first) __attribute__((always_inline)) {
      const int top = last - (last - first) % 2;
      Wide<V, N> sum = constant(C::kSeries[top]);
#pragma GCC unroll 16
      for (int k = top - 2; k >= first; k -= 2) sum = fma(sum, r2, constant(C::kSeries[k]));
      return sum;
    };
    const auto q = fma(sum_from(2), r, sum_from(1));
    return {scale, fma(r2, q, r)};
  }
};

}  // namespace rnnfast::cpu::RNNFAST_TARGET
