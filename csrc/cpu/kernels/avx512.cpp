// AVX-512 (x86-64-v4).
#if defined(__x86_64__)
#include "cpu/targets.h"

#include "cpu/kernels/isa/avx512.h"

#include "cpu/kernels/table.h"

constinit const rnnfast::cpu::Target rnnfast::cpu::kAvx512 = RNNFAST_TARGET::make_target();
#endif
