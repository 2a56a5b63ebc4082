// What every machine of the architecture has: 16-byte vectors.
#include "cpu/isa_prologue.h"

#define RNNFAST_ISA portable
#define RNNFAST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RNNFAST_REGISTERS 32
#else
#define RNNFAST_REGISTERS 16
#endif
#include "cpu/isa.h"
