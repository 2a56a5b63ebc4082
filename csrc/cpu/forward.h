// The forward of one layer in one direction. Included inside an instruction set's namespace.

template <class Cell, class S>
class Forward {
  using A = Compute<S>;
  using V = Vec<A>;
  using Op = Operand<S>;
  using Element = typename Op::Element;
  using Panels = GatePanels<Op, Cell::kGates>;
  using ProjectionPanels = GatePanels<Op, 1>;
  static constexpr int kLanesA = kLanes<A>;

 public:
  Forward(const ForwardArgs& args, const Plan& plan, Arena& arena)
      : args_(args),
        plan_(plan),
        batch_(args),
        panels_{args.size.H},
        projection_{args.w_hr ? args.h_size : 0},
        pitch_(padded(args.size.H)),
        h_pitch_(padded(args.h_size)),
        x_pitch_(words<Op>(args.size.I) * Op::kPerWord),
        copy_x_(!std::is_same_v<S, Element> || x_pitch_ != args.size.I) {
    const auto [T, B, I, H] = args.size;
    const int64_t count = panels_.count();
    if (plan.input != Packing::kNone) {
      const int64_t panels = plan.input == Packing::kOnce ? count : plan.threads;
      w_ih_ = arena.take<A>(panels * Panels::kWidth * words<Op>(I));
    }
    if (plan.hidden == Packing::kOnce) {
      w_hh_ = arena.take<A>(count * Panels::kWidth * words<Op>(args.h_size));
      w_hr_ = arena.take<A>(projection_.count() * ProjectionPanels::kWidth * words<Op>(H));
    }
    b_ih_ = arena.take<A>(count * Panels::kWidth);
    b_hh_ = arena.take<A>(count * Panels::kWidth);
    h_[0] = arena.take<Element>(B * h_pitch_);
    h_[1] = arena.take<Element>(B * h_pitch_);
    if (args.w_hr) {
      unprojected_ = arena.take<Element>(B * pitch_);
      no_bias_ = arena.take<A>(ProjectionPanels::kWidth);
    }
    if (Cell::kHasCell) c_ = arena.take<A>(B * pitch_);
    block_rows_ = plan.block_steps * (plan.split == Split::kRows ? ceil_div(B, plan.threads) : B);
    block_panels_ = plan.split == Split::kUnits ? ceil_div(count, plan.threads) : count;
    projected_ = arena.take<A>(plan.threads * block_rows_ * block_panels_ * Panels::kWidth);
    inputs_ = arena.take<const S*>(plan.threads * block_rows_);
    if (copy_x_) x_ = arena.take<Element>(plan.threads * block_rows_ * x_pitch_);
    if (batch_.has_resets()) zeros_ = arena.take<Element>(h_pitch_);
  }

  static StepShape step_shape(const Sizes& size) {
    return {size.B,
            Panels{size.H}.count(),
            words<Op>(size.H),
            Panels::kVectors,
            Panels::kRows,
            int(sizeof(A)),
            kLanesA,
            Panels::kUnitVectors * 30.0 * Cell::kGates};
  }

  // Waits for the steps of `upstream`, if any, before it reads them; `done` tells of its own.
  void run(const Team& team, const Progress* upstream, Progress& done) {
    const auto [T, B, I, H] = args_.size;
    pack(team.share(panels_.count()), team.share(projection_.count()));
    load_state(team.share(B));
    if (zeros_ && team.index() == 0)
      __builtin_memset(zeros_, 0, size_t(h_pitch_) * sizeof(Element));
    if (no_bias_ && team.index() == 0)
      __builtin_memset(no_bias_, 0, sizeof(A) * ProjectionPanels::kWidth);
    team.barrier();
    const Span rows = plan_.split == Split::kRows ? team.share(B) : Span{0, B};
    const Span panels =
        plan_.split == Split::kUnits ? team.share(panels_.count()) : Span{0, panels_.count()};
    const int64_t first = team.index() * block_rows_;
    const Block block{inputs_ + first, copy_x_ ? x_ + first * x_pitch_ : nullptr,
                      projected_ + first * block_panels_ * Panels::kWidth};
    for (int64_t s = 0; s < T; s += plan_.block_steps) {
      const Span steps{s, std::min(T, s + plan_.block_steps)};
      if (upstream) upstream->wait_for(steps.end);
      project(steps, rows, panels, block, team.index());
      const A* projected = block.projected;
      for (int64_t step = steps.begin; step < steps.end; ++step) {
        const Span active = batch_.active(time(step), rows);
        advance(step, active, panels, projected);
        if (projects()) {
          const bool shared = plan_.split == Split::kUnits;
          if (shared) team.barrier();
          const int64_t count = projection_.count();
          project_state(step, active, shared ? team.share(count) : Span{0, count});
        }
        projected += active.size() * panels.size() * Panels::kWidth;
        if (active.end < rows.end) clear(step, {active.end, rows.end}, team);
        if (plan_.split == Split::kUnits) team.barrier();
      }
      if (plan_.split == Split::kRows) team.barrier();
      if (team.index() == 0) done.reach(steps.end);
    }
    store_state(plan_.split == Split::kRows ? rows : team.share(B));
  }

