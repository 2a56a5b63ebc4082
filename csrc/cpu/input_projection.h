// What the gates get from the input, W_ih x + b_ih: it does not wait for the recurrence, so a block
// of steps is computed at once. Included inside an instruction set's namespace.

template <class Cell, class S>
class InputProjection {
  using A = Compute<S>;
  using Op = Operand<S>;
  using Element = typename Op::Element;
  static constexpr int G = Cell::kGates, kLanesA = kLanes<A>;
  using Panels = GatePanels<Op, G>;
  using WholeRows = GatePanels<Op, 1>;

 public:
  // A thread has up to `block_rows` rows in a block of steps, one for each step and sequence.
  InputProjection(const ForwardArgs& args, const Plan& plan, const Batch& batch, int64_t block_rows,
                  Arena& arena)
      : args_(args),
        batch_(batch),
        packing_(plan.input),
        panels_{args.size.H, {plan.block_in_parts}},
        whole_rows_{G * args.size.H},
        by_whole_rows_(plan.split != Split::kUnits && !plan.block_in_parts && !args.tokens &&
                       whole_rows_pay(args.size)),
        block_rows_(block_rows),
        x_pitch_(panels_.format.row_size(args.size.I)),
        most_width_(Panels::kWidth * (plan.split == Split::kUnits
                                          ? ceil_div(panels_.count(), plan.threads)
                                          : panels_.count())) {
    with_panels([&](const auto& w) {
      if (packing_ != Packing::kNone) {
        const int64_t panels = packing_ == Packing::kOnce ? w.count() : plan.threads;
        packed_ = arena.take<A>(panels * w.size(args.size.I));
      }
      bias_ = arena.take<A>(w.count() * w.kWidth);
    });
    projected_ = arena.take<A>(plan.threads * block_rows * most_width_);
    inputs_ = arena.take<const S*>(plan.threads * block_rows);
    if (!std::is_same_v<S, Element> || x_pitch_ != args.size.I)
      x_ = arena.take<Element>(plan.threads * block_rows * x_pitch_);
  }

  // From here on pointers stand for this thread's part of memory.
  void take_own(int thread) {
    if (packing_ == Packing::kPanelwise)
      packed_ += thread * with_panels([&](const auto& w) { return w.size(args_.size.I); });
    projected_ += thread * block_rows_ * most_width_;
    inputs_ += thread * block_rows_;
    if (x_) x_ += thread * block_rows_ * x_pitch_;
  }

  void pack(const Team& team) {
    with_panels([&](const auto& w) {
      const int64_t I = args_.size.I;
      const Span own = team.share(w.count());
      for (int64_t p = own.begin; p < own.end; ++p) {
        if (packing_ == Packing::kOnce) good_ &= w.pack(w_ih(), I, p, packed_ + p * w.size(I));
        w.pack_bias(static_cast<const S*>(args_.b_ih), p, bias_ + p * w.kWidth);
      }
    });
  }

  // For the rows of a block of steps, one step after the other, and this thread's panels.
  void run(Span steps, Span rows, Span panels) {
    own_ = panels;
    int64_t count = 0;
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      const int64_t t = args_.reverse ? args_.size.T - 1 - step : step;
      const Span active = batch_.active(t, rows);
      for (int64_t b = active.begin; b < active.end; ++b) inputs_[count++] = input(t, b);
    }
    if (args_.tokens) return;
    for (int64_t r = 0; x_ && r < count; ++r)
      good_ &= panels_.format.to_left(x_ + r * x_pitch_, inputs_[r], args_.size.I);
    with_panels([&](const auto& w) { multiply(w, count); });
  }

  struct Rows {
    const A* first;  // [gate][unit vector]
    int64_t stride;
  };
  // Of some rows of the block and one panel of units; where they do not lie so already, in `to`.
  Rows rows(int64_t first, int count, int64_t panel, A* to) const {
    const int64_t stride = row_stride();
    if (!args_.tokens && !by_whole_rows_)
      return {projected_ + first * stride + (panel - own_.begin) * Panels::kWidth, stride};
    for (int i = 0; i < count; ++i, to += Panels::kWidth) {
      if (args_.tokens)
        panels_.look_up(inputs_[first + i], bias_ + panel * Panels::kWidth, panel, to);
      else
        panels_.look_up(projected_ + (first + i) * stride, nullptr, panel, to);
    }
    return {to - count * Panels::kWidth, Panels::kWidth};
  }

  // Whether all that this thread has split into parts has parts.
  bool good() const { return good_; }

 private:
  // Panels of whole units leave lanes unused where the units do not fill their last vector. Rows of
  // W_ih one after the other, [gate][unit], do not, but have to be taken apart for each panel.
  static bool whole_rows_pay(const Sizes& size) {
    const int64_t vectors = G * ceil_div(size.H, kLanesA);
    return (vectors - ceil_div(G * size.H, kLanesA)) * words<Op>(size.I) > 4 * vectors;
  }
  template <class F>
  decltype(auto) with_panels(F&& f) const {
    return by_whole_rows_ ? f(whole_rows_) : f(panels_);
  }
  int64_t row_stride() const {
    return by_whole_rows_ ? whole_rows_.width({0, whole_rows_.count()}) : panels_.width(own_);
  }

  const S* w_ih() const { return static_cast<const S*>(args_.w_ih); }

  // A row of x; of a token, what stands for W_ih x, [G][H].
  const S* input(int64_t t, int64_t b) const {
    const int64_t at = batch_.offset(t, b, args_.x_stride_t, args_.x_stride_b);
    return args_.tokens ? w_ih() + args_.tokens[at] * G * args_.size.H
                        : static_cast<const S*>(args_.x) + at;
  }

  template <class SomePanels>
  void multiply(const SomePanels& w, int64_t count) {
    const int64_t I = args_.size.I, stride = row_stride(), panel_size = w.size(I);
    const Span own = by_whole_rows_ ? Span{0, w.count()} : own_;
    for (int64_t p = own.begin; p < own.end; ++p) {
      const A* packed = w.packed_panel(packing_, w_ih(), I, packed_, p, good_);
      const bool last = packing_ != Packing::kOnce || p + 1 == own.end;
      const A* next = last ? nullptr : packed + panel_size;
      for_row_tiles(count, w.tile_rows(p), [&](int64_t r, int n) {
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i) {
          if constexpr (std::is_same_v<S, Element>) a[i] = inputs_[r + i];
          if (x_) a[i] = x_ + (r + i) * x_pitch_;
        }
        w.multiply(w_ih(), packed, bias_ + p * w.kWidth, I, p, a, n,
                   projected_ + r * stride + (p - own.begin) * w.kWidth, stride,
                   {Ahead::part_of(next, panel_size * int64_t(sizeof(A)), r, n, count)});
      });
    }
  }

  const ForwardArgs& args_;
  const Batch& batch_;
  const Packing packing_;
  const Panels panels_;
  const WholeRows whole_rows_;
  const bool by_whole_rows_;
  const int64_t block_rows_, x_pitch_, most_width_;
  bool good_ = true;
  Span own_{0, 0};  // panels
  A* packed_ = nullptr;  // panels, all or one for each thread; null: W_ih as it lies
  A* bias_;  // [panel][kWidth]
  A* projected_;  // per thread [block_rows][most_width]
  const S** inputs_;  // per thread [block_rows]
  Element* x_ = nullptr;  // per thread [block_rows][x_pitch], a copy of x where needed
};
