// Access to what the forward of a layer left for its backward: inputs, states and their positions.
#pragma once

#include "cpu/drivers/batch.h"
#include "cpu/drivers/context.h"

namespace rnnfast::cpu {

// One sequence at one step. Steps are counted in the order of the backward: step 0 is the last step
// of the forward.
struct BlockRow {
  int32_t step, b;
};

class History {
 public:
  History(const Context& context, const BackwardArgs& args, Arena& arena)
      : batch(args), context_(context), args_(args) {
    const int64_t pitch =
        context.compute(context.whole_vectors(std::max(context.c_size(args.size.H), args.h_size)));
    if (context.cell.cells > 0) c0_ = {arena.take<char>(args.size.B * pitch), pitch};
    if (batch.has_resets()) zeros_ = {arena.take<char>(pitch), pitch};
  }

  void load(const Team& team) {
    const int64_t size = context_.c_size(args_.size.H);
    const Span rows = team.share(args_.size.B);
    for (int64_t b = rows.begin; c0_ && b < rows.end; ++b)
      context_.kernels.load(c0_[b], at(args_.c0, context_.storage(batch.place(b) * size)), size);
    if (zeros_ && team.index() == 0) std::memset(zeros_.data, 0, size_t(zeros_.pitch));
  }

  int64_t time(int64_t step) const { return args_.reverse ? step : args_.size.T - 1 - step; }
  Span active(int64_t step, Span rows) const { return batch.active(time(step), rows); }

  // A row of x (S).
  const char* x(int64_t step, int64_t b) const {
    return at(args_.x,
              context_.storage(batch.offset(time(step), b, args_.x_stride_t, args_.x_stride_b)));
  }
  // The token at a step: an index of a row of w_ih.
  int64_t token(int64_t step, int64_t b) const {
    return args_.tokens[batch.offset(time(step), b, args_.x_stride_t, args_.x_stride_b)];
  }
  // A row, `bytes` long, of y, gates, cells or their gradients; null if `data` is null.
  const char* row(const void* data, int64_t step, int64_t b, int64_t bytes) const {
    return data ? at(data, batch.row(time(step), b) * bytes) : nullptr;
  }

  int64_t c_bytes() const { return context_.compute(context_.c_size(args_.size.H)); }
  // The states before a step: h (S) and c (A).
  const char* h_before(int64_t step, int64_t b) const {
    const int64_t t = time(step), bytes = context_.storage(args_.h_size);
    if (batch.resets(t, b)) return zeros_.data;
    if (batch.is_first(t, b)) return at(args_.h0, batch.place(b) * bytes);
    return at(args_.y, batch.row(batch.before(t), b) * bytes);
  }
  const char* c_before(int64_t step, int64_t b) const {
    const int64_t t = time(step);
    if (batch.resets(t, b)) return zeros_.data;
    if (batch.is_first(t, b)) return c0_[b];
    return at(args_.cells, batch.row(batch.before(t), b) * c_bytes());
  }
  // Whether no gradient passes to the states before a step.
  bool cut(int64_t step, int64_t b) const { return batch.resets(time(step), b); }

  const Batch batch;

 private:
  const Context& context_;
  const BackwardArgs& args_;
  Rows c0_;     // A [B]
  Rows zeros_;  // one row: the state after a reset
};

}  // namespace rnnfast::cpu
