// AVX-512 with dot products of bfloat16 pairs: the kernels for bfloat16. All other kernels are
// those of AVX-512.
#if defined(__x86_64__)
#include "cpu/kernels/baseline.h"
#include "cpu/targets.h"

// GCC 12 warns about its own intrinsics, which start from an undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// The warning about the ABI of returned vectors does not apply: all such functions are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define RNNFAST_TARGET avx512_bf16
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_REGISTERS 32
#define RNNFAST_HAS_BF16
#include "cpu/kernels/bf16_pairs.h"
#include "cpu/kernels/table.h"

const rnnfast::cpu::MicroKernels rnnfast::cpu::kAvx512Bf16Kernels =
    RNNFAST_TARGET::make_kernels<bf16, RNNFAST_TARGET::PairOperand>(Dtype::kBFloat16);
#endif
