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
  using Op = Operand<S>;
  using Element = typename Op::Element;
  using Columns = ColumnPanels<Op>;

 public:
  Backward(const BackwardArgs& args, const Plan& plan, Arena& arena)
      : args_(args),
        plan_(plan),
        history_(args, arena),
        recompute_(args, plan, history_, arena),
        hidden_{args.h_size},
        input_{args.size.I},
        units_{args.size.H},
        block_rows_(plan.block_steps * args.size.B),
        pitch_(ceil_div(args.size.H, kLanesA) * kLanesA),
        h_pitch_((ceil_div(args.h_size, kLanesA) + 1) * kLanesA * Op::kPerWord),
        gate_pitch_(D * args.size.H + kLanesA * Op::kPerWord),
        left_pitch_((ceil_div(block_rows_, kLanesA * Op::kPerWord) + 1) * kLanesA * Op::kPerWord) {
    const auto [T, B, I, H] = args.size;
    w_hh_ = arena.take<A>(hidden_.size(G * H));
    w_ih_ = arena.take<A>(input_.size(G * H));
    d_c_ = arena.take<A>(Cell::kHasCell ? B * pitch_ : 0);
    d_h_ = arena.take<A>(B * h_pitch_);
    d_gates_ = arena.take<Element>(2 * block_rows_ * gate_pitch_);
    left_ = arena.take<Element>(D * H * left_pitch_);
    x_ = arena.take<A>(input_.size(block_rows_));
    h_ = arena.take<A>(hidden_.size(block_rows_));
    rows_ = arena.take<Row>(2 * block_rows_);
    row_counts_ = arena.take<int64_t>(2);
    if (!projects()) return;
    w_hr_ = arena.take<A>(units_.size(args.h_size));
    d_h_rows_ = arena.take<Element>(2 * block_rows_ * h_pitch_);
    unprojected_ = arena.take<S>(2 * block_rows_ * H);
    projection_left_ = arena.take<Element>(args.h_size * left_pitch_);
    packed_unprojected_ = arena.take<A>(units_.size(block_rows_));
  }

  static StepShape step_shape(const Sizes& size) {
    return {size.B,
            Columns{size.H}.count(),
            words<Op>(Cell::kGates * size.H),
            Columns::kVectors,
            Columns::kRows,
            int(sizeof(A)),
            kLanesA,
            Columns::kVectors * 30.0 * Cell::kGates};
  }

  void run(const Team& team) {
    const auto [T, B, I, H] = args_.size;
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
      // d_gates_ and rows_ have two halves: the other one takes the next block, so nobody waits for
      // the products of this one. left_, x_ and h_ are written after the next barrier only.
      const int64_t half = n / plan_.block_steps % 2;
      if (team.index() == 0) list_rows(steps, half);
      if (recomputes()) {
        team.barrier();
        recompute_.run(rows_ + half * block_rows_, team.share(row_counts_[half]));
        team.barrier();
      }
      for (int64_t step = steps.begin; step < steps.end; ++step) {
        step_back(step, own, team);
        if (plan_.split == Split::kUnits && step + 1 < steps.end) team.barrier();
      }
      team.barrier();
      const Block block{rows_ + half * block_rows_, row_counts_[half], n == 0};
      grad_input(steps, block, team);
      grad_parameters(block, team);
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
  // What a block of steps adds to the products over rows.
  struct Block {
    const Row* rows;
    int64_t count;
    bool is_first;
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

  Element* gate_row(int64_t step, int64_t b) const {
    const int64_t slot = step % (2 * plan_.block_steps);
    return d_gates_ + (slot * args_.size.B + b) * gate_pitch_;
  }
  // where h is projected: its gradient, and what the cell put out
  Element* d_h_row(int64_t step, int64_t b) const {
    return d_h_rows_ + (step % (2 * plan_.block_steps) * args_.size.B + b) * h_pitch_;
  }
  S* unprojected_row(int64_t step, int64_t b) const {
    return unprojected_ + (step % (2 * plan_.block_steps) * args_.size.B + b) * args_.size.H;
  }
  // the saved blocks of a step and a sequence, [K][H]
  const S* gates(int64_t step, int64_t b) const {
    return recomputes()
               ? recompute_.gates(step, b)
               : history_.template at<S>(args_.gates, step, b, Cell::kSaved * args_.size.H);
  }

  void pack(const Team& team) {
    recompute_.pack(team);
    const auto [T, B, I, H] = args_.size;
    const int64_t hidden = H, h_size = args_.h_size;
    const S* w_hh = static_cast<const S*>(args_.w_hh);
    const bool needs_w_hh = T > 1 || args_.grad_h0;
    const Span own = team.share(needs_w_hh ? hidden_.count() : 0);
    for (int64_t p = own.begin; p < own.end; ++p)
      hidden_.template pack<S>([&](int64_t k) { return w_hh + k * h_size; }, G * H, p,
                               hidden_.at(w_hh_, G * H, p));
    const S* w_hr = static_cast<const S*>(args_.w_hr);
    const Span own_units = team.share(projects() ? units_.count() : 0);
    for (int64_t p = own_units.begin; p < own_units.end; ++p)
      units_.template pack<S>([&](int64_t k) { return w_hr + k * hidden; }, h_size, p,
                              units_.at(w_hr_, h_size, p));
    if (!args_.grad_x) return;
    const int64_t inputs = I;
    const S* w_ih = static_cast<const S*>(args_.w_ih);
    const Span own_input = team.share(input_.count());
    for (int64_t p = own_input.begin; p < own_input.end; ++p)
      input_.template pack<S>(
          [&](int64_t k) {
            return w_ih + (Cell::input_gate(int(k / hidden)) * hidden + k % hidden) * inputs;
          },
          G * H, p, input_.at(w_ih_, G * H, p));
  }

  void load_state(Span rows) {
    const int64_t H = args_.size.H, P = args_.h_size;
    const auto at = [&](const void* p, int64_t b, int64_t elements) {
      return p ? static_cast<const S*>(p) + history_.batch.place(b) * elements : nullptr;
    };
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      // what completes the last word of an odd number of elements
      for (int64_t step = 0; G * H % Op::kPerWord && step < 2 * plan_.block_steps; ++step)
        gate_row(step, b)[D * H] = Element{};
      for (int64_t step = 0; projects() && P % Op::kPerWord && step < 2 * plan_.block_steps; ++step)
        d_h_row(step, b)[P] = Element{};
      convert(d_h_ + b * h_pitch_, at(args_.grad_h_n, b, P), P);
      if (Cell::kHasCell) convert(d_c_ + b * pitch_, at(args_.grad_c_n, b, H), H);
    }
  }

  // d loss / d h that reaches the state before `step` through W_hh, for the rows of a tile and one
  // panel
  void through_weights(int64_t step, int64_t panel, int64_t b, int rows, A* out) const {
    const int64_t H = args_.size.H;
    const Element* a[kMaxTileRows];
    for (int i = 0; i < rows; ++i) a[i] = gate_row(step, b + i) + (D - G) * H;
    any_tile<Op, false>(hidden_.vectors(panel), rows, words<Op>(G * H), a,
                        hidden_.at(w_hh_, G * H, panel), out, Columns::kWidth);
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
    alignas(64) A from_weights[kMaxTileRows * Columns::kWidth];
    const auto step_rows = [&](int64_t p, Span part, bool begin) {
      for_row_tiles(part.size(), Columns::kRows, [&](int64_t r, int n) {
        const int64_t first = part.begin + r;
        if (!begin) through_weights(step - 1, p, first, n, from_weights);
        for (int i = 0; i < n; ++i) {
          const int64_t b = first + i;
          const GradH d_h(*this, step, b, begin ? nullptr : from_weights + i * Columns::kWidth);
          projects() ? store_d_h(step, b, p, d_h) : apply_cell(step, b, p, d_h);
        }
      });
    };
    const int64_t both = std::min(now.end, before.end);
    for (int64_t p = own.panels.begin; p < own.panels.end; ++p) {
      step_rows(p, {rows.begin, both}, false);
      step_rows(p, {both, now.end}, true);
    }
    if (projects()) {
      if (plan_.split == Split::kUnits) team.barrier();
      through_projection(step, now, own.units);
    }
    const int64_t over = step > 0 ? both : now.end;
    if (args_.reverse) finish(step, {over, step > 0 ? before.end : rows.end}, own);
  }

  void store_d_h(int64_t step, int64_t b, int64_t panel, const GradH& d_h) const {
    for (int v = 0; v < Columns::kVectors; ++v) {
      const int64_t unit = panel * Columns::kWidth + v * kLanesA, left = args_.h_size - unit;
      if (left <= 0) break;
      store(d_h_row(step, b) + unit, d_h(unit, v, left), left);
    }
  }

  void through_projection(int64_t step, Span rows, Span panels) {
    const int64_t P = args_.h_size;
    alignas(64) A d_output[kMaxTileRows * Columns::kWidth];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      for_row_tiles(rows.size(), Columns::kRows, [&](int64_t r, int n) {
        const int64_t first = rows.begin + r;
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i) a[i] = d_h_row(step, first + i);
        any_tile<Op, false>(units_.vectors(p), n, words<Op>(P), a, units_.at(w_hr_, P, p), d_output,
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
    Element* d_gates_row = gate_row(step, b);
    for (int v = 0; v < Columns::kVectors; ++v) {
      const int64_t unit = panel * Columns::kWidth + v * kLanesA;
      const int64_t left = H - unit;
      if (left <= 0) break;
      V saved[Cell::kSaved + 1], d_gates[D];
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load(saved_row + k * H + unit, left);
      const V h = projects() ? V{} : load(h_row + unit, left);  // the LSTM does without
      const V h_prev = projects() ? V{} : load(h_before + unit, left);
      V c{}, c_prev{}, d_c{};
      if (Cell::kHasCell) {
        c = load(c_row + unit, left);
        c_prev = load(c_before + unit, left);
        d_c = load(d_c_ + b * pitch_ + unit);
        if (grad_c) d_c += load(grad_c + unit, left);
      }
      V d_h_direct{};
      Cell::template backward<Math>(saved, h, h_prev, c, c_prev, d_output(unit, v, left), d_c,
                                    d_h_direct, d_gates);
      if constexpr (Cell::kHasCell)
        if (args_.grad_w_hr)
          store(unprojected_row(step, b) + unit, Cell::template output<Math>(saved, c), left);
      for (int k = 0; k < D; ++k) store(d_gates_row + k * H + unit, d_gates[k], left);
      if (Cell::kHasCell) store(d_c_ + b * pitch_ + unit, cut ? V{} : d_c);
      if (Cell::kDirect) store(d_h_ + b * h_pitch_ + unit, cut ? V{} : d_h_direct);
    }
  }

  // Stores the gradients of the initial states of rows that had their last step just before
  // `step`; those that had none, where it is 0.
  void finish(int64_t step, Span rows, const Share& own) const {
    if (rows.size() <= 0) return;
    const int64_t H = args_.size.H, P = args_.h_size;
    alignas(64) A d_h[kMaxTileRows * Columns::kWidth];
    for (int64_t p = own.panels.begin; args_.grad_h0 && p < own.panels.end; ++p) {
      for_row_tiles(rows.size(), Columns::kRows, [&](int64_t r, int n) {
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

  // grad_x[t] = d_gates[t] W_ih, rows of the block dealt to threads
  void grad_input(Span steps, const Block& block, const Team& team) const {
    if (!args_.grad_x) return;
    const auto [T, B, I, H] = args_.size;
    const int64_t depth = G * H, inputs = I;
    const auto target = [&](int64_t step, int64_t b) {
      return static_cast<S*>(args_.grad_x) + history_.batch.row(history_.time(step), b) * inputs;
    };
    const Span own = team.share(block.count);
    alignas(64) A out[kMaxTileRows * Columns::kWidth];
    for (int64_t p = 0; p < input_.count(); ++p) {
      const int64_t column = p * Columns::kWidth;
      for_row_tiles(own.size(), Columns::kRows, [&](int64_t r, int n) {
        const Row* rows = block.rows + own.begin + r;
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i) a[i] = gate_row(rows[i].step, rows[i].b);
        any_tile<Op, false, kLongChain>(input_.vectors(p), n, words<Op>(depth), a,
                                        input_.at(w_ih_, depth, p), out, Columns::kWidth);
        for (int i = 0; i < n; ++i) {
          S* to = target(rows[i].step, rows[i].b);
          for (int v = 0; v < input_.vectors(p); ++v) {
            const int64_t at = column + v * kLanesA;
            store(to + at, load(out + i * Columns::kWidth + v * kLanesA), inputs - at);
          }
        }
      });
    }
    if (!history_.batch.is_ragged() || history_.batch.is_packed()) return;
    const Span cleared = team.share(B);
    for (int64_t step = steps.begin; step < steps.end; ++step)
      for (int64_t b = cleared.begin; b < cleared.end; ++b)
        if (history_.time(step) >= history_.batch.length(b))
          __builtin_memset(target(step, b), 0, size_t(inputs) * sizeof(S));
  }

  // Of weights and biases. d_gates is transposed, and x and h are packed, once for all threads.
  void grad_parameters(const Block& block, const Team& team) const {
    const bool any_weight = args_.grad_w_ih || args_.grad_w_hh || args_.grad_w_hr;
    if (!any_weight && !args_.grad_b_ih && !args_.grad_b_hh) return;
    const int64_t H = args_.size.H, P = args_.h_size;
    const Span own = share_vectors(team, D * H);
    const auto gate_rows = [&](Row row) { return gate_row(row.step, row.b); };
    transpose_rows(block, own, gate_rows, left_);
    grad_bias(block, own);
    if (!any_weight) return;
    const auto x = [&](Row row) { return history_.x(row.step, row.b); };
    const auto h = [&](Row row) { return history_.h_before(row.step, row.b); };
    if (args_.grad_w_ih) pack_rows_of(block, team, input_, x, x_);
    if (args_.grad_w_hh) pack_rows_of(block, team, hidden_, h, h_);
    if (args_.grad_w_hr) {
      const auto d_h = [&](Row row) { return d_h_row(row.step, row.b); };
      const auto unprojected = [&](Row row) { return unprojected_row(row.step, row.b); };
      transpose_rows(block, share_vectors(team, P), d_h, projection_left_);
      pack_rows_of(block, team, units_, unprojected, packed_unprojected_);
    }
    team.barrier();
    if (args_.grad_w_ih)
      accumulate(block, team, left_, G, H, input_, x_, args_.grad_w_ih, Cell::input_gate);
    if (args_.grad_w_hh)
      accumulate(block, team, left_ + (D - G) * H * left_pitch_, G, H, hidden_, h_, args_.grad_w_hh,
                 same_place);
    if (args_.grad_w_hr)
      accumulate(block, team, projection_left_, 1, P, units_, packed_unprojected_, args_.grad_w_hr,
                 same_place);
  }
  static constexpr int same_place(int j) { return j; }
  // a thread's part of so many elements, in whole vectors
  static Span share_vectors(const Team& team, int64_t elements) {
    const Span vectors = team.share(ceil_div(elements, kLanesA));
    return {vectors.begin * kLanesA, std::min(vectors.end * kLanesA, elements)};
  }

  template <class Source>
  void pack_rows_of(const Block& block, const Team& team, const Columns& columns, Source&& source,
                    A* to) const {
    const Span own = team.share(columns.count());
    for (int64_t p = own.begin; p < own.end; ++p)
      columns.template pack<S>([&](int64_t k) { return source(block.rows[k]); }, block.count, p,
                               columns.at(to, block.count, p));
  }

  // grad[place(j) * height + i][n] (+)= sum over the rows of the block left[j * height + i]
  // right[n], j < count. Bands of rows times panels of columns are dealt to threads: a band for
  // each thread, unless that would make them too narrow for the tiles.
  template <class Place>
  void accumulate(const Block& block, const Team& team, const Element* left, int count,
                  int64_t height, const Columns& columns, A* packed, void* grad,
                  Place place) const {
    const int64_t rows = count * height, depth = block.count;
    const int64_t bands = std::clamp<int64_t>(rows / (4 * Columns::kRows), 1, team.size());
    const Span own = team.share(bands * columns.count());
    for (int64_t i = own.begin; i < own.end; ++i) {
      const int64_t band = i / columns.count(), p = i % columns.count();
      const int64_t begin = rows * band / bands, end = rows * (band + 1) / bands;
      for (int64_t j = begin / height; j * height < end; ++j) {
        const Span part{std::max(begin, j * height), std::min(end, (j + 1) * height)};
        A* to = static_cast<A*>(grad) +
                (place(int(j)) * height + part.begin - j * height) * columns.N +
                p * Columns::kWidth;
        outer_product(left + part.begin * left_pitch_, part.size(), depth,
                      columns.at(packed, depth, p), columns, p, !block.is_first, to);
      }
    }
  }

  // left[m][k] = element m of row k of the block, with zeros up to a whole vector of words
  template <class Source>
  void transpose_rows(const Block& block, Span own, Source&& source, Element* left) const {
    const int64_t depth = block.count;
    for (int64_t k = 0; k < depth; k += kLanesA * Op::kPerWord) {
      const Element* from[kLanesA][Op::kPerWord];
      for (int64_t i = 0; i < kLanesA * Op::kPerWord; ++i)
        from[i / Op::kPerWord][i % Op::kPerWord] =
            k + i < depth ? source(block.rows[k + i]) + own.begin : nullptr;
      for (int64_t m = own.begin; m < own.end; m += kLanesA) {
        V square[kLanesA];
        for (int i = 0; i < kLanesA; ++i) {
          square[i] = Op::load_columns(from[i], own.end - m);
          for (const Element*& row : from[i]) row = row ? row + kLanesA : nullptr;
        }
        transpose<A>(square);
        const int64_t n = std::min<int64_t>(kLanesA, own.end - m);
        for (int64_t i = 0; i < n; ++i)
          __builtin_memcpy(left + (m + i) * left_pitch_ + k, &square[i], sizeof(V));
      }
    }
  }

  // to[m][panel columns] (+)= sum_k left[m][k] panel[k]
  void outer_product(const Element* left, int64_t rows, int64_t depth, const A* panel,
                     const Columns& columns, int64_t p, bool add, A* to) const {
    const int vectors = columns.vectors(p);
    const int64_t width = columns.N - p * Columns::kWidth;
    const bool whole = vectors * kLanesA <= width;
    alignas(64) A edge[kMaxTileRows * Columns::kWidth];
    for_row_tiles(rows, Columns::kRows, [&](int64_t m, int n) {
      const Element* a[kMaxTileRows];
      for (int i = 0; i < n; ++i) a[i] = left + (m + i) * left_pitch_;
      A* target = to + m * columns.N;
      if (whole) {
        const auto product = add ? any_tile<Op, true, kLongChain> : any_tile<Op, false, kLongChain>;
        return product(vectors, n, words<Op>(depth), a, panel, target, columns.N);
      }
      any_tile<Op, false, kLongChain>(vectors, n, words<Op>(depth), a, panel, edge,
                                      Columns::kWidth);
      for (int i = 0; i < n; ++i) {
        for (int v = 0; v < vectors; ++v) {
          A* cell = target + i * columns.N + v * kLanesA;
          V value = load(edge + i * Columns::kWidth + v * kLanesA);
          if (add) value += load(cell, width - v * kLanesA);
          store(cell, value, width - v * kLanesA);
        }
      }
    });
  }

  void grad_bias(const Block& block, Span own) const {
    if (!args_.grad_b_ih && !args_.grad_b_hh) return;
    constexpr int64_t kPart =
        16;  // so that rounding errors do not grow with the length of the block
    const int64_t H = args_.size.H, depth = block.count;
    for (int64_t m = own.begin; m < own.end; m += kLanesA) {
      const int n = int(std::min<int64_t>(kLanesA, own.end - m));
      V rows[kLanesA] = {};
      for (int i = 0; i < n; ++i)
        for (int64_t k = 0; k < depth; k += kPart * kLanesA)
          rows[i] += partial_sum<kPart>(left_ + (m + i) * left_pitch_ + k, depth - k);
      const V sums = lane_sums<A>(rows);
      for (int i = 0; i < n; ++i) {
        const int64_t j = (m + i) / H, unit = (m + i) % H;
        if (args_.grad_b_ih && j < G)
          add(static_cast<A*>(args_.grad_b_ih) + Cell::input_gate(int(j)) * H + unit, sums[i],
              !block.is_first);
        if (args_.grad_b_hh && j >= D - G)
          add(static_cast<A*>(args_.grad_b_hh) + (j - (D - G)) * H + unit, sums[i],
              !block.is_first);
      }
    }
  }
  template <int64_t kVectors>
  static V partial_sum(const Element* from, int64_t count) {
    V sum{};
    const int64_t end = std::min(count, kVectors * kLanesA);
    for (int64_t k = 0; k < end; k += kLanesA) sum += load(from + k);
    return sum;
  }
  static void add(A* to, A value, bool keep) { *to = keep ? *to + value : value; }

  const BackwardArgs& args_;
  const Plan& plan_;
  History<Cell, S> history_;
  Recompute<Cell, S> recompute_;
  const Columns hidden_, input_, units_;
  const int64_t block_rows_;
  // Rows of d_gates and of its transpose are a vector longer than they need be: at multiples of 4
  // KiB they would compete for the same lines of L1.
  const int64_t pitch_, h_pitch_, gate_pitch_, left_pitch_;
  A *w_hh_, *w_ih_;  // packed columns [panel][G*H][width], the rows of w_ih in the order of d_gates
  A* d_c_;  // [B][pitch]
  A* d_h_;  // [B][h_pitch]: grad_h_n, then what bypasses W_hh
  Element* d_gates_;  // two blocks of steps [step][B][gate_pitch]
  Element* left_;  // transposed gate gradients [D*H][left_pitch]
  A *x_, *h_;  // packed columns of the rows of a block
  Row* rows_;  // two blocks [row of a block]
  int64_t* row_counts_;
  // only where h is projected
  A* w_hr_ = nullptr;  // packed columns [panel][P][width]
  Element* d_h_rows_ = nullptr;  // two blocks of steps [step][B][h_pitch]
  S* unprojected_ = nullptr;  // two blocks of steps [step][B][H]
  Element* projection_left_ = nullptr;  // transposed gradient of h [P][left_pitch]
  A* packed_unprojected_ = nullptr;  // columns of the rows of a block
};
