// What the forward of a layer left for its backward. Included inside an instruction set's
// namespace.

// One sequence at one step, steps being counted in the order of the backward: step 0 is the last of
// the forward.
struct Row {
  int32_t step, b;
};

template <class Cell, class S>
class History {
  using A = Compute<S>;

 public:
  History(const BackwardArgs& args, Arena& arena)
      : batch(args),
        args_(args),
        pitch_(ceil_div(std::max(args.size.H, args.h_size), kLanes<A>) * kLanes<A>) {
    if (Cell::kHasCell) c0_ = arena.take<A>(args.size.B * pitch_);
    if (batch.has_resets()) zeros_ = arena.take<A>(pitch_);
  }

  void load(const Team& team) {
    const int64_t H = args_.size.H;
    const Span rows = team.share(args_.size.B);
    for (int64_t b = rows.begin; Cell::kHasCell && b < rows.end; ++b)
      convert(c0_ + b * pitch_, static_cast<const S*>(args_.c0) + batch.place(b) * H, H);
    if (zeros_ && team.index() == 0) __builtin_memset(zeros_, 0, size_t(pitch_) * sizeof(A));
  }

  int64_t time(int64_t step) const { return args_.reverse ? step : args_.size.T - 1 - step; }
  Span active(int64_t step, Span rows) const { return batch.active(time(step), rows); }

  const S* x(int64_t step, int64_t b) const {
    return static_cast<const S*>(args_.x) +
           batch.offset(time(step), b, args_.x_stride_t, args_.x_stride_b);
  }
  // the row of a token in a table of S, or of its gradient in A: [G][H]
  template <class T>
  T* token_row(T* table, int64_t step, int64_t b) const {
    const int64_t at = batch.offset(time(step), b, args_.x_stride_t, args_.x_stride_b);
    return table + args_.tokens[at] * Cell::kGates * args_.size.H;
  }
  // a row of so many elements of y, cells, ... or null
  template <class T>
  const T* at(const void* data, int64_t step, int64_t b, int64_t elements) const {
    return data ? static_cast<const T*>(data) + batch.row(time(step), b) * elements : nullptr;
  }

  // the states before a step
  const S* h_before(int64_t step, int64_t b) const {
    const int64_t t = time(step), P = args_.h_size;
    if (batch.resets(t, b)) return reinterpret_cast<const S*>(zeros_);
    if (batch.is_first(t, b)) return static_cast<const S*>(args_.h0) + batch.place(b) * P;
    return static_cast<const S*>(args_.y) + batch.row(batch.before(t), b) * P;
  }
  const A* c_before(int64_t step, int64_t b) const {
    const int64_t t = time(step);
    if (batch.resets(t, b)) return zeros_;
    if (batch.is_first(t, b)) return c0_ + b * pitch_;
    return static_cast<const A*>(args_.cells) + batch.row(batch.before(t), b) * args_.size.H;
  }
  // whether no gradient passes to the states before a step
  bool cut(int64_t step, int64_t b) const { return batch.resets(time(step), b); }

  const Batch batch;

 private:
  const BackwardArgs& args_;
  const int64_t pitch_;
  A* c0_ = nullptr;  // [B][pitch]
  A* zeros_ = nullptr;  // [pitch], where states are reset
};
