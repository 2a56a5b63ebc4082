// Converts a row-major product to the arguments of cuBLAS, which is column-major.
#pragma once

#include "cuda/sequence.h"

namespace rnnfast::cuda {

// c (m, n) = op(a) (m, k) op(b) (k, n) + beta c, all column-major
struct ColumnMajorProduct {
  int64_t m, n, k;
  bool transpose_a, transpose_b;
  int64_t lda, ldb, ldc;
};

// A row-major matrix read as column-major is its transpose, and c' = op(b)' op(a)'. So b is the
// first operand of the call, and a the second.
inline ColumnMajorProduct column_major(const Product& p) {
  return {p.N, p.M, p.K, p.transpose_b, p.transpose_a, p.ldb, p.lda, p.ldc};
}

}  // namespace rnnfast::cuda
