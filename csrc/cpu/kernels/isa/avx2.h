// Selects AVX2 with FMA and F16C (x86-64-v3) for all headers of kernels/ that are included after
// this one.
#pragma once

#include "cpu/kernels/baseline.h"

// The warning about the ABI of returned vectors does not apply: all such functions are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx2,fma,f16c")
#define RNNFAST_TARGET avx2
#define RNNFAST_VECTOR_BYTES 32
#define RNNFAST_REGISTERS 16
