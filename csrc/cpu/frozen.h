// Frozen weights: a matrix and its bias, packed before the calls that use them, in one block of
// memory. A block begins with a FrozenHeader. Then follow the panels (see WeightFormat), one after
// the other, and the bias as MicroKernels::pack_bias makes it.
//
// A block may also hold W_ih as a table of tokens, whose rows are looked up and not multiplied: the
// rows (V, G*H), of which V is the K of the matrix, then the scales (G*H) of int8, and the bias
// (G*H) if there is one.
//
// The order within a block of panels depends on the instruction set, so blocks are for memory:
// files should hold what unpack_frozen returns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arguments.h"
#include "cpu/microkernels.h"

namespace rnnfast::cpu {

struct FrozenHeader {
  static constexpr char kMagic[8] = {'r', 'n', 'n', 'f', 'a', 's', 't', '1'};

  char magic[8];
  int64_t bytes;  // of the block
  int64_t H, K;
  int32_t gates, lanes;
  WeightType type;
  int32_t has_bias;
  int32_t word, flipped_bits;  // see WeightFormat
  int32_t is_table;
  int32_t unused;
};
static_assert(sizeof(FrozenHeader) == Arena::kAlignment);

// A matrix (G*H, K) in the order of torch, and its bias.
struct FrozenMatrix {
  WeightType type;
  int gates;
  int64_t H, K;
  void* weights;  // float, bf16, f16 or int8_t
  float* scales;  // (G*H) for kInt8: a weight is its integer times the scale of its row; else null
  float* bias;  // (G*H), or null for zeros
  bool is_table = false;
};

// The bytes of the block of a matrix, whose pointers are not read.
size_t frozen_bytes(const MicroKernels& kernels, const FrozenMatrix& matrix);
void pack_frozen(const MicroKernels& kernels, const FrozenMatrix& matrix, void* block);
// Writes the header alone, for a caller that fills in the rest.
void write_frozen_header(const MicroKernels& kernels, const FrozenMatrix& matrix, void* block);

// The header of a block. Throws std::invalid_argument if `block` is not one of so many bytes.
FrozenHeader read_frozen(const void* block, size_t bytes);
// The inverse of pack_frozen, for a block of any instruction set. The pointers of `matrix` say
// where the results go; a null one leaves that part out.
void unpack_frozen(const void* block, const FrozenMatrix& matrix);
// Whether these kernels can read a block with this header.
inline bool is_readable(const MicroKernels& kernels, const FrozenHeader& header) {
  const WeightFormat* format = kernels.frozen[int(header.type)];
  if (header.is_table) return format;
  return format && header.lanes == kernels.lanes && header.word == format->word &&
         header.flipped_bits == format->flipped_bits;
}

// The panels of a block.
inline const char* frozen_panels(const void* block) {
  return static_cast<const char*>(block) + sizeof(FrozenHeader);
}

// What a block holds that is a table.
struct FrozenTable {
  WeightType type;
  const char* rows;  // of `type`
  int64_t pitch;  // bytes from one row to the next
  const float *scales, *bias;  // (G*H); scales are null unless the type is int8, bias may be
};
FrozenTable frozen_table(const void* block);

}  // namespace rnnfast::cpu
