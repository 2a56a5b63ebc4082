// The backward of one layer in one direction. Included inside an instruction set's namespace.
//
// Steps are walked in the reverse of the forward's order, in blocks. Per step: the gradient of h
// comes from the step after it through W_hh, and on each tile of that product the cell turns it
// into gate gradients. Per block: the gradients of x, of the weights and of the biases as products
// over all rows of the block.

template <class Cell, class S>
class Backward {
  using A = Compute<S>;
  using V = Vec<A>;
  static constexpr int kLanesA = kLanes<A>;
  static constexpr int G = Cell::kGates, D = Cell::kGradBlocks;
  static constexpr int kUnits = 2 * kLanesA;  // to which the cell is applied side by side
  using Op = Operand<S>;
  using Element = typename Op::Element;
  using Columns = ColumnPanels<Op>;

 public:
  Backward(const BackwardArgs& args, const Plan& plan, Arena& arena)
      : args_(args),
        plan_(plan),
        history_(args, arena),
        recompute_(args, plan, history_, arena),
        products_(args, plan, history_, d_gates_, d_h_rows_, unprojected_, arena),
        hidden_{args.h_size, {plan.step_in_parts}},
        units_{args.size.H},
        block_rows_(plan.block_steps * args.size.B),
        pitch_(ceil_div(args.size.H, kLanesA) * kLanesA),
        h_pitch_((ceil_div(args.h_size, kLanesA) + 1) * kLanesA * Op::kPerWord),
        depth_(G * (plan.step_in_parts ? ceil_div(args.size.H, kUnits) * kUnits : args.size.H)) {
    const int64_t B = args.size.B, H = args.size.H;
    const int64_t panels = packs_at_once() ? hidden_.count() : plan.threads;
    w_hh_ = arena.take<A>(panels * panel_size());
    d_c_ = arena.take<A>(Cell::kHasCell ? B * pitch_ : 0);
    d_h_ = arena.take<A>(B * h_pitch_);
    // Of two blocks, which alternate, so that nobody waits for the products of the last one; where
    // all wait anyway, of one and the step before it.
    slots_ = recomputes() ? plan.block_steps + 1 : 2 * plan.block_steps;
    d_gates_ = StepRows<Element>::take(arena, slots_, B, D * H + kLanesA * Op::kPerWord);
    rows_ = arena.take<Row>(2 * block_rows_);
    row_counts_ = arena.take<int64_t>(2);
    left_pitch_ = hidden_.format.row_size(depth_);
    for (Element*& left : left_)
      left = arena.take<Element>(plan.step_in_parts ? B * left_pitch_ : 0);
    if (!projects()) return;
    w_hr_ = arena.take<A>(units_.size(args.h_size));
    d_h_rows_ = StepRows<Element>::take(arena, slots_, B, h_pitch_);
    unprojected_ = StepRows<S>::take(arena, slots_, B, H);
  }

  // Whether the products of a step take parts, and those of a block.
  static bool step_in_parts([[maybe_unused]] const Sizes& size) {
    if constexpr (kHasParts<Op>)
      return Parts<Op>::pay_in_steps(size.B, size.T - 1, G * size.H, size.H);
    return false;
  }
  static bool block_in_parts([[maybe_unused]] const Sizes& size) {
    if constexpr (kHasParts<Op>)
      return Parts<Op>::pay_in_gradients(size.T * size.B, G * size.H, size.H + size.I);
    return false;
  }
  static StepShape step_shape(const Sizes& size, bool in_parts) {
    const Columns columns{size.H, {in_parts}};
    return columns.format.step_shape(size.B, columns.count(), G * size.H, Columns::kVectors,
                                     Columns::kVectors * 30.0 * G);
  }

