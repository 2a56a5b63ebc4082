// AVX-512 with VNNI: frozen weights of int8. All other kernels are those of AVX-512.
#if defined(__x86_64__)
#include "cpu/targets.h"

#include "cpu/kernels/isa/avx512_vnni.h"

#include "cpu/kernels/int8_quads.h"
#include "cpu/kernels/table.h"

const rnnfast::cpu::Int8Kernels rnnfast::cpu::kAvx512Vnni =
    RNNFAST_TARGET::make_int8_kernels<RNNFAST_TARGET::int8::Int8Quads>();
#endif
