// The instruction set that the headers of this folder are compiled for. A file isa/<target>.h
// includes kernels/baseline.h, selects its instruction set with `#pragma GCC target` and defines
//   RNNFAST_TARGET        the namespace of the instruction set
//   RNNFAST_VECTOR_BYTES  the width of a vector register
//   RNNFAST_REGISTERS     the number of vector registers
// It must be included before the headers of this folder, and after all others. Without it the
// headers are compiled for the portable target below.
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

#define RNNFAST_STRING(name) #name
#define RNNFAST_EXPANDED_STRING(name) RNNFAST_STRING(name)
#define RNNFAST_TARGET_NAME RNNFAST_EXPANDED_STRING(RNNFAST_TARGET)
