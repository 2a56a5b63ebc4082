// AVX2 with FMA (x86-64-v3).
#if defined(__x86_64__)
#include "cpu/isa_prologue.h"

#pragma GCC target("avx2,fma")
#define RNNFAST_ISA avx2
#define RNNFAST_VECTOR_BYTES 32
#define RNNFAST_REGISTERS 16
#include "cpu/isa.h"
#endif
