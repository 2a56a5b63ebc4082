// Selects AVX2 with VNNI for all headers of kernels/ that are included after this one.
#pragma once

#include "cpu/kernels/baseline.h"

// The warning about the ABI of returned vectors does not apply: all such functions are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx2,fma,f16c,avxvnni")
#define RNNFAST_TARGET avx2_vnni
#define RNNFAST_VECTOR_BYTES 32
#define RNNFAST_REGISTERS 16
