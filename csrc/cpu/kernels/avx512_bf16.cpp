// AVX-512 with dot products of bfloat16 pairs: the kernels for bfloat16. All other kernels are
// those of AVX-512.
#if defined(__x86_64__)
#include "cpu/targets.h"

#include "cpu/kernels/isa/avx512_bf16.h"

#include "cpu/kernels/bf16_pairs.h"
#include "cpu/kernels/table.h"

const rnnfast::cpu::MicroKernels rnnfast::cpu::kAvx512Bf16Kernels =
    RNNFAST_TARGET::make_kernels<bf16, RNNFAST_TARGET::PairOperand>(Dtype::kBFloat16);
#endif
