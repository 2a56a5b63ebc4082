// AVX2 with VNNI: frozen weights of int8. All other kernels are those of AVX2.
#if defined(__x86_64__)
#include "cpu/kernels/baseline.h"
#include "cpu/targets.h"

// The warning about the ABI of returned vectors does not apply: all such functions are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx2,fma,f16c,avxvnni")
#define RNNFAST_TARGET avx2_vnni
#define RNNFAST_VECTOR_BYTES 32
#define RNNFAST_REGISTERS 16
#include "cpu/kernels/int8_quads.h"
#include "cpu/kernels/table.h"

const rnnfast::cpu::Int8Kernels rnnfast::cpu::kAvx2Vnni =
    RNNFAST_TARGET::make_int8_kernels<RNNFAST_TARGET::int8::Int8Quads>();
#endif