  void run(const Team& team) {
    const auto [T, B, I, H] = args_.size;
    if (!packs_at_once()) w_hh_ += team.index() * panel_size();
    pack(team);
    history_.load(team);
    load_state(team.share(B));
    team.barrier();
    const bool idle = plan_.split == Split::kNone && team.index() > 0;
    const Span rows = idle ? Span{0, 0} : plan_.split == Split::kRows ? team.share(B) : Span{0, B};
    const auto share = [&](int64_t panels) {
      return plan_.split == Split::kUnits ? team.share(panels) : Span{0, panels};
    };
    const Share own{rows, share(hidden_.count()), share(units_.count())};
    for (int64_t n = 0; n < T; n += plan_.block_steps) {
      const Span steps{n, std::min(T, n + plan_.block_steps)};
      // rows_ has two halves, of which the other one takes the next block.
      const int64_t half = n / plan_.block_steps % 2;
      if (team.index() == 0) list_rows(steps, half);
      if (recomputes()) {
        team.barrier();
        recompute_.run(rows_ + half * block_rows_, row_counts_[half], team);
        team.barrier();
      }
      for (int64_t step = steps.begin; step < steps.end; ++step) {
        step_back(step, own, team);
        if (plan_.split == Split::kUnits && step + 1 < steps.end) team.barrier();
      }
      team.barrier();
      products_.run({steps, rows_ + half * block_rows_, row_counts_[half]}, team);
    }
    const Span last = history_.active(T - 1, rows);
    finish(T, last, own);
    if (!args_.reverse) finish(0, {last.end, rows.end}, own);
  }

 private:
  // A thread's part of a step: rows of the batch, panels of h and of the units.
  struct Share {
    Span rows, panels, units;
  };
  bool projects() const { return Cell::kHasCell && args_.w_hr; }
  bool recomputes() const { return Recompute<Cell, S>::wanted(args_); }

