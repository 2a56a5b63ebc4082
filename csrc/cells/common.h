// What every cell header needs: the table of cells, the host/device marker and the number types.
#pragma once

#include <cstdint>

#define RNNFAST_INLINE inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define RNNFAST_HD __host__ __device__ __forceinline__
#else
#define RNNFAST_HD RNNFAST_INLINE
#endif

// The table of cells. A new cell is a header in this folder, its #include in all.h and its entry
// here; kernels, operators and their registration follow. (In Python: a row of
// rnnfast.reference.CELLS.)
#define RNNFAST_FOR_EACH_CELL(DO) \
  DO(ElmanTanh)                   \
  DO(ElmanRelu)                   \
  DO(Gru)                         \
  DO(Lstm)

namespace rnnfast {

#define RNNFAST_COUNT(Cell) k##Cell,
enum class CellKind : int { RNNFAST_FOR_EACH_CELL(RNNFAST_COUNT) kCount };
#undef RNNFAST_COUNT
inline constexpr int kCells = int(CellKind::kCount);

// Storage types of half precision: bits only. Arithmetic is always in float (see Compute).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type in which a value stored as S is computed and in which the cell state is kept.
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
