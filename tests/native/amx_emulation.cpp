// AMX's kernels on emulated tile registers, for tests on processors with AVX512-BF16 but no AMX.
#define RNNFAST_AMX_INSTRUCTIONS "native/amx_instructions.h"
#include "cpu/kernels/avx512_amx.cpp"

extern "C" __attribute__((visibility("default"))) void rnnfast_change(
    rnnfast::cpu::Target& target) {
  static rnnfast::cpu::WeightFormat pairs;
  rnnfast::cpu::add_amx(target, pairs);
}
