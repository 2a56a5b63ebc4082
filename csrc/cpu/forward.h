// The forward of one layer in one direction. Included inside an instruction set's namespace.

template <class Cell, class S>
class Forward {
  using A = Compute<S>;
  using Op = Operand<S>;
  using Element = typename Op::Element;
  using Panels = GatePanels<Op, Cell::kGates>;
  using ProjectionPanels = GatePanels<Op, 1>;
  using Tile = CellTile<Cell, S>;
  static constexpr int kLanesA = kLanes<A>;

 public:
  Forward(const ForwardArgs& args, const Plan& plan, Arena& arena)
      : args_(args),
        plan_(plan),
        batch_(args),
        panels_{args.size.H, {plan.step_in_parts}},
        projection_{args.w_hr ? args.h_size : 0},
        pitch_(padded(args.size.H)),
        h_pitch_(padded(args.h_size)),
        left_pitch_(panels_.format.row_size(args.h_size)),
        most_rows_(plan.split == Split::kRows ? ceil_div(args.size.B, plan.threads) : args.size.B),
        input_(args, plan, batch_, plan.block_steps * most_rows_, arena) {
    const auto [T, B, I, H] = args.size;
    const int64_t count = panels_.count();
    if (plan.hidden != Packing::kNone) {
      const int64_t panels = plan.hidden == Packing::kOnce ? count : plan.threads;
      w_hh_ = arena.take<A>(panels * panels_.size(args.h_size));
      w_hr_ = arena.take<A>(projection_.count() * ProjectionPanels::kWidth * words<Op>(H));
    }
    b_hh_ = arena.take<A>(count * Panels::kWidth);
    const int64_t others = plan.threads - 1, copies = plan.split == Split::kUnits ? others + 1 : 1;
    for (Element*& h : h_) h = arena.take<Element>(B * h_pitch_ + others * kApart<Element>);
    if (args.w_hr) {
      unprojected_ = arena.take<Element>(B * pitch_ + others * kApart<Element>);
      no_bias_ = arena.take<A>(ProjectionPanels::kWidth);
    }
    rows_ = arena.take<typename Tile::Row>(copies * B + others * kApart<typename Tile::Row>);
    if (Cell::kHasCell) c_ = arena.take<A>(copies * B * pitch_ + others * kApart<A>);
    left_size_ = plan.step_in_parts ? most_rows_ * left_pitch_ : 0;
    left_ = arena.take<Element>(plan.threads * left_size_);
    if (batch_.has_resets()) zeros_ = arena.take<Element>(h_pitch_);
  }

  static StepShape step_shape(const Sizes& size, bool in_parts) {
    const Panels panels{size.H, {in_parts}};
    const int vectors = panels.vectors(0);
    return panels.format.step_shape(size.B, panels.count(), size.H, vectors, vectors * 30.0);
  }

  // Waits for the steps of `upstream`, if any, before it reads them; `done` tells of its own. False
  // if something that should be split into parts has none: the outputs are wrong then.
  bool run(const Team& team, const Progress* upstream, Progress& done) {
    const auto [T, B, I, H] = args_.size;
    const bool by_units = plan_.split == Split::kUnits;
    const Span rows = plan_.split == Split::kRows ? team.share(B) : Span{0, B};
    const Span panels = by_units ? team.share(panels_.count()) : Span{0, panels_.count()};
    take_own(team.index());
    input_.pack(team);
    pack(team.share(panels_.count()), team.share(projection_.count()));
    load_h(team.share(B));
    load_c(rows, panels);
    if (zeros_ && team.index() == 0)
      __builtin_memset(zeros_, 0, size_t(h_pitch_) * sizeof(Element));
    if (no_bias_ && team.index() == 0)
      __builtin_memset(no_bias_, 0, sizeof(A) * ProjectionPanels::kWidth);
    team.barrier();
    for (int64_t s = 0; s < T; s += plan_.block_steps) {
      const Span steps{s, std::min(T, s + plan_.block_steps)};
      if (upstream) upstream->wait_for(steps.end);
      input_.run(steps, rows, panels);
      int64_t first = 0;  // row of the step in the block
      Outputs before{steps.begin, {0, 0}};
      for (int64_t step = steps.begin; step < steps.end; ++step) {
        const Span active = batch_.active(time(step), rows);
        advance(step, active, panels, first, before);
        if (projects()) {
          if (by_units) team.barrier();
          const int64_t count = projection_.count();
          project_state(step, active, by_units ? team.share(count) : Span{0, count});
        }
        first += active.size();
        if (by_units) team.barrier();
        const auto part = [&](Span of) {  // of rows that are complete now
          const Span own = by_units ? team.share(of.size()) : Span{0, of.size()};
          return Span{of.begin + own.begin, of.begin + own.end};
        };
        before = {step, part(active)};
        clear(step, part({active.end, rows.end}));
      }
      write(before);
      team.barrier();
      if (team.index() == 0) done.reach(steps.end);
    }
    store_h(by_units ? team.share(B) : rows);
    store_c(rows, panels);
    return good_ && input_.good();
  }

