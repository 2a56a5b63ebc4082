// The instructions of Intel's AMX. GCC's intrinsics are macros that take no template argument as
// the register, hence the assembler. A build for tests may put functions in their place.
#pragma once

#include "cpu/kernels/target.h"

#if defined(RNNFAST_AMX_INSTRUCTIONS)
#include RNNFAST_AMX_INSTRUCTIONS
#else
namespace rnnfast::cpu::RNNFAST_TARGET::amx {

// One of the eight tile registers; rows in memory lie `stride` bytes apart.
template <int kRegister>
RNNFAST_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kRegister) : "memory");
}
template <int kRegister>
RNNFAST_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kRegister) : "memory");
}
template <int kRegister>
RNNFAST_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}
// sums[m][n] += lhs[m][k] rhs[k][n] for pairs k of bfloat16
template <int kSums, int kLhs, int kRhs>
RNNFAST_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLhs), "i"(kRhs));
}
// 64 bytes: palette, start row, 14 reserved, bytes of a row of each register (16 bits), rows of
// each
RNNFAST_INLINE void configure(const void* shapes) {
  asm volatile("ldtilecfg %0" ::"m"(*static_cast<const char (*)[64]>(shapes)));
}
RNNFAST_INLINE void release() { asm volatile("tilerelease"); }

}  // namespace rnnfast::cpu::RNNFAST_TARGET::amx
#endif
