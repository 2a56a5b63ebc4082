// The maths of cells, with errors of a few ulp over the whole range, for several vectors at once.
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
RNNFAST_FOR_WIDE(>=)
RNNFAST_FOR_WIDE(==)
RNNFAST_FOR_WIDE(!=)
#undef RNNFAST_FOR_WIDE

template <class A>
constexpr A inverse_factorial(int k) {
  return k <= 1 ? A(1) : A(1) / A(k) * inverse_factorial<A>(k - 1);
}
template <class A, int... K>
constexpr std::array<A, sizeof...(K)> taylor_series(std::integer_sequence<int, K...>) {
  return {inverse_factorial<A>(K + 1)...};
}

// Coefficients of log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + sum of c_k s^2k) with s = f / (2 + f),
// from the series of atanh: c_k = 2 / (2 k + 1)
template <class A, int... K>
constexpr std::array<A, sizeof...(K)> atanh_series(std::integer_sequence<int, K...>) {
  return {(A(2) / A(2 * K + 3))...};
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
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;  // exp is 0 below, infinite above
  static constexpr float kSmallestNormal = 0x1p-126f;
  static constexpr int kMantissa = 23, kBias = 127;
  // minimax in the relative error over |r| <= ln(2) / 2: 1.6e-8
  static constexpr float kSeries[] = {
      1, 0.5f, 0x1.5554bp-3f, 0x1.555486p-5f, 0x1.122838p-7f, 0x1.6d995cp-10f};
  static constexpr auto kLogSeries = atanh_series<float>(std::make_integer_sequence<int, 5>());
};
template <>
struct ExpConstants<double> {
  static constexpr double kLog2E = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLimit = 709.0;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr double kSmallestNormal = 0x1p-1022;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr auto kSeries = taylor_series<double>(std::make_integer_sequence<int, 13>());
  static constexpr auto kLogSeries = atanh_series<double>(std::make_integer_sequence<int, 11>());
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

  // ---- what only cells in plain PyTorch need: see rnnfast/custom/emission.py ----

  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> exp(const Wide<V, N>& x) {
    using A = ElementOf<V>;
    using C = ExpConstants<A>;
    const auto [shifted, rest] = reduced(within<A>(x, C::kLowest, C::kHighest));
    // 2^n is the product of two powers, since it may overflow or be subnormal.
    return each(
        [](V one, V part) {
          const auto n = bit_cast<Integer<V>>(one) - bit_cast<ElementOf<Integer<V>>>(C::kRound);
          const auto half = n >> 1;
          return (1 + part) * power_of_two<V>(half) * power_of_two<V>(n - half);
        },
        shifted, rest);
  }

  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> expm1(const Wide<V, N>& x) {
    using A = ElementOf<V>;
    constexpr A large = 40;  // from here on exp(x) - 1 is rounded to exp(x)
    const auto [scale, rest] = scaled(within<A>(x, -large, large));
    return select(x > large, exp(x), fma(scale, rest, scale - 1));
  }

  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> log(const Wide<V, N>& x) {
    using A = ElementOf<V>;
    using C = ExpConstants<A>;
    using I = ElementOf<Integer<V>>;
    constexpr A infinity = __builtin_huge_val(), up = A(I(1) << C::kMantissa);
    const auto subnormal = x < C::kSmallestNormal;
    const auto y = select(subnormal, x * up, x);
    // y = 2^k (1 + f), with 1 + f from sqrt(1/2) to sqrt(2)
    constexpr A root = A(0x1.6a09e667f3bcdp-1);
    const I root_bits = bit_cast<I>(root), one_bits = bit_cast<I>(A(1));
    const auto f = each(
        [=](V one) {
          const auto bits = bit_cast<Integer<V>>(one) + (one_bits - root_bits);
          return bit_cast<V>((bits & ((I(1) << C::kMantissa) - 1)) + root_bits) - 1;
        },
        y);
    const auto exponent = each(
        [=](V one) {
          const auto bits = bit_cast<Integer<V>>(one) + (one_bits - root_bits);
          const auto k = (bits >> C::kMantissa) - C::kBias;
          return bit_cast<V>(k + bit_cast<I>(C::kRound)) - C::kRound;
        },
        y);
    const auto k = select(subnormal, exponent - A(C::kMantissa), exponent);
    const auto s = f / (2 + f);
    const auto z = s * s;
    constexpr int last = int(C::kLogSeries.size()) - 1;
    Wide<V, N> sum = Wide<V, N>{} + C::kLogSeries[last];
#pragma GCC unroll 16
    for (int i = last - 1; i >= 0; --i) sum = fma(sum, z, Wide<V, N>{} + C::kLogSeries[i]);
    const auto half_square = A(0.5) * f * f;
    const auto low = fma(k, Wide<V, N>{} + C::kLn2Low, s * fma(sum, z, half_square));
    const auto value = fma(k, Wide<V, N>{} + C::kLn2High, f - (half_square - low));
    const auto regular = logical_and(x > A(0), x < infinity);
    const auto zero = Wide<V, N>{} - infinity, negative = Wide<V, N>{} + A(__builtin_nan(""));
    return select(regular, value, select(x == A(0), zero, select(x < A(0), negative, x)));
  }

