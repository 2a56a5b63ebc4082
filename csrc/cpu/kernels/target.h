// The instruction set that the headers of this folder are compiled for. Each file <target>.cpp
// includes kernels/baseline.h, selects its instruction set with `#pragma GCC target`, defines
//   RNNFAST_TARGET        the namespace of the instruction set
//   RNNFAST_VECTOR_BYTES  the width of a vector register
//   RNNFAST_REGISTERS     the number of vector registers
// and then includes the headers of this folder. A header that is opened alone, as editors do, is
// compiled for the portable target below.
//
// The linker merges inline functions of the same name. It must not pick one that was compiled for a
// newer machine as the code for all machines. So everything in this folder is in the namespace
// RNNFAST_TARGET, and the functions from outside that it calls are always inlined (RNNFAST_INLINE).
// tests/test_symbols.py checks this.
#pragma once

#include "cpu/kernels/baseline.h"

#if !defined(RNNFAST_TARGET)
#define RNNFAST_TARGET portable
#define RNNFAST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RNNFAST_REGISTERS 32
#else
#define RNNFAST_REGISTERS 16
#endif
#endif
