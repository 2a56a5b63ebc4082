// The instructions of Intel's AMX, in inline assembly: GCC's intrinsics are macros that do not
// accept a template argument as the register. A build for tests may replace them by an emulation
// (RNNFAST_AMX_INSTRUCTIONS).
#pragma once

#include "cpu/kernels/target.h"

#if defined(RNNFAST_AMX_INSTRUCTIONS)
#include RNNFAST_AMX_INSTRUCTIONS
#else
namespace rnnfast::cpu::RNNFAST_TARGET::amx {

// kRegister is one of the eight tile registers. Rows in memory are `stride` bytes apart.
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
// sums[m][n] += the sum over k of lhs[m][k] rhs[k][n], where k counts pairs of bfloat16
template <int kSums, int kLhs, int kRhs>
RNNFAST_INLINE void multiply_pairs() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLhs), "i"(kRhs));
}
// The same for integers: k counts quads of 8-bit integers, signed ones in lhs and unsigned ones in
// rhs. Sums have 32 bits and wrap around.
template <int kSums, int kLhs, int kRhs>
RNNFAST_INLINE void multiply_quads() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLhs), "i"(kRhs));
}
// The 64 bytes of `shapes` are: palette, start row, 14 reserved bytes, bytes per row of each
// register (16 bits each), rows of each register (8 bits each).
RNNFAST_INLINE void configure(const void* shapes) {
  asm volatile("ldtilecfg %0" ::"m"(*static_cast<const char (*)[64]>(shapes)));
}
RNNFAST_INLINE void release() { asm volatile("tilerelease"); }

}  // namespace rnnfast::cpu::RNNFAST_TARGET::amx
#endif