  // log(u) with u = 1 + x, and the first-order effect of the rounding of u
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> log1p(const Wide<V, N>& x) {
    using A = ElementOf<V>;
    const auto u = 1 + x;
    const auto value = log(u);
    const auto regular = logical_and(u > A(0), u < A(__builtin_huge_val()));
    return select(regular, value + (x - (u - 1)) / u, value);
  }

  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> sqrt(const Wide<V, N>& x) {
    return each([](V one) { return square_root(one); }, x);
  }
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> rsqrt(const Wide<V, N>& x) {
    return 1 / sqrt(x);
  }

  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> abs(const Wide<V, N>& x) {
    return each([](V one) { return bit_cast<V>(bit_cast<Integer<V>>(one) & ~sign_bit<V>()); }, x);
  }
  // -1, 0 or 1; 0 for NaN, as in torch.sign
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> sign(const Wide<V, N>& x) {
    const Wide<V, N> zero{};
    return select(x > zero, zero + 1, select(x < zero, zero - 1, zero));
  }

  // NaN if one of the two is NaN, as in torch.maximum
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> maximum(const Wide<V, N>& a, const Wide<V, N>& b) {
    return select(a != a, a, each([](V x, V y) { return RNNFAST_TARGET::maximum(x, y); }, a, b));
  }
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> minimum(const Wide<V, N>& a, const Wide<V, N>& b) {
    return select(logical_or(a < b, a != a), a, b);
  }

  // These call the C library for each lane, so they are slow.
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> sin(const Wide<V, N>& x) {
    return by_lane([](auto a) { return sizeof(a) == 4 ? __builtin_sinf(a) : __builtin_sin(a); }, x);
  }
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> cos(const Wide<V, N>& x) {
    return by_lane([](auto a) { return sizeof(a) == 4 ? __builtin_cosf(a) : __builtin_cos(a); }, x);
  }
  template <class V, int N>
  RNNFAST_INLINE static Wide<V, N> erf(const Wide<V, N>& x) {
    return by_lane([](auto a) { return sizeof(a) == 4 ? __builtin_erff(a) : __builtin_erf(a); }, x);
  }

