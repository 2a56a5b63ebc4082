// AVX-512 with the matrix unit of Intel's server processors (AMX): the kernels of bfloat16 and
// float32, those of the other types are AVX-512's.
#if defined(__x86_64__)
#include "cpu/isa_prologue.h"

namespace rnnfast::cpu::avx512 {
const KernelTable& kernel_table();
}

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define RNNFAST_ISA avx512_amx
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_REGISTERS 32
#define RNNFAST_BF16_DOT avx512
#define RNNFAST_AMX
#include "cpu/isa.h"
#endif
