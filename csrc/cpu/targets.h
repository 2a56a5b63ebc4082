// The tables of micro-kernels in this build, one for each instruction set.
#pragma once

#include "cpu/microkernels.h"

namespace rnnfast::cpu {

extern const Target kPortable;
#if defined(__x86_64__)
extern const Target kAvx2, kAvx512;
extern const MicroKernels kAvx512Bf16Kernels;  // for bfloat16 tensors only
extern const WeightFormat kAvx2VnniInt8, kAvx512VnniInt8;  // frozen weights of int8
// Replaces the products of an AVX512-BF16 target by AMX's. The target keeps a pointer to `pairs`.
void add_amx(Target& target, WeightFormat& pairs);
#endif

}  // namespace rnnfast::cpu
