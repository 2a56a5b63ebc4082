// Conversion of half types by their bits, for scalars and SIMD vectors alike: U is uint32_t or a
// vector of it, F float or a vector of it.
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
  // scaling by 2^112 moves the exponent bias from 15 to 127, subnormal numbers included
  const U finite = bit_cast<U>(bit_cast<F>(magnitude) * 0x1p112f);
  const U special = magnitude | 0x7f800000;
  return bit_cast<F>((magnitude < 0x0f800000 ? finite : special) | ((bits & 0x8000) << 16));
}

template <class U, class F>
RNNFAST_HD U encode_f16(F value) {
  const U u = bit_cast<U>(value);
  const U magnitude = u & 0x7fffffff;
  const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // adding 0.5 lets the adder round a number below 2^-14 at the last bit of a half
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000;
  const U special = magnitude > 0x7f800000 ? U{} + 0x7e00 : U{} + 0x7c00;
  const U finite = magnitude < 0x38800000 ? subnormal : normal;
  return (magnitude < 0x47800000 ? finite : special) | ((u >> 16) & 0x8000);
}

}  // namespace rnnfast
