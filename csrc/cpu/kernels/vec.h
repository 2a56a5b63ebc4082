// SIMD vectors for all instruction sets, written with the compiler's generic vectors: loads,
// stores, multiply-adds and transposition.
#pragma once

#include "cpu/kernels/target.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

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

// ---- load and store ----

RNNFAST_INLINE Vec<float> load(const float* p) {
  return *reinterpret_cast<const VectorOf<float>::unaligned*>(p);
}
RNNFAST_INLINE Vec<double> load(const double* p) {
  return *reinterpret_cast<const VectorOf<double>::unaligned*>(p);
}
RNNFAST_INLINE void store(float* p, Vec<float> v) {
  *reinterpret_cast<VectorOf<float>::unaligned*>(p) = v;
}
RNNFAST_INLINE void store(double* p, Vec<double> v) {
  *reinterpret_cast<VectorOf<double>::unaligned*>(p) = v;
}

// ---- load and store of the first n elements: a load makes the others zero; memory beyond them is
// not accessed ----

#if RNNFAST_VECTOR_BYTES == 64
RNNFAST_INLINE uint32_t first_lanes(int64_t n) { return n <= 0 ? 0 : (uint32_t(1) << n) - 1; }
#elif RNNFAST_VECTOR_BYTES == 32
template <class A>
RNNFAST_INLINE __m256i first_lanes(int64_t n) {
  using Integer = typename VectorOf<A>::integer;
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __m256i(Integer{I...} < ElementOf<Integer>(n));
  }(std::make_integer_sequence<int, kLanes<A>>());
}
#endif

// a > b ? a : b in each lane, so b where one of the two is NaN. GCC makes a comparison and a
// selection of that expression.
template <class V>
RNNFAST_INLINE V maximum(V a, V b) {
  constexpr bool is_float = sizeof(ElementOf<V>) == 4;
#if RNNFAST_VECTOR_BYTES == 64
  if constexpr (is_float) return V(_mm512_max_ps(__m512(a), __m512(b)));
  if constexpr (!is_float) return V(_mm512_max_pd(__m512d(a), __m512d(b)));
#elif RNNFAST_VECTOR_BYTES == 32
  if constexpr (is_float) return V(_mm256_max_ps(__m256(a), __m256(b)));
  if constexpr (!is_float) return V(_mm256_max_pd(__m256d(a), __m256d(b)));
#elif defined(__x86_64__)
  if constexpr (is_float) return V(_mm_max_ps(__m128(a), __m128(b)));
  if constexpr (!is_float) return V(_mm_max_pd(__m128d(a), __m128d(b)));
#else
  return a > b ? a : b;
#endif
}

