// Some columns of a matrix as the rows of a table, and back. A layer that reads tokens needs them:
// the token's number is that of a column of W_ih, and its kernels read and write whole rows.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "arguments.h"

namespace rnnfast::cpu {

// The different ones among numbers from 0 to limit - 1: their list, rising, and each one's place.
class DistinctNumbers {
 public:
  explicit DistinctNumbers(int64_t limit) : words_(size_t(ceil_div(limit, 64))) {}
  void add(int64_t number) { word(number).bits |= bit(number); }
  // Once all are added.
  std::vector<int64_t> list();
  int64_t place(int64_t number) const {
    const Word& own = words_[size_t(number) / 64];
    return own.before + std::popcount(own.bits & (bit(number) - 1));
  }

 private:
  struct Word {
    uint64_t bits = 0;
    int64_t before = 0;  // how many numbers there are in the words before
  };
  Word& word(int64_t number) { return words_[size_t(number) / 64]; }
  static uint64_t bit(int64_t number) { return uint64_t(1) << (number % 64); }

  std::vector<Word> words_;
};

// Columns of a matrix (rows, width), contiguous.
struct Columns {
  int64_t rows, width;
  std::span<const int64_t> numbers;  // rising
  size_t element_bytes;  // 2, 4 or 8
};

// table (numbers, rows) = the columns of the matrix
void gather_columns(const Columns& columns, const void* matrix, void* table, int threads);
// the columns of the matrix = table (numbers, rows), and all of its other elements = 0
void scatter_columns(const Columns& columns, const void* table, void* matrix, int threads);

}  // namespace rnnfast::cpu