 private:
  // Rows of y after a step that this thread has to write.
  struct Outputs {
    int64_t step;
    Span rows;
  };

  bool projects() const { return Cell::kHasCell && args_.w_hr; }

  // What threads write at the same time lies so far apart. Nearer by, the hardware's prefetching
  // for one thread's rows, which runs ahead, takes lines away from another's.
  template <class T>
  static constexpr int64_t kApart = 16384 / sizeof(T);

  // From here on these stand for this thread's part of memory. With units dealt to threads h is
  // common to all, and rows of the others are a thread's own copies.
  void take_own(int index) {
    const bool by_rows = plan_.split == Split::kRows;
    const int64_t B = args_.size.B;
    if (by_rows) {
      for (Element*& h : h_) h += index * kApart<Element>;
      if (unprojected_) unprojected_ += index * kApart<Element>;
    }
    input_.take_own(index);
    if (plan_.hidden == Packing::kPanelwise) w_hh_ += index * panels_.size(args_.h_size);
    left_ += index * left_size_;
    rows_ += index * ((by_rows ? 0 : B) + kApart<typename Tile::Row>);
    if (c_) c_ += index * ((by_rows ? 0 : B * pitch_) + kApart<A>);
  }
  Element* h_after(int64_t step, int64_t b) const { return h_[(step + 1) & 1] + b * h_pitch_; }

  // Elements of a row of state: whole vectors, and one more, as rows at multiples of 4 KiB would
  // compete for the same lines of L1.
  static int64_t padded(int64_t elements) {
    return (ceil_div(elements, kLanesA) + 1) * kLanesA * Op::kPerWord;
  }

