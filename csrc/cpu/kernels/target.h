// What the files of this folder are compiled for. Each file <target>.cpp includes
// kernels/baseline.h, selects its instruction set with `#pragma GCC target`, defines
//   RNNFAST_TARGET        the namespace of the instruction set
//   RNNFAST_VECTOR_BYTES  the width of a vector register
//   RNNFAST_REGISTERS     how many there are
// and then includes the headers of this folder. A header read by itself, as an editor does, is
// compiled for the target below.
//
// A function that is compiled for a newer machine must not be taken by the linker for code that any
// machine runs. So everything in this folder lives in the namespace RNNFAST_TARGET, and functions
// from outside that it calls are always inlined (RNNFAST_INLINE). A test checks it with nm.
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
