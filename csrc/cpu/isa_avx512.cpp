// AVX-512 (x86-64-v4).
#if defined(__x86_64__)
#include "cpu/isa_prologue.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define RNNFAST_ISA avx512
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_REGISTERS 32
#include "cpu/isa.h"
#endif