  // In the order of the batch, whichever rows sequences have been dealt: so sums do not depend on
  // the number of threads.
  void list_rows(Span steps, int64_t half) {
    Row* next = rows_ + half * block_rows_;
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      for (int64_t place = 0; place < args_.size.B; ++place) {
        const int64_t b = history_.batch.row_at(place);
        if (history_.time(step) < history_.batch.length(b)) *next++ = {int32_t(step), int32_t(b)};
      }
    }
    row_counts_[half] = next - (rows_ + half * block_rows_);
  }

  // the saved blocks of a step and a sequence, [K][H]
  const S* gates(int64_t step, int64_t b) const {
    return recomputes()
               ? recompute_.gates(step, b)
               : history_.template at<S>(args_.gates, step, b, Cell::kSaved * args_.size.H);
  }

  // else each thread packs a panel of W_hh just before its only use
  bool packs_at_once() const { return plan_.hidden == Packing::kOnce; }
  int64_t panel_size() const { return hidden_.panel_size(depth_); }
  A* w_hh_panel(int64_t panel) const {
    return packs_at_once() ? w_hh_ + panel * panel_size() : w_hh_;
  }
  void pack_w_hh(int64_t panel) const {
    const S* w_hh = static_cast<const S*>(args_.w_hh);
    const int64_t units = depth_ / G;
    const auto row = [&](int64_t k) {
      return k % units < args_.size.H ? w_hh + (k / units * args_.size.H + k % units) * args_.h_size
                                      : nullptr;
    };
    hidden_.template pack<S>(row, depth_, panel, w_hh_panel(panel));
  }

  void pack(const Team& team) {
    recompute_.pack(team);
    products_.pack(team);
    const int64_t H = args_.size.H, P = args_.h_size;
    const bool needs_w_hh = args_.size.T > 1 || args_.grad_h0;
    const Span own = team.share(packs_at_once() && needs_w_hh ? hidden_.count() : 0);
    for (int64_t p = own.begin; p < own.end; ++p) pack_w_hh(p);
    const S* w_hr = static_cast<const S*>(args_.w_hr);
    const Span own_units = team.share(projects() ? units_.count() : 0);
    for (int64_t p = own_units.begin; p < own_units.end; ++p)
      units_.template pack<S>([&](int64_t k) { return w_hr + k * H; }, P, p,
                              units_.at(w_hr_, P, p));
  }

  void load_state(Span rows) {
    const int64_t H = args_.size.H, P = args_.h_size;
    const auto at = [&](const void* p, int64_t b, int64_t elements) {
      return p ? static_cast<const S*>(p) + history_.batch.place(b) * elements : nullptr;
    };
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      // what completes the last word of an odd number of elements
      for (int64_t step = 0; G * H % Op::kPerWord && step < slots_; ++step)
        d_gates_(step, b)[D * H] = Element{};
      for (int64_t step = 0; projects() && P % Op::kPerWord && step < slots_; ++step)
        d_h_rows_(step, b)[P] = Element{};
      convert(d_h_ + b * h_pitch_, at(args_.grad_h_n, b, P), P);
      if (Cell::kHasCell) convert(d_c_ + b * pitch_, at(args_.grad_c_n, b, H), H);
    }
  }

  // d loss / d h that reaches the state before `step` through W_hh, for the rows of a tile and one
  // panel
  void through_weights(int64_t step, int64_t panel, int64_t b, int rows, A* out,
                       const Meanwhile& meanwhile = {}) const {
    const int64_t H = args_.size.H;
    const Element* a[kMaxTileRows];
    for (int i = 0; i < rows; ++i)
      a[i] = plan_.step_in_parts ? left_[step & 1] + (b + i) * left_pitch_
                                 : d_gates_(step, b + i) + (D - G) * H;
    hidden_.template multiply<false>(panel, rows, depth_, a, w_hh_panel(panel), out,
                                     Columns::kWidth, meanwhile);
  }

  // d loss / d h after a step, of one row: what comes from y, through W_hh (null where the row had
  // no later step) and past it.
  class GradH {
   public:
    GradH(const Backward& all, int64_t step, int64_t b, const A* from_weights)
        : from_weights_(from_weights) {
      const auto& history = all.history_;
      const BackwardArgs& args = all.args_;
      if (args.grad_y)
        grad_y_ =
            static_cast<const S*>(args.grad_y) +
            history.batch.offset(history.time(step), b, args.grad_y_stride_t, args.grad_y_stride_b);
      if (!from_weights || Cell::kDirect) d_h_ = all.d_h_ + b * all.h_pitch_;
      if (from_weights && history.cut(step - 1, b)) from_weights_ = nullptr;
    }
    // of vector v of the panel at hand, which begins at `unit` and has so many units left
    RNNFAST_HD V operator()(int64_t unit, int v, int64_t left) const {
      V d_h = grad_y_ ? load(grad_y_ + unit, left) : V{};
      if (from_weights_) d_h += load(from_weights_ + v * kLanesA);
      if (d_h_) d_h += load(d_h_ + unit);
      return d_h;
    }

   private:
    const S* grad_y_ = nullptr;
    const A *from_weights_, *d_h_ = nullptr;
  };

  void step_back(int64_t step, const Share& own, const Team& team) {
    const Span rows = own.rows, now = history_.active(step, rows);
    // the rows that were at work in the step before; others begin here, or have just ended
    const Span before = step > 0 ? history_.active(step - 1, rows) : Span{rows.begin, rows.begin};
    const int64_t panel_bytes = panel_size() * int64_t(sizeof(A));
    // The cell's backward on a tile waits for the next tile where that goes to the matrix unit.
    const bool later = hidden_.format.in_matrix_unit();
    alignas(64) A from_weights[2][kMaxTileRows * Columns::kWidth];
    CellRows cell_rows(*this, step);
    int64_t count = 0;
    const auto step_rows = [&](int64_t p, Span part, bool begin, const A* next) {
      for_row_tiles(part.size(), hidden_.tile_rows(p), [&](int64_t r, int n) {
        const int64_t first = part.begin + r;
        const Ahead ahead = Ahead::part_of(next, panel_bytes, r, n, part.size());
        const int buffer = later ? count++ % 2 : 0;
        if (!begin)
          through_weights(step - 1, p, first, n, from_weights[buffer], {ahead, &cell_rows});
        cell_rows.finish();
        cell_rows.take(p, first, n, begin ? nullptr : from_weights[buffer]);
        if (!later) cell_rows.finish();
      });
    };
    const int64_t both = std::min(now.end, before.end);
    // To and fro, as in the forward.
    const Span panels = own.panels;
    const int64_t way = step % 2 ? -1 : 1, first = way > 0 ? panels.begin : panels.end - 1;
    for (int64_t i = 0; i < panels.size(); ++i) {
      const int64_t p = first + way * i;
      const bool last = i + 1 == panels.size();
      step_rows(p, {rows.begin, both}, false, last ? nullptr : w_hh_panel(p + way));
      step_rows(p, {both, now.end}, true, nullptr);
    }
    cell_rows.finish();
    if (projects()) {
      if (plan_.split == Split::kUnits) team.barrier();
      through_projection(step, now, own.units);
    }
    const int64_t over = step > 0 ? both : now.end;
    if (args_.reverse) finish(step, {over, step > 0 ? before.end : rows.end}, own);
  }

  // What follows the product with W_hh on its tile, row by row.
  class CellRows final : public Errand {
   public:
    CellRows(Backward& all, int64_t step) : all_(all), step_(step) {}
    void take(int64_t panel, int64_t first, int count, const A* from_weights) {
      panel_ = panel, next_ = first, from_weights_ = from_weights;
      this->left_ = count;
    }

   private:
    void do_next() override {
      const GradH d_h(all_, step_, next_, from_weights_);
      all_.projects() ? all_.store_d_h(step_, next_, panel_, d_h)
                      : all_.apply_cell(step_, next_, panel_, d_h);
      ++next_;
      if (from_weights_) from_weights_ += Columns::kWidth;
    }

    Backward& all_;
    const int64_t step_;
    int64_t panel_, next_;
    const A* from_weights_;
  };

  void store_d_h(int64_t step, int64_t b, int64_t panel, const GradH& d_h) const {
    for (int v = 0; v < Columns::kVectors; ++v) {
      const int64_t unit = panel * Columns::kWidth + v * kLanesA, left = args_.h_size - unit;
      if (left <= 0) break;
      store(d_h_rows_(step, b) + unit, d_h(unit, v, left), left);
    }
  }

  void through_projection(int64_t step, Span rows, Span panels) {
    const int64_t P = args_.h_size;
    alignas(64) A d_output[kMaxTileRows * Columns::kWidth];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      for_row_tiles(rows.size(), units_.tile_rows(p), [&](int64_t r, int n) {
        const int64_t first = rows.begin + r;
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i) a[i] = d_h_rows_(step, first + i);
        units_.template multiply<false>(p, n, P, a, units_.at(w_hr_, P, p), d_output,
                                        Columns::kWidth);
        for (int i = 0; i < n; ++i)
          apply_cell(step, first + i, p, [&](int64_t, int v, int64_t) {
            return load(d_output + i * Columns::kWidth + v * kLanesA);
          });
      });
    }
  }

  // d_output has the gradient of what the cell puts out: of h, or of what is projected to it
  template <class Gradient>
  void apply_cell(int64_t step, int64_t b, int64_t panel, const Gradient& d_output) {
    const int64_t H = args_.size.H;
    const S* saved_row = gates(step, b);
    const S* h_row = history_.template at<S>(args_.y, step, b, args_.h_size);
    const S* h_before = history_.h_before(step, b);
    const A* c_row = history_.template at<A>(args_.cells, step, b, H);
    const A* c_before = Cell::kHasCell ? history_.c_before(step, b) : nullptr;
    const A* grad_c = history_.template at<A>(args_.grad_cells, step, b, H);
    const bool cut = history_.cut(step, b);
    Element* d_gates_row = d_gates_(step, b);
    constexpr int N = kUnits / kLanesA;
    for (int v = 0; v < Columns::kVectors; v += N) {
      const int64_t first = panel * Columns::kWidth + v * kLanesA;
      if (first >= H) break;
      Wide<V, N> saved[Cell::kSaved + 1], d_gates[D], h{}, h_prev{}, c{}, c_prev{}, d_h{}, d_c{},
          d_h_direct{};
      unrolled<N>([&](auto i) __attribute__((always_inline)) {
        const int64_t unit = first + i * kLanesA, left = H - unit;
        if (i > 0 && left <= 0) return;
        unrolled<Cell::kSaved>([&](auto k) __attribute__((always_inline)) {
          saved[k].v[i] = load(saved_row + k * H + unit, left);
        });
        if (!projects()) {  // the LSTM does without
          h.v[i] = load(h_row + unit, left);
          h_prev.v[i] = load(h_before + unit, left);
        }
        if (Cell::kHasCell) {
          c.v[i] = load(c_row + unit, left);
          c_prev.v[i] = load(c_before + unit, left);
          d_c.v[i] = load(d_c_ + b * pitch_ + unit);
          if (grad_c) d_c.v[i] += load(grad_c + unit, left);
        }
        d_h.v[i] = d_output(unit, v + i, left);
      });
      Cell::template backward<Math>(saved, h, h_prev, c, c_prev, d_h, d_c, d_h_direct, d_gates);
      Wide<V, N> output;
      if constexpr (Cell::kHasCell)
        if (args_.grad_w_hr) output = Cell::template output<Math>(saved, c);
      unrolled<N>([&](auto i) __attribute__((always_inline)) {
        const int64_t unit = first + i * kLanesA, left = H - unit;
        if (i > 0 && left <= 0) return;
        if (Cell::kHasCell && args_.grad_w_hr)
          store(unprojected_(step, b) + unit, output.v[i], left);
        unrolled<D>([&](auto k) __attribute__((always_inline)) {
          store(d_gates_row + k * H + unit, d_gates[k].v[i], left);
        });
        if (Cell::kHasCell) store(d_c_ + b * pitch_ + unit, cut ? V{} : d_c.v[i]);
        if (Cell::kDirect) store(d_h_ + b * h_pitch_ + unit, cut ? V{} : d_h_direct.v[i]);
      });
      if constexpr (kHasParts<Op>) {
        if (!plan_.step_in_parts) continue;
        unrolled<G>([&](auto g) __attribute__((always_inline)) {
          const auto& pair = d_gates[D - G + g].v;
          Parts<Op>::store_words(
              Parts<Op>::split_first(pair[0], pair[1], H - first),
              left_[step & 1] + b * left_pitch_ + Parts<Op>::row_offset(g * (depth_ / G) + first),
              kLanesA);
        });
      }
    }
  }

  // Stores the gradients of the initial states of rows that had their last step just before
  // `step`; those that had none, where it is 0.
  void finish(int64_t step, Span rows, const Share& own) const {
    if (rows.size() <= 0) return;
    const int64_t H = args_.size.H, P = args_.h_size;
    alignas(64) A d_h[kMaxTileRows * Columns::kWidth];
    for (int64_t p = own.panels.begin; args_.grad_h0 && p < own.panels.end; ++p) {
      if (step > 0 && !packs_at_once()) pack_w_hh(p);
      for_row_tiles(rows.size(), hidden_.tile_rows(p), [&](int64_t r, int n) {
        const int64_t first = rows.begin + r;
        if (step > 0) through_weights(step - 1, p, first, n, d_h);
        for (int i = 0; i < n; ++i) {
          const int64_t b = first + i;
          const bool weights = step > 0 && !history_.cut(step - 1, b);
          S* to = static_cast<S*>(args_.grad_h0) + history_.batch.place(b) * P;
          for (int64_t at = 0, unit = p * Columns::kWidth; at < Columns::kWidth && unit < P;
               at += kLanesA, unit += kLanesA) {
            V value = weights ? load(d_h + i * Columns::kWidth + at) : V{};
            if (step == 0 || Cell::kDirect) value += load(d_h_ + b * h_pitch_ + unit);
            store(to + unit, value, P - unit);
          }
        }
      });
    }
    const int64_t first = own.units.begin * Columns::kWidth;
    const int64_t count = std::min(H, own.units.end * Columns::kWidth) - first;
    for (int64_t b = rows.begin; args_.grad_c0 && count > 0 && b < rows.end; ++b)
      convert(static_cast<S*>(args_.grad_c0) + history_.batch.place(b) * H + first,
              d_c_ + b * pitch_ + first, count);
  }

  const BackwardArgs& args_;
  const Plan& plan_;
  History<Cell, S> history_;
  Recompute<Cell, S> recompute_;
  BlockProducts<Cell, S> products_;
  const Columns hidden_, units_;
  const int64_t block_rows_, pitch_, h_pitch_;
  const int64_t depth_;  // of the sums with W_hh: the units of each gate, in parts whole kUnits
  Element* left_[2];  // [B][left_pitch], gate gradients of even and odd steps in parts
  int64_t left_pitch_, slots_;
  A* w_hh_;  // packed columns [panel][G*H][width], or this thread's one panel
  A* d_c_;  // [B][pitch]
  A* d_h_;  // [B][h_pitch]: grad_h_n, then what bypasses W_hh
  StepRows<Element> d_gates_;  // rows a vector longer than they need be, see BlockProducts
  Row* rows_;  // two blocks [row of a block]
  int64_t* row_counts_;
  // only where h is projected
  A* w_hr_ = nullptr;  // packed columns [panel][P][width]
  StepRows<Element> d_h_rows_;
  StepRows<S> unprojected_;  // what the cells put out
};