// n must be less than the number of elements of type T in V. A negative n counts as 0.
template <class V, class T>
RNNFAST_INLINE V load_first(const T* p, int64_t n) {
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
RNNFAST_INLINE void store_first(T* p, V v, int64_t n) {
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

template <class A>
RNNFAST_INLINE Vec<A> load(const A* p, int64_t n)
  requires(std::is_floating_point_v<A>)
{
  return n >= kLanes<A> ? load(p) : load_first<Vec<A>>(p, n);
}
template <class A>
RNNFAST_INLINE void store(A* p, Vec<A> v, int64_t n)
  requires(std::is_floating_point_v<A>)
{
  n >= kLanes<A> ? store(p, v) : store_first(p, v, n);
}

template <class V>
RNNFAST_INLINE V broadcast(ElementOf<V> value) {
  return value - V{};  // exact for every value, including -0, so the compiler omits the subtraction
}

// ---- multiply-adds, rounded once if the target has FMA. The compiler makes none by itself
// (-ffp-contract=off), so the same source gives the same bits wherever it is inlined. ----

template <class V>
RNNFAST_INLINE V fma(V a, V b, V c) {  // a * b + c
#if RNNFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(ElementOf<V>) == 8) return V(_mm512_fmadd_pd(a, b, c));
  if constexpr (sizeof(ElementOf<V>) == 4) return V(_mm512_fmadd_ps(a, b, c));
#elif RNNFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(ElementOf<V>) == 8) return V(_mm256_fmadd_pd(a, b, c));
  if constexpr (sizeof(ElementOf<V>) == 4) return V(_mm256_fmadd_ps(a, b, c));
#elif defined(__aarch64__)
  if constexpr (sizeof(ElementOf<V>) == 8) return V(vfmaq_f64(c, a, b));
  if constexpr (sizeof(ElementOf<V>) == 4) return V(vfmaq_f32(c, a, b));
#else
  return a * b + c;
#endif
}
template <class V>
RNNFAST_INLINE V fnma(V a, V b, V c) {  // c - a * b
#if RNNFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(ElementOf<V>) == 8) return V(_mm512_fnmadd_pd(a, b, c));
  if constexpr (sizeof(ElementOf<V>) == 4) return V(_mm512_fnmadd_ps(a, b, c));
#elif RNNFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(ElementOf<V>) == 8) return V(_mm256_fnmadd_pd(a, b, c));
  if constexpr (sizeof(ElementOf<V>) == 4) return V(_mm256_fnmadd_ps(a, b, c));
#elif defined(__aarch64__)
  if constexpr (sizeof(ElementOf<V>) == 8) return V(vfmsq_f64(c, a, b));
  if constexpr (sizeof(ElementOf<V>) == 4) return V(vfmsq_f32(c, a, b));
#else
  return c - a * b;
#endif
}

// ---- compile-time loops ----

// Calls f(0), f(1), ... f(N - 1) with the index as a constant. In a run-time loop GCC would keep
// arrays of vectors in memory instead of registers.
template <int N, class F>
RNNFAST_INLINE void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>());
}

// Calls f<n>(), for n from 1 to 4.
template <class F>
RNNFAST_INLINE auto as_constant(int n, F&& f) {
  return n == 4   ? f.template operator()<4>()
         : n == 3 ? f.template operator()<3>()
         : n == 2 ? f.template operator()<2>()
                  : f.template operator()<1>();
}

RNNFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Forces a loaded value into a register. GCC would otherwise use memory operands, and load the
// value again for each of up to three uses.
template <class V>
RNNFAST_INLINE void keep_in_register([[maybe_unused]] V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
}

// ---- transposition ----

// Takes vectors as blocks of `Size` elements, and exchanges the odd blocks of a with the even ones
// of b: (a0 a1 a2 a3 ..., b0 b1 b2 b3 ...) becomes (a0 b0 a2 b2 ..., a1 b1 a3 b3 ...).
template <int Size, class V>
RNNFAST_INLINE void exchange_blocks(V& a, V& b) {
  using Index = typename VectorOf<ElementOf<V>>::integer;
  constexpr int lanes = sizeof(V) / sizeof(ElementOf<V>);
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    const V even = __builtin_shuffle(a, b, Index{(I & Size ? lanes + I - Size : I)...});
    b = __builtin_shuffle(a, b, Index{(I & Size ? lanes + I : I + Size)...});
    a = even;
  }(std::make_integer_sequence<int, lanes>());
}

// Calls f<1>(), f<2>(), f<4>(), ... f<N / 2>().
template <int N, int Size = 1, class F>
RNNFAST_INLINE void for_powers(F&& f) {
  if constexpr (Size < N) {
    f.template operator()<Size>();
    for_powers<N, 2 * Size>(f);
  }
}

// rows[i][j] <-> rows[j][i]
template <class A>
RNNFAST_INLINE void transpose(Vec<A> (&rows)[kLanes<A>]) {
  for_powers<kLanes<A>>([&]<int Size>() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
      if (!(i & Size)) exchange_blocks<Size>(rows[i], rows[i + Size]);
  });
}

// Returns sums[j] = the sum over the lanes of v[j], by adding pairs of vectors while transposing.
template <class A>
RNNFAST_INLINE Vec<A> lane_sums(Vec<A> (&v)[kLanes<A>]) {
  for_powers<kLanes<A>>([&]<int Size>() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; i += 2 * Size) {
      exchange_blocks<Size>(v[i], v[i + Size]);
      v[i] += v[i + Size];
    }
  });
  return v[0];
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
