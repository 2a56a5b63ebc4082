// AVX-512 with VNNI: frozen weights of int8. All other kernels are those of AVX-512.
#if defined(__x86_64__)
#include "cpu/kernels/baseline.h"
#include "cpu/targets.h"

// GCC 12 warns about its own intrinsics, which start from an undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// The warning about the ABI of returned vectors does not apply: all such functions are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#define RNNFAST_TARGET avx512_vnni
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_REGISTERS 32
#include "cpu/kernels/int8_quads.h"
#include "cpu/kernels/table.h"

const rnnfast::cpu::Int8Kernels rnnfast::cpu::kAvx512Vnni =
    RNNFAST_TARGET::make_int8_kernels<RNNFAST_TARGET::int8::Int8Quads>();
#endif
