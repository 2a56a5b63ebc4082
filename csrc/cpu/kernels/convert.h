// Loads and stores that convert between the storage type and the compute type, and kernels on rows.
#pragma once

#include "cells/half.h"
#include "cpu/kernels/vec.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

// Conversions between integers of 16 and 32 bits. GCC 12 makes several instructions of its generic
// vectors here.
RNNFAST_INLINE VecU32 widen(HalfBits half) {
#if RNNFAST_VECTOR_BYTES == 64
  return VecU32(_mm512_cvtepu16_epi32(__m256i(half)));
#elif RNNFAST_VECTOR_BYTES == 32
  return VecU32(_mm256_cvtepu16_epi32(__m128i(half)));
#else
  return __builtin_convertvector(half, VecU32);
#endif
}
RNNFAST_INLINE HalfBits narrow(VecU32 v) {  // of numbers below 2^16
#if RNNFAST_VECTOR_BYTES == 64
  return HalfBits(_mm512_cvtepi32_epi16(__m512i(v)));
#elif RNNFAST_VECTOR_BYTES == 32
  const __m256i packed = _mm256_packus_epi32(__m256i(v), __m256i(v));
  return HalfBits(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
#else
  return __builtin_convertvector(v, HalfBits);
#endif
}

// load_bits and store_bits move the bits of half types; decode and encode convert them.
RNNFAST_INLINE HalfBits load_bits(const void* p) {
  return *static_cast<const HalfBitsUnaligned*>(p);
}
RNNFAST_INLINE void store_bits(void* p, HalfBits bits) {
  *static_cast<HalfBitsUnaligned*>(p) = bits;
}
template <class S>
RNNFAST_INLINE Vec<float> decode(HalfBits half) {
  if constexpr (std::is_same_v<S, bf16>) return decode_bf16<Vec<float>>(widen(half));
#if RNNFAST_VECTOR_BYTES == 64
  else
    return Vec<float>(_mm512_cvtph_ps(__m256i(half)));
#elif RNNFAST_VECTOR_BYTES == 32
  else
    return Vec<float>(_mm256_cvtph_ps(__m128i(half)));
#elif defined(__aarch64__)
  else
    return Vec<float>(vcvt_f32_f16(bit_cast<float16x4_t>(half)));
#else
  else
    return decode_f16<Vec<float>>(widen(half));
#endif
}
template <class S>
RNNFAST_INLINE HalfBits encode(Vec<float> v) {
  if constexpr (std::is_same_v<S, bf16>)
#if defined(RNNFAST_HAS_BF16)
    return bit_cast<HalfBits>(_mm512_cvtneps_pbh(__m512(v)));
#else
    return narrow(encode_bf16<VecU32>(v));
#endif
#if RNNFAST_VECTOR_BYTES == 64
  else
    return HalfBits(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif RNNFAST_VECTOR_BYTES == 32
  else
    return HalfBits(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    else return bit_cast<HalfBits>(vcvt_f16_f32(v));
#else
    else return narrow(encode_f16<VecU32>(v));
#endif
}

template <class S>
inline constexpr bool kIsHalf = !std::is_same_v<S, Compute<S>>;

template <class S>
RNNFAST_INLINE HalfBits load_bits(const S* p, int64_t n) {
  return n >= kLanes<float> ? load_bits(p) : load_first<HalfBits>(p, n);
}
template <class S>
RNNFAST_INLINE Vec<float> load(const S* p, int64_t n)
  requires(kIsHalf<S>)
{
  return decode<S>(load_bits(p, n));
}
template <class S>
RNNFAST_INLINE Vec<float> load(const S* p)
  requires(kIsHalf<S>)
{
  return decode<S>(load_bits(p));
}
template <class S>
RNNFAST_INLINE void store(S* p, Vec<float> v)
  requires(kIsHalf<S>)
{
  store_bits(p, encode<S>(v));
}
template <class S>
RNNFAST_INLINE void store(S* p, Vec<float> v, int64_t n)
  requires(kIsHalf<S>)
{
  const HalfBits bits = encode<S>(v);
  n >= kLanes<float> ? store_bits(p, bits) : store_first(p, bits, n);
}

// Stores a state rounded to S, so that the next step reads the same values as the output has. May
// store a whole vector where E is A.
template <class S, class E>
RNNFAST_INLINE void store_state(E* p, Vec<Compute<S>> v, int64_t n) {
  if constexpr (!kIsHalf<E> && !kIsHalf<S>)
    store(p, v);
  else if constexpr (!kIsHalf<E>)
    store(p, decode<S>(encode<S>(v)));
  else
    store(p, v, n);
}

// ---- the kernels on rows of n elements (see MicroKernels) ----

// From and To are S, A or E. A null `from` stands for zeros.
template <class To, class From>
void convert_row(void* to, const void* from, int64_t n) {
  constexpr int lanes = kLanes<Compute<From>>;
  const auto source = static_cast<const From*>(from);
  const auto result = static_cast<To*>(to);
  if (!source) {
    __builtin_memset(to, 0, size_t(n) * sizeof(To));
  } else if constexpr (std::is_same_v<To, From>) {
    __builtin_memcpy(to, from, size_t(n) * sizeof(To));
  } else {
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) store(result + i, load(source + i));
    if (i < n) store(result + i, load(source + i, n - i), n - i);
  }
}

// E from A, rounded to S: a state has the same values as the output made from it.
template <class E, class S>
void round_row(void* to, const void* from, int64_t n) {
  if constexpr (std::is_same_v<E, S>) {
    convert_row<S, Compute<S>>(to, from, n);
  } else {
    constexpr int lanes = kLanes<float>;
    for (int64_t i = 0; i < n; i += lanes)
      store(static_cast<E*>(to) + i,
            decode<S>(encode<S>(load(static_cast<const float*>(from) + i, n - i))), n - i);
  }
}

template <class A>
void add_row(void* to, const void* from, int64_t n, bool add) {
  const auto source = static_cast<const A*>(from);
  const auto result = static_cast<A*>(to);
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vec<A> value = load(source + i, n - i);
    if (add) value += load(result + i, n - i);
    store(result + i, value, n - i);
  }
}

template <class E>
void add_elements(void* to, const void* const* rows, int64_t count, int64_t begin, int64_t n,
                  bool add) {
  using A = Compute<E>;
  const auto result = static_cast<A*>(to);
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vec<A> sum{};
    for (int64_t r = 0; r < count; ++r)
      sum += load(static_cast<const E*>(rows[r]) + begin + i, n - i);
    if (add) sum += load(result + i, n - i);
    store(result + i, sum, n - i);
  }
}

template <class S>
void store_sum(void* to, const void* a, const void* b, int64_t n) {
  using A = Compute<S>;
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vec<A> sum{};
    if (a) sum += load(static_cast<const A*>(a) + i, n - i);
    if (b) sum += load(static_cast<const A*>(b) + i, n - i);
    store(static_cast<S*>(to) + i, sum, n - i);
  }
}

template <class E, class S>
void gather_grad(void* to, const void* grad_y, const void* a, const void* b, int64_t n) {
  using A = Compute<S>;
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vec<A> sum{};
    if (grad_y) sum += load(static_cast<const S*>(grad_y) + i, n - i);
    if (a) sum += load(static_cast<const A*>(a) + i, n - i);
    if (b) sum += load(static_cast<const A*>(b) + i, n - i);
    store(static_cast<E*>(to) + i, sum, n - i);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
