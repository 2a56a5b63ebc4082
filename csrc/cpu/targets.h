// The tables of micro-kernels in this build, one for each instruction set.
#pragma once

#include "cpu/microkernels.h"

namespace rnnfast::cpu {

extern const Target kPortable;
#if defined(__x86_64__)
extern const Target kAvx2, kAvx512;
extern const MicroKernels kAvx512Bf16Kernels;  // for bfloat16 tensors only
// The kernels for frozen weights of int8.
extern const Int8Kernels kAvx2Vnni, kAvx512Vnni;
// Replaces those of a target, which keeps a pointer to the format.
inline void set_int8(Target& target, const Int8Kernels& kernels) {
  MicroKernels& of_float = target.kernels[int(Dtype::kFloat32)];
  of_float.frozen[int(WeightType::kInt8)] = &kernels.format;
  for (int i = 0; i < kCellKinds; ++i)
    of_float.cells[i].steps[int(WeightType::kInt8)] = kernels.steps[i];
}
// Replaces the products of an AVX512-BF16 target by AMX's. The target keeps a pointer to `pairs`.
void add_amx(Target& target, WeightFormat& pairs);
#endif

}  // namespace rnnfast::cpu
