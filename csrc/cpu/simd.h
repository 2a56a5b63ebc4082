// SIMD vectors, conversions and activation functions, written once with the compiler's generic
// vectors. Included inside an instruction set's namespace (see isa.h); RNNFAST_VECTOR_BYTES is its
// vector width.

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(RNNFAST_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef double unaligned
      __attribute__((vector_size(RNNFAST_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
inline constexpr int kLanes = RNNFAST_VECTOR_BYTES / int(sizeof(A));

template <class V>
using ElementOf = std::decay_t<decltype(V{}[0])>;

typedef uint32_t VecU32 __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2)));
typedef uint16_t HalfBitsUnaligned
    __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2), aligned(2), may_alias));

// ---- load and store, with conversion between the storage type and the compute type ----

RNNFAST_HD Vec<float> load(const float* p) {
  return *reinterpret_cast<const VectorOf<float>::unaligned*>(p);
}
RNNFAST_HD Vec<double> load(const double* p) {
  return *reinterpret_cast<const VectorOf<double>::unaligned*>(p);
}
RNNFAST_HD void store(float* p, Vec<float> v) {
  *reinterpret_cast<VectorOf<float>::unaligned*>(p) = v;
}
RNNFAST_HD void store(double* p, Vec<double> v) {
  *reinterpret_cast<VectorOf<double>::unaligned*>(p) = v;
}

// The elements of half types as they lie in memory, and as numbers.
RNNFAST_HD HalfBits load_bits(const void* p) { return *static_cast<const HalfBitsUnaligned*>(p); }
RNNFAST_HD void store_bits(void* p, HalfBits bits) { *static_cast<HalfBitsUnaligned*>(p) = bits; }
template <class S>
RNNFAST_HD Vec<float> decode(HalfBits half) {
  const VecU32 bits = __builtin_convertvector(half, VecU32);
  if constexpr (std::is_same_v<S, bf16>)
    return decode_bf16<Vec<float>>(bits);
  else
    return decode_f16<Vec<float>>(bits);
}
template <class S>
RNNFAST_HD HalfBits encode(Vec<float> v) {
  if constexpr (std::is_same_v<S, f16>)
    return __builtin_convertvector(encode_f16<VecU32>(v), HalfBits);
  else
#if defined(RNNFAST_BF16_DOT)
    return bit_cast<HalfBits>(_mm512_cvtneps_pbh(__m512(v)));
#else
    return __builtin_convertvector(encode_bf16<VecU32>(v), HalfBits);
#endif
}

RNNFAST_HD Vec<float> load(const bf16* p) { return decode<bf16>(load_bits(p)); }
RNNFAST_HD Vec<float> load(const f16* p) { return decode<f16>(load_bits(p)); }
RNNFAST_HD void store(bf16* p, Vec<float> v) { store_bits(p, encode<bf16>(v)); }
RNNFAST_HD void store(f16* p, Vec<float> v) { store_bits(p, encode<f16>(v)); }

// ---- the first n elements only: those beyond are zero, and memory beyond is not touched ----

#if RNNFAST_VECTOR_BYTES == 64
RNNFAST_HD uint32_t first_lanes(int64_t n) { return n <= 0 ? 0 : (uint32_t(1) << n) - 1; }
#elif RNNFAST_VECTOR_BYTES == 32
template <class A>
RNNFAST_HD __m256i first_lanes(int64_t n) {
  using Integer = typename VectorOf<A>::integer;
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __m256i(Integer{I...} < ElementOf<Integer>(n));
  }(std::make_integer_sequence<int, kLanes<A>>());
}
#endif

// V has more than n elements of type T.
template <class V, class T>
RNNFAST_HD V load_first(const T* p, int64_t n) {
#if RNNFAST_VECTOR_BYTES == 64
  const uint32_t mask = first_lanes(n);
  if constexpr (sizeof(T) == 8) return V(_mm512_maskz_loadu_epi64(__mmask8(mask), p));
  if constexpr (sizeof(T) == 4) return V(_mm512_maskz_loadu_epi32(__mmask16(mask), p));
  if constexpr (sizeof(T) == 2 && sizeof(V) == 64) return V(_mm512_maskz_loadu_epi16(mask, p));
  if constexpr (sizeof(T) == 2 && sizeof(V) == 32)
    return V(_mm256_maskz_loadu_epi16(__mmask16(mask), p));
#else
#if RNNFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 8) return V(_mm256_maskload_pd(p, first_lanes<double>(n)));
  if constexpr (sizeof(T) == 4) return V(_mm256_maskload_ps(p, first_lanes<float>(n)));
#endif
  T part[sizeof(V) / sizeof(T)] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  V v;
  __builtin_memcpy(&v, part, sizeof(v));
  return v;
#endif
}
template <class V, class T>
RNNFAST_HD void store_first(T* p, V v, int64_t n) {
#if RNNFAST_VECTOR_BYTES == 64
  const uint32_t mask = first_lanes(n);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(p, __mmask8(mask), __m512i(v));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, __mmask16(mask), __m512i(v));
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, __mmask16(mask), __m256i(v));
#else
#if RNNFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 8) return _mm256_maskstore_pd(p, first_lanes<double>(n), __m256d(v));
  if constexpr (sizeof(T) == 4) return _mm256_maskstore_ps(p, first_lanes<float>(n), __m256(v));