  // Of the results of comparisons.
  template <class Mask, int N>
  RNNFAST_INLINE static Wide<Mask, N> logical_and(const Wide<Mask, N>& a, const Wide<Mask, N>& b) {
    return each([](Mask x, Mask y) { return x & y; }, a, b);
  }
  template <class Mask, int N>
  RNNFAST_INLINE static Wide<Mask, N> logical_or(const Wide<Mask, N>& a, const Wide<Mask, N>& b) {
    return each([](Mask x, Mask y) { return x | y; }, a, b);
  }
  template <class Mask, int N>
  RNNFAST_INLINE static Wide<Mask, N> logical_xor(const Wide<Mask, N>& a, const Wide<Mask, N>& b) {
    return each([](Mask x, Mask y) { return x ^ y; }, a, b);
  }
  template <class Mask, int N>
  RNNFAST_INLINE static Wide<Mask, N> logical_not(const Wide<Mask, N>& a) {
    return each([](Mask x) { return ~x; }, a);
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

  template <class F, class V, int N>
  RNNFAST_INLINE static Wide<V, N> by_lane(F&& f, const Wide<V, N>& x) {
    return each(
        [&f](V one) {
          for (int i = 0; i < int(sizeof(V) / sizeof(ElementOf<V>)); ++i) one[i] = f(one[i]);
          return one;
        },
        x);
  }
  template <class V>
  RNNFAST_INLINE static V square_root(V x) {
    constexpr bool is_float = sizeof(ElementOf<V>) == 4;
#if RNNFAST_VECTOR_BYTES == 64
    if constexpr (is_float) return V(_mm512_sqrt_ps(__m512(x)));
    if constexpr (!is_float) return V(_mm512_sqrt_pd(__m512d(x)));
#elif RNNFAST_VECTOR_BYTES == 32
    if constexpr (is_float) return V(_mm256_sqrt_ps(__m256(x)));
    if constexpr (!is_float) return V(_mm256_sqrt_pd(__m256d(x)));
#elif defined(__x86_64__)
    if constexpr (is_float) return V(_mm_sqrt_ps(__m128(x)));
    if constexpr (!is_float) return V(_mm_sqrt_pd(__m128d(x)));
#elif defined(__aarch64__)
    if constexpr (is_float) return V(vsqrtq_f32(x));
    if constexpr (!is_float) return V(vsqrtq_f64(x));
#else
    for (int i = 0; i < int(sizeof(V) / sizeof(ElementOf<V>)); ++i)
      x[i] = is_float ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
    return x;
#endif
  }
  // x, or the nearer of the two limits; NaN stays
  template <class A, class V, int N>
  RNNFAST_INLINE static Wide<V, N> within(const Wide<V, N>& x, A low, A high) {
    const auto limit = [](A value) { return Wide<V, N>{} + value; };
    return select(x < low, limit(low), select(x > high, limit(high), x));
  }

  // For x <= 0: exp(x) = scale + scale * rest. scale is a power of two, or 0 at the limit, and
  // rest = expm1(x - log(scale)).
  template <class V, int N>
  struct ExpParts {
    Wide<V, N> scale, rest;
  };
  template <class V, int N>
  RNNFAST_INLINE static ExpParts<V, N> exp_parts(Wide<V, N> x) {
    const V limit = V{} - ExpConstants<ElementOf<V>>::kLimit;
    return scaled(each([limit](V one) { return RNNFAST_TARGET::maximum(limit, one); }, x));
  }
  // The same for all x with a scale that is a normal number.
  template <class V, int N>
  RNNFAST_INLINE static ExpParts<V, N> scaled(const Wide<V, N>& x) {
    const auto [shifted, rest] = reduced(x);
    return {each([](V one) { return power_of_two<V>(bit_cast<Integer<V>>(one)); }, shifted), rest};
  }
  template <class V>
  RNNFAST_INLINE static V power_of_two(Integer<V> n) {
    using C = ExpConstants<ElementOf<V>>;
    return bit_cast<V>((n + C::kBias) << C::kMantissa);
  }

  // x = n log(2) + log(1 + rest), with the integer n in the low bits of `shifted`
  template <class V, int N>
  struct Reduced {
    Wide<V, N> shifted, rest;
  };
  template <class V, int N>
  RNNFAST_INLINE static Reduced<V, N> reduced(const Wide<V, N>& x) {
    using A = ElementOf<V>;
    using C = ExpConstants<A>;
    const auto constant = [](A value) { return Wide<V, N>{} + value; };
    const auto shifted = fma(x, constant(C::kLog2E), constant(C::kRound));
    const auto n = shifted - C::kRound;
    // |r| <= ln(2) / 2
    const auto r = fnma(n, constant(C::kLn2Low), fnma(n, constant(C::kLn2High), x));
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
    return {shifted, fma(r2, q, r)};
  }
};

}  // namespace rnnfast::cpu::RNNFAST_TARGET
