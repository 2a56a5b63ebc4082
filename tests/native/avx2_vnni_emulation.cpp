// The kernels of AVX2 with VNNI on plain AVX2, for tests on processors without that VNNI.
#include <cstdint>

namespace {

// vpdpbusd by Intel's definition
typedef uint8_t Unsigned __attribute__((vector_size(32)));
typedef int8_t Signed __attribute__((vector_size(32)));
typedef int32_t Sums __attribute__((vector_size(32)));
inline __attribute__((always_inline)) Sums multiply_quads(Sums sum, Unsigned a, Signed b) {
  for (int i = 0; i < 32; ++i) sum[i / 4] += int32_t(a[i]) * int32_t(b[i]);
  return sum;
}

}  // namespace

#define RNNFAST_MULTIPLY_QUADS(sum, a, b) multiply_quads(sum, Unsigned(a), Signed(b))
#include "cpu/kernels/avx2_vnni.cpp"

extern "C"
    __attribute__((visibility("default"))) void rnnfast_change(rnnfast::cpu::Target& target) {
  rnnfast::cpu::set_int8(target, rnnfast::cpu::kAvx2Vnni);
}