  int64_t time(int64_t step) const { return args_.reverse ? args_.size.T - 1 - step : step; }
  void pack(Span panels, Span projection_panels) {
    const auto [T, B, I, H] = args_.size;
    const int64_t P = args_.h_size;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      if (plan_.hidden == Packing::kOnce)
        good_ &= panels_.pack(static_cast<const S*>(args_.w_hh), P, p, w_hh_ + p * panels_.size(P));
      panels_.pack_bias(static_cast<const S*>(args_.b_hh), p, b_hh_ + p * Panels::kWidth);
    }
    for (int64_t p = projection_panels.begin; w_hr_ && p < projection_panels.end; ++p)
      projection_.pack(static_cast<const S*>(args_.w_hr), H, p,
                       w_hr_ + p * ProjectionPanels::kWidth * words<Op>(H));
  }

  void load_h(Span rows) {
    const int64_t H = args_.size.H, P = args_.h_size;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      convert(h_[0] + b * h_pitch_, static_cast<const S*>(args_.h0) + batch_.place(b) * P, P);
      // what completes the last word of an odd number of elements
      if (P % Op::kPerWord) h_[0][b * h_pitch_ + P] = h_[1][b * h_pitch_ + P] = Element{};
      if (projects() && H % Op::kPerWord) unprojected_[b * pitch_ + H] = Element{};
      // a sequence that starts late may start at an odd step
      if (batch_.is_ragged())
        __builtin_memcpy(h_[1] + b * h_pitch_, h_[0] + b * h_pitch_, size_t(P) * sizeof(Element));
    }
  }
  void store_h(Span rows) const {
    const int64_t P = args_.h_size;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t steps = args_.reverse ? args_.size.T : batch_.length(b);
      convert(static_cast<S*>(args_.h_n) + batch_.place(b) * P, h_[steps & 1] + b * h_pitch_, P);
    }
  }

  // f(row, first unit, units) for a thread's part of c
  template <class F>
  void for_c(Span rows, Span panels, F&& f) const {
    const int64_t begin = panels.begin * Panels::kUnits;
    const int64_t count = std::min(args_.size.H, panels.end * Panels::kUnits) - begin;
    for (int64_t b = rows.begin; Cell::kHasCell && count > 0 && b < rows.end; ++b)
      f(b, begin, count);
  }
  void load_c(Span rows, Span panels) {
    for_c(rows, panels, [&](int64_t b, int64_t unit, int64_t count) {
      const int64_t from = batch_.place(b) * args_.size.H + unit;
      convert(c_ + b * pitch_ + unit, static_cast<const S*>(args_.c0) + from, count);
    });
  }
  void store_c(Span rows, Span panels) const {
    for_c(rows, panels, [&](int64_t b, int64_t unit, int64_t count) {
      const int64_t to = batch_.place(b) * args_.size.H + unit;
      convert(static_cast<S*>(args_.c_n) + to, c_ + b * pitch_ + unit, count);
    });
  }

  // Copies y from h row by row: written unit by unit, it would have threads meet at the borders of
  // their parts (see kApart).
  void write(const Outputs& outputs) const {
    const int64_t P = args_.h_size, step = outputs.step;
    for (int64_t b = outputs.rows.begin; b < outputs.rows.end; ++b)
      convert(static_cast<S*>(args_.y) + batch_.row(time(step), b) * P, h_after(step, b), P);
  }

  // zeros as the outputs of sequences that have no such step
  void clear(int64_t step, Span rows) const {
    if (batch_.is_packed()) return;
    const int64_t H = args_.size.H, P = args_.h_size;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t at = batch_.row(time(step), b);
      __builtin_memset(static_cast<S*>(args_.y) + at * P, 0, size_t(P) * sizeof(S));
      if (Cell::kHasCell && args_.cells)
        __builtin_memset(static_cast<A*>(args_.cells) + at * H, 0, size_t(H) * sizeof(A));
    }
  }

  const Element* state_before(int64_t step, int64_t b) const {
    return batch_.resets(time(step), b) ? zeros_ : h_[step & 1] + b * h_pitch_;
  }

  // One step of the recurrence: the product with W_hh and, on each tile, the gate maths. Meanwhile
  // writes the outputs of the step before, a few rows after each tile: at once, they would wait for
  // memory.
  void advance(int64_t step, Span rows, Span panels, int64_t first_row, Outputs before) {
    const int64_t tiles =
        panels.size() * ceil_div(rows.size(), panels_.format.tile_rows(Panels::kVectors));
    const int64_t at_once = ceil_div(before.rows.size(), std::max<int64_t>(tiles, 1));
    const auto write_some = [&] {
      const int64_t end = std::min(before.rows.begin + at_once, before.rows.end);
      write({before.step, {before.rows.begin, end}});
      before.rows.begin = end;
    };
    // The gate maths of a tile waits for the next tile where that goes to the matrix unit.
    const bool later = panels_.format.in_matrix_unit();
    alignas(64) A from_h[2][kMaxTileRows * Panels::kWidth];
    alignas(64) A from_x[2][kMaxTileRows * Panels::kWidth];
    GateMaths gate_maths(args_.size.H);
    int64_t count = 0;
    for (int64_t b = rows.begin; b < rows.end; ++b) set_row(rows_[b], step, b);
    const S* w_hh = static_cast<const S*>(args_.w_hh);
    const int64_t panel_size = panels_.size(args_.h_size);
    for (int64_t r = 0; plan_.step_in_parts && r < rows.size(); ++r)
      good_ &= panels_.format.to_left(left_ + r * left_pitch_, rows_[rows.begin + r].h_prev,
                                      args_.h_size);
    // To and fro: a step begins with the panels that the last one left in cache.
    const int64_t way = step % 2 ? -1 : 1, first = way > 0 ? panels.begin : panels.end - 1;
    for (int64_t i = 0; i < panels.size(); ++i) {
      const int64_t p = first + way * i;
      const A* packed = panels_.packed_panel(plan_.hidden, w_hh, args_.h_size, w_hh_, p, good_);
      const bool last = plan_.hidden != Packing::kOnce || i + 1 == panels.size();
      const A* next = last ? nullptr : packed + way * panel_size;
      for_row_tiles(rows.size(), panels_.tile_rows(p), [&](int64_t r, int n) {
        const typename Tile::Row* tile = rows_ + rows.begin + r;
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i)
          a[i] = plan_.step_in_parts ? left_ + (r + i) * left_pitch_ : tile[i].h_prev;
        const int buffer = later ? count++ % 2 : 0;
        const Ahead ahead =
            Ahead::part_of(next, panel_size * int64_t(sizeof(A)), r, n, rows.size());
        panels_.multiply(w_hh, packed, b_hh_ + p * Panels::kWidth, args_.h_size, p, a, n,
                         from_h[buffer], Panels::kWidth, {ahead, &gate_maths});
        gate_maths.finish();
        const auto x = input_.rows(first_row + r, n, p, from_x[buffer]);
        gate_maths.take(p, tile, n, x.first, x.stride, from_h[buffer]);
        if (!later) gate_maths.finish();
        write_some();
      });
    }
    gate_maths.finish();
    write(before);
  }

  // The gate maths of a tile, a few rows at a time.
  class GateMaths final : public Errand {
   public:
    explicit GateMaths(int64_t H) : H_(H) {}
    void take(int64_t panel, const typename Tile::Row* rows, int count, const A* from_x,
              int64_t x_stride, const A* from_h) {
      panel_ = panel, rows_ = rows, count_ = count;
      from_x_ = from_x, x_stride_ = x_stride, from_h_ = from_h;
      this->left_ = ceil_div(count, kAtOnce);
    }

   private:
    static constexpr int kAtOnce = 3;
    void do_next() override {
      Tile::forward(H_, panel_, rows_, std::min(count_, kAtOnce), from_x_, x_stride_, from_h_);
      rows_ += kAtOnce, count_ -= kAtOnce;
      from_x_ += kAtOnce * x_stride_, from_h_ += kAtOnce * Panels::kWidth;
    }

    const int64_t H_;
    int64_t panel_, x_stride_;
    const typename Tile::Row* rows_;
    int count_;
    const A *from_x_, *from_h_;
  };

  void set_row(typename Tile::Row& to, int64_t step, int64_t b) const {
    const int64_t H = args_.size.H, row = batch_.row(time(step), b);
    to.h_prev = state_before(step, b);
    to.h = projects() ? unprojected_ + b * pitch_ : h_after(step, b);
    to.c = Cell::kHasCell ? c_ + b * pitch_ : nullptr;
    to.c_prev = to.h_prev == zeros_ ? nullptr : to.c;
    to.cells = args_.cells ? static_cast<A*>(args_.cells) + row * H : nullptr;
    to.saved = args_.gates ? static_cast<S*>(args_.gates) + row * Cell::kSaved * H : nullptr;
  }

  // h = W_hr times what the cells have put out
  void project_state(int64_t step, Span rows, Span panels) {
    constexpr int width = ProjectionPanels::kWidth;
    const int64_t H = args_.size.H, P = args_.h_size;
    alignas(64) A h[kMaxTileRows * width];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const A* packed = w_hr_ ? w_hr_ + p * width * words<Op>(H) : nullptr;
      for_row_tiles(rows.size(), projection_.tile_rows(p), [&](int64_t r, int n) {
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i) a[i] = unprojected_ + (rows.begin + r + i) * pitch_;
        projection_.multiply(static_cast<const S*>(args_.w_hr), packed, no_bias_, H, p, a, n, h,
                             width);
        for (int i = 0; i < n; ++i)
          for (int64_t at = 0, unit = p * width; at < width && unit < P;
               at += kLanesA, unit += kLanesA)
            store_rounded<S>(h_after(step, rows.begin + r + i) + unit, load(h + i * width + at),
                             P - unit);
      });
    }
  }

  const ForwardArgs& args_;
  const Plan& plan_;
  const Batch batch_;
  const Panels panels_;  // of W_hh
  const ProjectionPanels projection_;
  const int64_t pitch_, h_pitch_;
  const int64_t left_pitch_;  // of rows of h in parts
  const int64_t most_rows_;  // of the batch, for a thread
  InputProjection<Cell, S> input_;
  bool good_ = true;  // all that this thread has split has parts
  A* w_hh_ = nullptr;  // packed panels, all or one for each thread; null: as they lie
  A* w_hr_ = nullptr;  // packed [panel][words of H][kWidth], null: as it lies
  A* b_hh_;  // [panel][kWidth]
  A* no_bias_ = nullptr;  // zeros for a panel of the projection
  Element* h_[2];  // state before even and odd steps [B][h_pitch]
  Element* unprojected_ = nullptr;  // [B][pitch], where h is projected
  typename Tile::Row* rows_;  // of a step [B]
  A* c_ = nullptr;  // [B][pitch], of each thread where units are dealt
  Element* left_;  // per thread [most rows][left_pitch], h in parts
  int64_t left_size_;
  Element* zeros_ = nullptr;  // [h_pitch], where states are reset
};
