// Maps the rows that drivers process to the sequences of the batch: which rows are active at a time
// step, and where their data are in memory.
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

  // The index in the batch of the sequence in row b, and the inverse.
  int64_t place(int64_t b) const { return ragged_.places ? ragged_.places[b] : b; }
  int64_t row_at(int64_t place) const { return ragged_.rows ? ragged_.rows[place] : place; }
  int64_t length(int64_t b) const { return ragged_.lengths ? ragged_.lengths[b] : size_.T; }

  // The index, in rows, of row b at time t in y, gates and cells.
  int64_t row(int64_t t, int64_t b) const {
    return (ragged_.offsets ? ragged_.offsets[t] : t * size_.B) + place(b);
  }
  // The offset in elements of row b at time t in data with strides.
  int64_t offset(int64_t t, int64_t b, int64_t stride_t, int64_t stride_b) const {
    return (ragged_.offsets ? ragged_.offsets[t] * stride_b : t * stride_t) + place(b) * stride_b;
  }

  // Those of a thread's rows whose sequences have a step at time t. They are the first ones, since
  // lengths do not increase within a thread's rows.
  Span active(int64_t t, Span rows) const {
    if (!is_ragged()) return rows;
    Span unknown = rows;  // bisection: all rows before it are active, none from its end on is
    while (unknown.size() > 0) {
      const int64_t middle = unknown.begin + unknown.size() / 2;
      length(middle) > t ? unknown.begin = middle + 1 : unknown.end = middle;
    }
    return {rows.begin, unknown.begin};
  }

  // Whether time t is the first step of the sequence in the layer's direction.
  bool is_first(int64_t t, int64_t b) const { return t == (reverse_ ? length(b) - 1 : 0); }
  // The time of the step before the one at time t, in the layer's direction.
  int64_t before(int64_t t) const { return reverse_ ? t + 1 : t - 1; }
  // Whether no state passes from the step before to the one at time t. A reset at t cuts between
  // the times t - 1 and t, in both directions.
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
