// The sequences of a batch as the rows of the drivers: which are at work at a step, and where they
// lie in memory.
#pragma once

#include "arguments.h"
#include "cpu/parallel.h"

namespace rnnfast::cpu {

class Batch {
 public:
  template <class Args>
  explicit Batch(const Args& args)
      : size_(args.size), reverse_(args.reverse), ragged_(args.ragged), reset_(args.reset) {}

  bool is_ragged() const { return ragged_.lengths; }
  bool is_packed() const { return ragged_.offsets; }
  bool has_resets() const { return reset_; }

  // the sequence behind a row: its index in states, and within a step in all else
  int64_t place(int64_t b) const { return ragged_.places ? ragged_.places[b] : b; }
  int64_t row_at(int64_t place) const { return ragged_.rows ? ragged_.rows[place] : place; }
  int64_t length(int64_t b) const { return ragged_.lengths ? ragged_.lengths[b] : size_.T; }

  // where a row of a step lies in y, gates and cells, counted in rows
  int64_t row(int64_t t, int64_t b) const {
    return (ragged_.offsets ? ragged_.offsets[t] : t * size_.B) + place(b);
  }
  // the same in elements, of data with strides
  int64_t offset(int64_t t, int64_t b, int64_t stride_t, int64_t stride_b) const {
    return (ragged_.offsets ? ragged_.offsets[t] * stride_b : t * stride_t) + place(b) * stride_b;
  }

  // Those of a thread's rows, the first ones, whose sequences have a step at time t.
  Span active(int64_t t, Span rows) const {
    if (!is_ragged()) return rows;
    Span unknown = rows;  // by bisection: all before are at work, none from its end on
    while (unknown.size() > 0) {
      const int64_t middle = unknown.begin + unknown.size() / 2;
      length(middle) > t ? unknown.begin = middle + 1 : unknown.end = middle;
    }
    return {rows.begin, unknown.begin};
  }

  // the first step that a sequence takes, and the time of the step before another
  bool is_first(int64_t t, int64_t b) const { return t == (reverse_ ? length(b) - 1 : 0); }
  int64_t before(int64_t t) const { return reverse_ ? t + 1 : t - 1; }
  // Whether no state passes to a step from the one before it: a reset at t cuts between the times
  // t - 1 and t, whatever the direction.
  bool resets(int64_t t, int64_t b) const {
    if (!reset_) return false;
    const int64_t border = reverse_ ? t + 1 : t;
    return border < length(b) && reset_[border * size_.B + place(b)];
  }

 private:
  const Sizes& size_;
  const bool reverse_;
  const Ragged& ragged_;
  const bool* reset_;
};

}  // namespace rnnfast::cpu
