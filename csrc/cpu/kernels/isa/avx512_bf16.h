// Selects AVX-512 with dot products of bfloat16 pairs (AVX512-BF16) for all headers of kernels/
// that are included after this one.
#pragma once

#include "cpu/kernels/baseline.h"

// GCC 12 warns about its own intrinsics, which start from an undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// The warning about the ABI of returned vectors does not apply: all such functions are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define RNNFAST_TARGET avx512_bf16
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_REGISTERS 32
#define RNNFAST_HAS_BF16