#endif
  T part[sizeof(V) / sizeof(T)];
  __builtin_memcpy(part, &v, sizeof(v));
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
#endif
}

template <class S>
RNNFAST_HD HalfBits load_bits(const S* p, int64_t n) {
  return n >= kLanes<float> ? load_bits(p) : load_first<HalfBits>(p, n);
}
template <class S>
RNNFAST_HD Vec<Compute<S>> load(const S* p, int64_t n) {
  if constexpr (!std::is_same_v<S, Compute<S>>)
    return decode<S>(load_bits(p, n));
  else
    return n >= kLanes<S> ? load(p) : load_first<Vec<S>>(p, n);
}
template <class S>
RNNFAST_HD void store(S* p, Vec<Compute<S>> v, int64_t n) {
  if (n >= kLanes<Compute<S>>) return store(p, v);
  if constexpr (std::is_same_v<S, Compute<S>>)
    store_first(p, v, n);
  else
    store_first(p, encode<S>(v), n);
}

// to[0:n] = from[0:n] across number types; a null source stands for zeros
template <class To, class From>
void convert(To* to, const From* from, int64_t n) {
  using A = Compute<From>;
  for (int64_t i = 0; i < n; i += kLanes<A>)
    store(to + i, from ? load(from + i, n - i) : Vec<A>{}, n - i);
}

// ---- transposition ----

template <class V, int... I>
RNNFAST_HD V interleave(V a, V b, int first, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  using Index = typename VectorOf<std::decay_t<decltype(a[0])>>::integer;
  return first ? __builtin_shuffle(a, b, Index{(lanes / 2 + I / 2 + (I & 1) * lanes)...})
               : __builtin_shuffle(a, b, Index{(I / 2 + (I & 1) * lanes)...});
}

// GCC would load a value anew for each of up to three uses, as an operand of the instruction.
template <class V>
RNNFAST_HD void keep_in_register([[maybe_unused]] V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
}

// rows[i][j] <-> rows[j][i], as log2(lanes) rounds of perfect shuffles
template <class A>
RNNFAST_HD void transpose(Vec<A> (&rows)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
  constexpr auto order = std::make_integer_sequence<int, lanes>();
#pragma GCC unroll 8
  for (int round = 1; round < lanes; round *= 2) {
    Vec<A> next[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave(rows[i], rows[i + lanes / 2], 0, order);
      next[2 * i + 1] = interleave(rows[i], rows[i + lanes / 2], 1, order);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// sums[j] = the sum over the lanes of v[j]: pairs are folded while transposing
template <class A>
RNNFAST_HD Vec<A> lane_sums(Vec<A> (&v)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
  constexpr auto order = std::make_integer_sequence<int, lanes>();
#pragma GCC unroll 8
  for (int half = lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i)
      v[i] = interleave(v[i], v[i + half], 0, order) + interleave(v[i], v[i + half], 1, order);
  }
  return v[0];
}

// ---- several vectors side by side ----

// N vectors that take the same operations. Their instructions alternate, so that the latencies of
// one pass behind the others' work: gate maths is one long chain for each vector.
template <class V, int N>
struct Wide {
  V v[N];
};

// f(0), f(1), ... f(N - 1), the index being a constant: as a loop it would keep vectors in memory.
template <int N, class F>
RNNFAST_HD void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>());
}
template <class F, class V, int N, class... More>
RNNFAST_HD auto each(F&& f, const Wide<V, N>& first, const Wide<More, N>&... more) {
  Wide<std::decay_t<decltype(f(first.v[0], more.v[0]...))>, N> result;
  unrolled<N>([&](auto i)
                  __attribute__((always_inline)) { result.v[i] = f(first.v[i], more.v[i]...); });
  return result;
}

#define RNNFAST_FOR_WIDE(op)                                              \
  template <class V, int N>                                               \
  RNNFAST_HD auto operator op(const Wide<V, N>& a, const Wide<V, N>& b) { \
    return each([](V x, V y) { return x op y; }, a, b);                   \
  }                                                                       \
  template <class V, int N>                                               \
  RNNFAST_HD auto operator op(const Wide<V, N>& a, ElementOf<V> b) {      \
    return each([b](V x) { return x op b; }, a);                          \
  }                                                                       \
  template <class V, int N>                                               \
  RNNFAST_HD auto operator op(ElementOf<V> a, const Wide<V, N>& b) {      \
    return each([a](V x) { return a op x; }, b);                          \
  }
