// Conversions between float and the half types by integer operations on their bits, for scalars and
// SIMD vectors alike: U is uint32_t or a vector of it, F is float or a vector of it.
#pragma once

#include "cells/common.h"

namespace rnnfast {

template <class To, class From>
RNNFAST_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class F, class U>
RNNFAST_HD F decode_bf16(U bits) {
  return bit_cast<F>(bits << 16);
}

template <class U, class F>
RNNFAST_HD U encode_bf16(F value) {
  const U u = bit_cast<U>(value);
  const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  const U quiet_nan = (u >> 16) | 0x40;
  return value == value ? rounded : quiet_nan;
}

template <class F, class U>
RNNFAST_HD F decode_f16(U bits) {
  const U magnitude = (bits & 0x7fff) << 13;
  // Multiplying by 2^112 changes the exponent bias from 15 to 127, also for subnormal numbers.
  const U finite = bit_cast<U>(bit_cast<F>(magnitude) * 0x1p112f);
  const U special = magnitude | 0x7f800000;
  return bit_cast<F>((magnitude < 0x0f800000 ? finite : special) | ((bits & 0x8000) << 16));
}

template <class U, class F>
RNNFAST_HD U encode_f16(F value) {
  const U u = bit_cast<U>(value);
  const U magnitude = u & 0x7fffffff;
  const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 a half is subnormal: adding 0.5 makes the addition round at the half's last bit.
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000;
  const U special = magnitude > 0x7f800000 ? U{} + 0x7e00 : U{} + 0x7c00;
  const U finite = magnitude < 0x38800000 ? subnormal : normal;
  return (magnitude < 0x47800000 ? finite : special) | ((u >> 16) & 0x8000);
}

}  // namespace rnnfast
