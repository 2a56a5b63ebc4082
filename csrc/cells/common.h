// What every cell header needs: the table of cells, the macro for functions that run on host and
// device (RNNFAST_HD), and the number types.
#pragma once

#include <cstdint>

#define RNNFAST_INLINE inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define RNNFAST_HD __host__ __device__ __forceinline__
#else
#define RNNFAST_HD RNNFAST_INLINE
#endif

// The table of cells. To add a cell, write a header in this folder, include it in all.h and name it
// here: kernels, operators and their registration are generated from the table. In Python, add a
// row to rnnfast.reference.CELLS.
#define RNNFAST_FOR_EACH_CELL(DO) \
  DO(ElmanTanh)                   \
  DO(ElmanRelu)                   \
  DO(Gru)                         \
  DO(Lstm)

namespace rnnfast {

#define RNNFAST_COUNT(Cell) k##Cell,
enum class CellKind : int { RNNFAST_FOR_EACH_CELL(RNNFAST_COUNT) kCount };
#undef RNNFAST_COUNT
inline constexpr int kCellKinds = int(CellKind::kCount);

// Storage types of half precision. They only hold bits; arithmetic is always in float (see
// Compute).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type of arithmetic for values stored as S. The cell state is kept in it too.
template <class S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeType<S>::type;

enum class Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };
inline constexpr int kDtypes = 4;

}  // namespace rnnfast
