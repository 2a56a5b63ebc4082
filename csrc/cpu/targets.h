// The tables of micro-kernels that this build has, one for each instruction set.
#pragma once

#include "cpu/microkernels.h"

namespace rnnfast::cpu {

extern const Target kPortable;
#if defined(__x86_64__)
extern const Target kAvx2, kAvx512;
extern const MicroKernels kAvx512Bf16Kernels;  // of bfloat16
// Puts AMX's products into a target of AVX512-BF16; `pairs` is to live as long.
void add_amx(Target& target, WeightFormat& pairs);
#endif

}  // namespace rnnfast::cpu
