// AVX-512 (x86-64-v4).
#if defined(__x86_64__)
#include "cpu/isa_prologue.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define RNNFAST_ISA avx512
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_REGISTERS 32
#include "cpu/isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
