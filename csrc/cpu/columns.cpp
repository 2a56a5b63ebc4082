#include "cpu/columns.h"

#include <algorithm>
#include <type_traits>

#include "cpu/parallel.h"

namespace rnnfast::cpu {
namespace {

// Below so many elements a second thread saves less than it takes to call it.
constexpr int64_t kElementsPerThread = 1 << 15;
// Elements of a row of the matrix that are cleared, and then written, while they are in L1.
constexpr int64_t kClearedAtOnce = 1024;

// Calls f(row, count) for groups of rows that are as many as a cache line of the table has
// elements.
template <class Word, class F>
void for_groups(const Columns& columns, int64_t elements, int threads, F&& f) {
  constexpr int64_t kGroup = 64 / sizeof(Word);
  const int64_t groups = ceil_div(columns.rows, kGroup);
  threads = int(std::clamp<int64_t>(elements / kElementsPerThread, 1, threads));
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kGroup; row < std::min(end * kGroup, columns.rows); row += kGroup)
      f(row, std::min(kGroup, columns.rows - row));
  };
  const auto work = [&](int index) {
    run(groups * index / threads, groups * (index + 1) / threads);
  };
  if (threads == 1 || !run_in_team(threads, work)) run(0, groups);
}

template <class Word>
void gather(const Columns& columns, const Word* matrix, Word* table, int threads) {
  const int64_t elements = columns.rows * int64_t(columns.numbers.size());
  for_groups<Word>(columns, elements, threads, [&](int64_t row, int64_t count) {
    Word* to = table + row;
    for (const int64_t number : columns.numbers) {
      const Word* from = matrix + row * columns.width + number;
      for (int64_t i = 0; i < count; ++i) to[i] = from[i * columns.width];
      to += columns.rows;
    }
  });
}

template <class Word>
void scatter(const Columns& columns, const Word* table, Word* matrix, int threads) {
  const int64_t elements = columns.rows * columns.width;
  for_groups<Word>(columns, elements, threads, [&](int64_t row, int64_t count) {
    const Word* from = table + row;
    auto next = columns.numbers.begin();
    for (int64_t begin = 0; begin < columns.width; begin += kClearedAtOnce) {
      const int64_t end = std::min(begin + kClearedAtOnce, columns.width);
      Word* to = matrix + row * columns.width;
      for (int64_t i = 0; i < count; ++i)
        std::fill(to + i * columns.width + begin, to + i * columns.width + end, Word(0));
      for (; next != columns.numbers.end() && *next < end; ++next, from += columns.rows)
        for (int64_t i = 0; i < count; ++i) to[i * columns.width + *next] = from[i];
    }
  });
}

// Calls f with the type of unsigned integers of so many bytes.
template <class F>
void with_word(size_t bytes, F&& f) {
  if (bytes == 2) return f(std::type_identity<uint16_t>{});
  if (bytes == 4) return f(std::type_identity<uint32_t>{});
  f(std::type_identity<uint64_t>{});
}

}  // namespace

std::vector<int64_t> DistinctNumbers::list() {
  std::vector<int64_t> numbers;
  for (size_t i = 0; i < words_.size(); ++i) {
    words_[i].before = int64_t(numbers.size());
    for (uint64_t bits = words_[i].bits; bits != 0; bits &= bits - 1)
      numbers.push_back(int64_t(i) * 64 + std::countr_zero(bits));
  }
  return numbers;
}

void gather_columns(const Columns& columns, const void* matrix, void* table, int threads) {
  with_word(columns.element_bytes, [&]<class Word>(std::type_identity<Word>) {
    gather(columns, static_cast<const Word*>(matrix), static_cast<Word*>(table), threads);
  });
}

void scatter_columns(const Columns& columns, const void* table, void* matrix, int threads) {
  with_word(columns.element_bytes, [&]<class Word>(std::type_identity<Word>) {
    scatter(columns, static_cast<const Word*>(table), static_cast<Word*>(matrix), threads);
  });
}

}  // namespace rnnfast::cpu