 private:
  // A thread's memory for the rows of a block of steps: of all steps one after the other, those
  // that are at work.
  struct Block {
    const S** inputs;
    Element* x;  // copies of the inputs, where needed
    A* projected;
  };

  bool projects() const { return Cell::kHasCell && args_.w_hr; }

  // Elements of a row of state: whole vectors, and one more, as rows at multiples of 4 KiB would
  // compete for the same lines of L1.
  static int64_t padded(int64_t elements) {
    return (ceil_div(elements, kLanesA) + 1) * kLanesA * Op::kPerWord;
  }

  int64_t time(int64_t step) const { return args_.reverse ? args_.size.T - 1 - step : step; }
  const S* x_row(int64_t step, int64_t b) const {
    return static_cast<const S*>(args_.x) +
           batch_.offset(time(step), b, args_.x_stride_t, args_.x_stride_b);
  }

  // what stands for W_ih x of a token, [G][H]
  const S* token_row(int64_t step, int64_t b) const {
    const int64_t at = batch_.offset(time(step), b, args_.x_stride_t, args_.x_stride_b);
    return static_cast<const S*>(args_.w_ih) + args_.tokens[at] * Cell::kGates * args_.size.H;
  }

  void pack(Span panels, Span projection_panels) {
    const auto [T, B, I, H] = args_.size;
    const int64_t P = args_.h_size;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      if (plan_.input == Packing::kOnce)
        panels_.pack(static_cast<const S*>(args_.w_ih), I, p,
                     w_ih_ + p * Panels::kWidth * words<Op>(I));
      if (w_hh_)
        panels_.pack(static_cast<const S*>(args_.w_hh), P, p,
                     w_hh_ + p * Panels::kWidth * words<Op>(P));
      panels_.pack_bias(static_cast<const S*>(args_.b_ih), p, b_ih_ + p * Panels::kWidth);
      panels_.pack_bias(static_cast<const S*>(args_.b_hh), p, b_hh_ + p * Panels::kWidth);
    }
    for (int64_t p = projection_panels.begin; w_hr_ && p < projection_panels.end; ++p)
      projection_.pack(static_cast<const S*>(args_.w_hr), H, p,
                       w_hr_ + p * ProjectionPanels::kWidth * words<Op>(H));
  }

  void load_state(Span rows) {
    const int64_t H = args_.size.H, P = args_.h_size;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t from = batch_.place(b);
      convert(h_[0] + b * h_pitch_, static_cast<const S*>(args_.h0) + from * P, P);
      // what completes the last word of an odd number of elements
      if (P % Op::kPerWord) h_[0][b * h_pitch_ + P] = h_[1][b * h_pitch_ + P] = Element{};
      if (projects() && H % Op::kPerWord) unprojected_[b * pitch_ + H] = Element{};
      // a sequence that starts late may start at an odd step
      if (batch_.is_ragged())
        __builtin_memcpy(h_[1] + b * h_pitch_, h_[0] + b * h_pitch_, size_t(P) * sizeof(Element));
      if (Cell::kHasCell) convert(c_ + b * pitch_, static_cast<const S*>(args_.c0) + from * H, H);
    }
  }

  void store_state(Span rows) {
    const int64_t H = args_.size.H, P = args_.h_size;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t to = batch_.place(b), steps = args_.reverse ? args_.size.T : batch_.length(b);
      convert(static_cast<S*>(args_.h_n) + to * P, h_[steps & 1] + b * h_pitch_, P);
      if (Cell::kHasCell) convert(static_cast<S*>(args_.c_n) + to * H, c_ + b * pitch_, H);
    }
  }

  // zeros as the outputs of sequences that have no such step
  void clear(int64_t step, Span rows, const Team& team) const {
    if (batch_.is_packed()) return;
    if (plan_.split == Split::kUnits) {
      const Span own = team.share(rows.size());
      rows = {rows.begin + own.begin, rows.begin + own.end};
    }
    const int64_t H = args_.size.H, P = args_.h_size;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t at = batch_.row(time(step), b);
      __builtin_memset(static_cast<S*>(args_.y) + at * P, 0, size_t(P) * sizeof(S));
      if (Cell::kHasCell && args_.cells)
        __builtin_memset(static_cast<A*>(args_.cells) + at * H, 0, size_t(H) * sizeof(A));
    }
  }

  // projected[row of the block][panel] = W_ih x + b_ih
  void project(Span steps, Span rows, Span panels, const Block& block, int thread) const {
    if (args_.tokens) return;
    const int64_t I = args_.size.I;
    const S* w = static_cast<const S*>(args_.w_ih);
    int64_t count = 0;
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      const Span active = batch_.active(time(step), rows);
      for (int64_t b = active.begin; b < active.end; ++b) block.inputs[count++] = x_row(step, b);
    }
    for (int64_t r = 0; copy_x_ && r < count; ++r) {
      Element* x = block.x + r * x_pitch_;
      convert(x, block.inputs[r], I);
      for (int64_t i = I; i < x_pitch_; ++i) x[i] = Element{};
    }
    const int64_t row_stride = panels.size() * Panels::kWidth;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      A* packed = nullptr;
      if (plan_.input == Packing::kOnce) packed = w_ih_ + p * Panels::kWidth * words<Op>(I);
      if (plan_.input == Packing::kPanelwise) {
        packed = w_ih_ + thread * Panels::kWidth * words<Op>(I);
        panels_.pack(w, I, p, packed);
      }
      for_row_tiles(count, Panels::kRows, [&](int64_t r, int n) {
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i) {
          if constexpr (std::is_same_v<S, Element>) a[i] = block.inputs[r + i];
          if (copy_x_) a[i] = block.x + (r + i) * x_pitch_;
        }
        panels_.multiply(w, packed, b_ih_ + p * Panels::kWidth, I, p, a, n,
                         block.projected + r * row_stride + (p - panels.begin) * Panels::kWidth,
                         row_stride);
      });
    }
  }

  const Element* state_before(int64_t step, int64_t b) const {
    return batch_.resets(time(step), b) ? zeros_ : h_[step & 1] + b * h_pitch_;
  }

  // One step of the recurrence: the product with W_hh and, on each tile, the gate maths.
  void advance(int64_t step, Span rows, Span panels, const A* projected) {
    alignas(64) A from_h[kMaxTileRows * Panels::kWidth], from_token[Panels::kWidth];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const A* packed = w_hh_ ? w_hh_ + p * Panels::kWidth * words<Op>(args_.h_size) : nullptr;
      for_row_tiles(rows.size(), Panels::kRows, [&](int64_t r, int n) {
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i) a[i] = state_before(step, rows.begin + r + i);
        panels_.multiply(static_cast<const S*>(args_.w_hh), packed, b_hh_ + p * Panels::kWidth,
                         args_.h_size, p, a, n, from_h, Panels::kWidth);
        for (int i = 0; i < n; ++i) {
          const A* from_x =
              projected + ((r + i) * panels.size() + p - panels.begin) * Panels::kWidth;
          if (args_.tokens) {
            panels_.look_up(token_row(step, rows.begin + r + i), b_ih_ + p * Panels::kWidth, p,
                            from_token);
            from_x = from_token;
          }
          apply_cell(step, rows.begin + r + i, p, from_x, from_h + i * Panels::kWidth);
        }
      });
    }
  }

  void apply_cell(int64_t step, int64_t b, int64_t panel, const A* from_x, const A* from_h) {
    const int64_t H = args_.size.H;
    const int64_t row = batch_.row(time(step), b);
    const Element* h_before = state_before(step, b);
    constexpr int kSaved = Cell::kSaved;
    for (int v = 0; v < Panels::kUnitVectors; ++v) {
      const int64_t unit = panel * Panels::kUnits + v * kLanesA;
      const int64_t left = H - unit;
      if (left <= 0) break;
      V px[Cell::kGates], ph[Cell::kGates], saved[kSaved + 1], h;
      for (int g = 0; g < Cell::kGates; ++g) {
        px[g] = load(from_x + (g * Panels::kUnitVectors + v) * kLanesA);
        ph[g] = load(from_h + (g * Panels::kUnitVectors + v) * kLanesA);
      }
      const V h_prev = projects() ? V{} : load(h_before + unit);  // the LSTM does without
      V c = Cell::kHasCell && h_before != zeros_ ? load(c_ + b * pitch_ + unit) : V{};
      Cell::template forward<Math>(px, ph, h_prev, c, h, saved);
      if (projects())
        store(unprojected_ + b * pitch_ + unit, h, Op::kPerWord == 1 ? kLanesA : left);
      else
        store_h(step, b, row, unit, h);
      if (Cell::kHasCell) store(c_ + b * pitch_ + unit, c);
      if (args_.gates)
        for (int k = 0; k < kSaved; ++k)
          store(static_cast<S*>(args_.gates) + (row * kSaved + k) * H + unit, saved[k], left);
      if (Cell::kHasCell && args_.cells)
        store(static_cast<A*>(args_.cells) + row * H + unit, c, left);
    }
  }

  RNNFAST_HD void store_h(int64_t step, int64_t b, int64_t row, int64_t unit, V h) {
    const int64_t left = args_.h_size - unit;
    S* y = static_cast<S*>(args_.y) + row * args_.h_size + unit;
    store(y, h, left);
    if constexpr (!std::is_same_v<S, A>) h = load(y, left);  // the next step sees it as stored
    store(h_[(step + 1) & 1] + b * h_pitch_ + unit, h, Op::kPerWord == 1 ? kLanesA : left);
  }

  // h = W_hr times what the cells have put out
  void project_state(int64_t step, Span rows, Span panels) {
    constexpr int width = ProjectionPanels::kWidth;
    const int64_t H = args_.size.H, P = args_.h_size;
    alignas(64) A h[kMaxTileRows * width];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const A* packed = w_hr_ ? w_hr_ + p * width * words<Op>(H) : nullptr;
      for_row_tiles(rows.size(), ProjectionPanels::kRows, [&](int64_t r, int n) {
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i) a[i] = unprojected_ + (rows.begin + r + i) * pitch_;
        projection_.multiply(static_cast<const S*>(args_.w_hr), packed, no_bias_, H, p, a, n, h,
                             width);
        for (int i = 0; i < n; ++i) {
          const int64_t b = rows.begin + r + i, row = batch_.row(time(step), b);
          for (int64_t at = 0; at < width && p * width + at < P; at += kLanesA)
            store_h(step, b, row, p * width + at, load(h + i * width + at));
        }
      });
    }
  }

  const ForwardArgs& args_;
  const Plan& plan_;
  const Batch batch_;
  const Panels panels_;
  const ProjectionPanels projection_;
  const int64_t pitch_, h_pitch_;
  const int64_t x_pitch_;        // I, rounded up to whole words
  const bool copy_x_;            // x cannot be multiplied as it lies
  A* w_ih_ = nullptr;  // packed [panel, or thread][words of I][kWidth], null: as it lies
  A* w_hh_ = nullptr;  // packed [panel][words of P][kWidth], null: as it lies
  A* w_hr_ = nullptr;  // packed [panel][words of H][kWidth], null: as it lies
  A *b_ih_, *b_hh_;  // [panel][kWidth]
  A* no_bias_ = nullptr;  // zeros for a panel of the projection
  Element* h_[2];  // state before even and odd steps [B][h_pitch]
  Element* unprojected_ = nullptr;  // [B][pitch], where h is projected
  A* c_ = nullptr;  // [B][pitch]
  A* projected_;  // per thread [block_rows][block_panels][kWidth]
  const S** inputs_;  // per thread [block_rows]
  Element* x_ = nullptr;  // per thread [block_rows][x_pitch], a copy of x where needed
  Element* zeros_ = nullptr;  // [h_pitch], where states are reset
  int64_t block_rows_, block_panels_;
};
