// AVX2 with FMA and F16C (x86-64-v3).
#if defined(__x86_64__)
#include "cpu/targets.h"

#include "cpu/kernels/isa/avx2.h"

#include "cpu/kernels/table.h"

constinit const rnnfast::cpu::Target rnnfast::cpu::kAvx2 = RNNFAST_TARGET::make_target();
#endif