RNNFAST_FOR_WIDE(+)
RNNFAST_FOR_WIDE(-)
RNNFAST_FOR_WIDE(*)
RNNFAST_FOR_WIDE(/)
RNNFAST_FOR_WIDE(<)
RNNFAST_FOR_WIDE(<=)
RNNFAST_FOR_WIDE(>)
#undef RNNFAST_FOR_WIDE

// ---- activation functions, a few ulp over the whole range ----

template <class A>
constexpr A inverse_factorial(int k) {
  return k <= 1 ? A(1) : A(1) / A(k) * inverse_factorial<A>(k - 1);
}
template <class A, int... K>
constexpr std::array<A, sizeof...(K)> taylor_series(std::integer_sequence<int, K...>) {
  return {inverse_factorial<A>(K + 1)...};
}

// kSeries: coefficients of expm1(r) / r
template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLog2E = 0x1.715476p0f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRound =
      0x1.8p23f;  // adding it leaves the nearest integer in the mantissa
  static constexpr float kLimit = 88.0f;      // exp(-limit) comes out as 0
  static constexpr int kMantissa = 23, kBias = 127;
  // least largest relative error over |r| <= ln(2) / 2: 1.6e-8
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

// For x <= 0: exp(x) = scale + scale * rest with scale a power of two, 0 at the limit, and
// rest = expm1(x - log(scale)).
template <class V, int N>
struct ExpParts {
  Wide<V, N> scale, rest;
};

template <class V, int N>
RNNFAST_HD ExpParts<V, N> exp_parts(Wide<V, N> x) {
  using A = ElementOf<V>;
  using C = ExpConstants<A>;
  using Integer = typename VectorOf<A>::integer;
  const V limit = V{} - C::kLimit;
  x = each([limit](V one) { return limit > one ? limit : one; }, x);
  const auto shifted = x * C::kLog2E + C::kRound;
  const auto n = shifted - C::kRound;
  const auto r = (x - n * C::kLn2High) - n * C::kLn2Low;  // |r| <= ln(2) / 2
  const auto scale =
      each([](V one) { return bit_cast<V>((bit_cast<Integer>(one) + C::kBias) << C::kMantissa); },
           shifted);
  constexpr int terms = int(std::size(C::kSeries));
  Wide<V, N> p = Wide<V, N>{} + C::kSeries[terms - 1];
#pragma GCC unroll 16
  for (int k = terms - 2; k >= 0; --k) p = p * r + C::kSeries[k];
  return {scale, p * r};
}

// Both end in q or 1 - q with a small q, so that a result near 1 is rounded once: backward formulas
// take differences from 1.
struct Math {
  template <class V, int N>
  RNNFAST_HD static Wide<V, N> sigmoid(const Wide<V, N>& x) {
    const auto [scale, rest] = exp_parts(minus_magnitude(x));
    const auto e = scale + scale * rest;
    const auto q = e / (1 + e);
    return select(x < Wide<V, N>{}, q, 1 - q);
  }

  // With e = exp(-2 |x|): tanh |x| = (1 - e) / (1 + e), the numerator as -expm1(-2 |x|) where x is
  // small.
  template <class V, int N>
  RNNFAST_HD static Wide<V, N> tanh(const Wide<V, N>& x) {
    const auto [scale, rest] = exp_parts(2 * minus_magnitude(x));
    const auto e = scale + scale * rest;
    const auto minus_expm1 = (1 - scale) - scale * rest;
    const auto small = e > ElementOf<V>(0.25);
    const auto q = select(small, minus_expm1, 2 * e) / (1 + e);
    return each(
        [](V magnitude, V one) {
          return bit_cast<V>(bit_cast<Integer<V>>(magnitude) |
                             (bit_cast<Integer<V>>(one) & sign_bit<V>()));
        },
        select(small, q, 1 - q), x);
  }

  // yes where the condition holds, else no
  template <class Mask, class V, int N>
  RNNFAST_HD static Wide<V, N> select(const Wide<Mask, N>& condition, const Wide<V, N>& yes,
                                      const Wide<V, N>& no) {
    return each([](Mask c, V a, V b) { return V(c ? a : b); }, condition, yes, no);
  }

 private:
  template <class V>
  using Integer = typename VectorOf<ElementOf<V>>::integer;
  template <class V>
  RNNFAST_HD static Integer<V> sign_bit() {
    using Element = ElementOf<Integer<V>>;
    return Integer<V>{} + (Element(1) << (sizeof(Element) * 8 - 1));
  }
  template <class V, int N>
  RNNFAST_HD static Wide<V, N> minus_magnitude(const Wide<V, N>& x) {
    return each([](V one) { return bit_cast<V>(bit_cast<Integer<V>>(one) | sign_bit<V>()); }, x);
  }
};
