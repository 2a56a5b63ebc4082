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
  using Panels = GatePanels<Op, G>;

 public:
  Backward(const BackwardArgs& args, const Plan& plan, Arena& arena)
      : args_(args),
        plan_(plan),
        hidden_{args.size.H},
        input_{args.size.I},
        gate_panels_{args.size.H},
        pitch_(ceil_div(args.size.H, kLanesA) * kLanesA),
        gate_pitch_(D * args.size.H + kLanesA * Op::kPerWord),
        left_pitch_((ceil_div(plan.block_steps * args.size.B, kLanesA * Op::kPerWord) + 1) *
                    kLanesA * Op::kPerWord) {
    const auto [T, B, I, H] = args.size;
    const int64_t block_rows = plan.block_steps * B;
    w_hh_ = arena.take<A>(hidden_.size(G * H));
    w_ih_ = arena.take<A>(input_.size(G * H));
    d_c_ = arena.take<A>(Cell::kHasCell ? B * pitch_ : 0);
    c0_ = arena.take<A>(Cell::kHasCell ? B * pitch_ : 0);
    d_h_ = arena.take<A>(B * pitch_);
    d_gates_ = arena.take<Element>(2 * block_rows * gate_pitch_);
    left_ = arena.take<Element>(D * H * left_pitch_);
    x_ = arena.take<A>(input_.size(block_rows));
    h_ = arena.take<A>(hidden_.size(block_rows));
    if (!recomputes(args)) return;
    gates_ = arena.take<S>(block_rows * Cell::kSaved * H);
    if (pays_to_pack(args.size)) {  // as in the forward, which would sum in another order else
      gate_w_ih_ = arena.take<A>(gate_panels_.count() * Panels::kWidth * words<Op>(I));
      gate_w_hh_ = arena.take<A>(gate_panels_.count() * Panels::kWidth * words<Op>(H));
    }
    gate_b_ih_ = arena.take<A>(gate_panels_.count() * Panels::kWidth);
    gate_b_hh_ = arena.take<A>(gate_panels_.count() * Panels::kWidth);
    if (needs_copy(I)) x_rows_ = arena.take<Element>(block_rows * whole_words(I));
    if (needs_copy(H)) h_rows_ = arena.take<Element>(block_rows * whole_words(H));
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
    load_state(team.share(B));
    team.barrier();
    const bool idle = plan_.split == Split::kNone && team.index() > 0;
    const Span rows = idle ? Span{0, 0} : plan_.split == Split::kRows ? team.share(B) : Span{0, B};
    const Span panels =
        plan_.split == Split::kUnits ? team.share(hidden_.count()) : Span{0, hidden_.count()};
    for (int64_t n = 0; n < T; n += plan_.block_steps) {
      const Span block{n, std::min(T, n + plan_.block_steps)};
      if (recomputes(args_)) {
        recompute_gates(block, team.share(block.size() * B));
        team.barrier();
      }
      for (int64_t step = block.begin; step < block.end; ++step) {
        step_back(step, rows, panels);
        if (plan_.split == Split::kUnits && step + 1 < block.end) team.barrier();
      }
      team.barrier();
      // The other half of d_gates_ takes the next block, so nobody waits for these; left_, x_ and
      // h_ are written again after the next block's barrier only.
      grad_input(block, team);
      grad_parameters(block, team);
    }
    if (args_.grad_h0 || args_.grad_c0) store_state(rows, panels);
  }

 private:
  // Steps are counted in the order of the backward: step 0 is the last of the forward.
  int64_t time(int64_t step) const { return args_.reverse ? step : args_.size.T - 1 - step; }
  int64_t time_before(int64_t step) const { return time(step + 1); }
  bool is_first_in_time(int64_t step) const { return step == args_.size.T - 1; }

  Element* gate_row(int64_t step, int64_t b) const {
    const int64_t slot = step % (2 * plan_.block_steps);
    return d_gates_ + (slot * args_.size.B + b) * gate_pitch_;
  }
  const S* h_before(int64_t step, int64_t b) const {
    const auto [T, B, I, H] = args_.size;
    return is_first_in_time(step)
               ? static_cast<const S*>(args_.h0) + b * H
               : static_cast<const S*>(args_.y) + (time_before(step) * B + b) * H;
  }
  const A* c_before(int64_t step, int64_t b) const {
    const auto [T, B, I, H] = args_.size;
    return is_first_in_time(step)
               ? c0_ + b * pitch_
               : static_cast<const A*>(args_.cells) + (time_before(step) * B + b) * H;
  }
  const S* x_row(int64_t step, int64_t b) const {
    return static_cast<const S*>(args_.x) + time(step) * args_.x_stride_t + b * args_.x_stride_b;
  }

  // ---- gates that the forward did not save: no step of this waits for another, as y and cells
  // hold all states ----

  static bool recomputes(const BackwardArgs& args) { return Cell::kSaved > 0 && !args.gates; }
  static int64_t whole_words(int64_t elements) { return words<Op>(elements) * Op::kPerWord; }
  // whether rows of so many elements cannot be multiplied as they lie
  static bool needs_copy(int64_t elements) {
    return !std::is_same_v<S, Element> || whole_words(elements) != elements;
  }

  void pack_gate_panels(Span panels) {
    const auto [T, B, I, H] = args_.size;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t at = p * Panels::kWidth;
      if (gate_w_ih_) {
        gate_panels_.pack(static_cast<const S*>(args_.w_ih), I, p, gate_w_ih_ + at * words<Op>(I));
        gate_panels_.pack(static_cast<const S*>(args_.w_hh), H, p, gate_w_hh_ + at * words<Op>(H));
      }
      gate_panels_.pack_bias(static_cast<const S*>(args_.b_ih), p, gate_b_ih_ + at);
      gate_panels_.pack_bias(static_cast<const S*>(args_.b_hh), p, gate_b_hh_ + at);
    }
  }

  // A row as the left side of a product, copied to its place in `copies` where it must be.
  const Element* left_row(const S* row, int64_t elements, Element* copies, int64_t place) const {
    if (copies) return copies + place * whole_words(elements);
    if constexpr (std::is_same_v<S, Element>) return row;
    return nullptr;
  }
  static void copy_row(const S* row, int64_t elements, Element* to) {
    convert(to, row, elements);
    for (int64_t i = elements; i < whole_words(elements); ++i) to[i] = Element{};
  }

  // gates_[row of the block] as the forward computed them; rows are counted (step, b)
  void recompute_gates(Span block, Span rows) const {
    const auto [T, B, I, H] = args_.size;
    const int64_t batch = B, inputs = I, hidden = H;
    const auto x = [&](int64_t row) { return x_row(block.begin + row / batch, row % batch); };
    const auto h = [&](int64_t row) { return h_before(block.begin + row / batch, row % batch); };
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (x_rows_) copy_row(x(row), inputs, x_rows_ + row * whole_words(inputs));
      if (h_rows_) copy_row(h(row), hidden, h_rows_ + row * whole_words(hidden));
    }
    alignas(64) A from_x[kMaxTileRows * Panels::kWidth], from_h[kMaxTileRows * Panels::kWidth];
    for (int64_t p = 0; p < gate_panels_.count(); ++p) {
      const int64_t at = p * Panels::kWidth;
      const A* w_ih = gate_w_ih_ ? gate_w_ih_ + at * words<Op>(inputs) : nullptr;
      const A* w_hh = gate_w_hh_ ? gate_w_hh_ + at * words<Op>(hidden) : nullptr;
      for_row_tiles(rows.size(), Panels::kRows, [&](int64_t r, int n) {
        const int64_t first = rows.begin + r;
        const Element *a[kMaxTileRows], *b[kMaxTileRows];
        for (int i = 0; i < n; ++i) {
          a[i] = left_row(x(first + i), inputs, x_rows_, first + i);
          b[i] = left_row(h(first + i), hidden, h_rows_, first + i);
        }
        gate_panels_.multiply(static_cast<const S*>(args_.w_ih), w_ih, gate_b_ih_ + at, inputs, p,
                              a, n, from_x, Panels::kWidth);
        gate_panels_.multiply(static_cast<const S*>(args_.w_hh), w_hh, gate_b_hh_ + at, hidden, p,
                              b, n, from_h, Panels::kWidth);
        for (int i = 0; i < n; ++i)
          recompute_cell(block.begin + (first + i) / batch, (first + i) % batch, p,
                         from_x + i * Panels::kWidth, from_h + i * Panels::kWidth,
                         gates_ + (first + i) * Cell::kSaved * hidden);
      });
    }
  }

  void recompute_cell(int64_t step, int64_t b, int64_t panel, const A* from_x, const A* from_h,
                      S* to) const {
    const int64_t H = args_.size.H;
    for (int v = 0; v < Panels::kUnitVectors; ++v) {
      const int64_t unit = panel * Panels::kUnits + v * kLanesA, left = H - unit;
      if (left <= 0) break;
      V px[G], ph[G], saved[Cell::kSaved + 1], h, c{};
      for (int g = 0; g < G; ++g) {
        px[g] = load(from_x + (g * Panels::kUnitVectors + v) * kLanesA);
        ph[g] = load(from_h + (g * Panels::kUnitVectors + v) * kLanesA);
      }
      if (Cell::kHasCell) c = load(c_before(step, b) + unit, left);
      Cell::template forward<Math>(px, ph, load(h_before(step, b) + unit, left), c, h, saved);
      for (int k = 0; k < Cell::kSaved; ++k) store(to + k * H + unit, saved[k], left);
    }
  }

  // the saved blocks of a step and a sequence, [K][H]
  const S* gates_of(int64_t step, int64_t b) const {
    const auto [T, B, I, H] = args_.size;
    const int64_t row = recomputes(args_) ? step % plan_.block_steps * B + b : time(step) * B + b;
    return (recomputes(args_) ? gates_ : static_cast<const S*>(args_.gates)) +
           row * Cell::kSaved * H;
  }

  void pack(const Team& team) {
    if (recomputes(args_)) pack_gate_panels(team.share(gate_panels_.count()));
    const auto [T, B, I, H] = args_.size;
    const int64_t hidden = H;
    const S* w_hh = static_cast<const S*>(args_.w_hh);
    const bool needs_w_hh = T > 1 || args_.grad_h0;
    const Span own = team.share(needs_w_hh ? hidden_.count() : 0);
    for (int64_t p = own.begin; p < own.end; ++p)
      hidden_.template pack<S>([&](int64_t k) { return w_hh + k * hidden; }, G * H, p,
                               hidden_.at(w_hh_, G * H, p));
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
    const int64_t H = args_.size.H;
    const auto at = [&](const void* p, int64_t b) {
      return p ? static_cast<const S*>(p) + b * H : nullptr;
    };
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      // what completes the last word of an odd number of elements
      for (int64_t step = 0; G * H % Op::kPerWord && step < 2 * plan_.block_steps; ++step)
        gate_row(step, b)[D * H] = Element{};
      convert(d_h_ + b * pitch_, at(args_.grad_h_n, b), H);
      if (!Cell::kHasCell) continue;
      convert(d_c_ + b * pitch_, at(args_.grad_c_n, b), H);
      convert(c0_ + b * pitch_, at(args_.c0, b), H);
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

  void step_back(int64_t step, Span rows, Span panels) {
    alignas(64) A d_h[kMaxTileRows * Columns::kWidth];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      for_row_tiles(rows.size(), Columns::kRows, [&](int64_t r, int n) {
        const int64_t b = rows.begin + r;
        if (step > 0) through_weights(step - 1, p, b, n, d_h);
        for (int i = 0; i < n; ++i) apply_cell(step, b + i, p, d_h + i * Columns::kWidth);
      });
    }
  }

  void apply_cell(int64_t step, int64_t b, int64_t panel, const A* from_weights) {
    const auto [T, B, I, H] = args_.size;
    const int64_t t = time(step), row = t * B + b;
    const S* gates = gates_of(step, b);
    const A* cells = static_cast<const A*>(args_.cells);
    const S* h_prev_row = h_before(step, b);
    const A* c_prev_row = Cell::kHasCell ? c_before(step, b) : nullptr;
    const S* grad_y = args_.grad_y ? static_cast<const S*>(args_.grad_y) +
                                         t * args_.grad_y_stride_t + b * args_.grad_y_stride_b
                                   : nullptr;
    Element* d_gates_row = gate_row(step, b);
    for (int v = 0; v < Columns::kVectors; ++v) {
      const int64_t unit = panel * Columns::kWidth + v * kLanesA;
      const int64_t left = H - unit;
      if (left <= 0) break;
      V saved[Cell::kSaved + 1], d_gates[D];
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load(gates + k * H + unit, left);
      const V h = load(static_cast<const S*>(args_.y) + row * H + unit, left);
      const V h_prev = load(h_prev_row + unit, left);
      V c{}, c_prev{}, d_c{};
      if (Cell::kHasCell) {
        c = load(cells + row * H + unit, left);
        c_prev = load(c_prev_row + unit, left);
        d_c = load(d_c_ + b * pitch_ + unit);
      }
      V d_h = grad_y ? load(grad_y + unit, left) : V{};
      if (step > 0) d_h += load(from_weights + v * kLanesA);
      if (step == 0 || Cell::kDirect) d_h += load(d_h_ + b * pitch_ + unit);
      V d_h_direct{};
      Cell::template backward<Math>(saved, h, h_prev, c, c_prev, d_h, d_c, d_h_direct, d_gates);
      for (int k = 0; k < D; ++k) store(d_gates_row + k * H + unit, d_gates[k], left);
      if (Cell::kHasCell) store(d_c_ + b * pitch_ + unit, d_c);
      if (Cell::kDirect) store(d_h_ + b * pitch_ + unit, d_h_direct);
    }
  }

  void store_state(Span rows, Span panels) {
    const auto [T, B, I, H] = args_.size;
    alignas(64) A d_h[kMaxTileRows * Columns::kWidth];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      for_row_tiles(rows.size(), Columns::kRows, [&](int64_t r, int n) {
        const int64_t first = rows.begin + r;
        if (args_.grad_h0) through_weights(T - 1, p, first, n, d_h);
        for (int i = 0; i < n; ++i) {
          for (int v = 0; v < Columns::kVectors; ++v) {
            const int64_t unit = p * Columns::kWidth + v * kLanesA, b = first + i;
            if (H - unit <= 0) break;
            if (args_.grad_h0) {
              V value = load(d_h + i * Columns::kWidth + v * kLanesA);
              if (Cell::kDirect) value += load(d_h_ + b * pitch_ + unit);
              store(static_cast<S*>(args_.grad_h0) + b * H + unit, value, H - unit);
            }
            if (args_.grad_c0)
              store(static_cast<S*>(args_.grad_c0) + b * H + unit, load(d_c_ + b * pitch_ + unit),
                    H - unit);
          }
        }
      });
    }
  }

  // grad_x[t] = d_gates[t] W_ih, rows of the block dealt to threads
  void grad_input(Span block, const Team& team) const {
    if (!args_.grad_x) return;
    const auto [T, B, I, H] = args_.size;
    const int64_t depth = G * H, batch = B, inputs = I;
    const Span own = team.share(block.size() * B);
    alignas(64) A out[kMaxTileRows * Columns::kWidth];
    for (int64_t p = 0; p < input_.count(); ++p) {
      const int64_t column = p * Columns::kWidth;
      for_row_tiles(own.size(), Columns::kRows, [&](int64_t r, int n) {
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i) {
          const int64_t row = own.begin + r + i;
          a[i] = gate_row(block.begin + row / batch, row % batch);
        }
        any_tile<Op, false, kLongChain>(input_.vectors(p), n, words<Op>(depth), a,
                                        input_.at(w_ih_, depth, p), out, Columns::kWidth);
        for (int i = 0; i < n; ++i) {
          const int64_t row = own.begin + r + i;
          S* to = static_cast<S*>(args_.grad_x) +
                  (time(block.begin + row / batch) * batch + row % batch) * inputs;
          for (int v = 0; v < input_.vectors(p); ++v) {
            const int64_t at = column + v * kLanesA;
            store(to + at, load(out + i * Columns::kWidth + v * kLanesA), inputs - at);
          }
        }
      });
    }
  }

  // Of weights and biases. d_gates is transposed, and x and h are packed, once for all threads.
  void grad_parameters(Span block, const Team& team) const {
    const bool any_weight = args_.grad_w_ih || args_.grad_w_hh;
    if (!any_weight && !args_.grad_b_ih && !args_.grad_b_hh) return;
    const auto [T, B, I, H] = args_.size;
    const Span vectors = team.share(ceil_div(D * H, kLanesA));
    const Span own{vectors.begin * kLanesA, std::min(vectors.end * kLanesA, D * H)};
    transpose_gates(block, own);
    grad_bias(block, own);
    if (!any_weight) return;
    const auto x = [&](int64_t step, int64_t b) { return x_row(step, b); };
    const auto h = [&](int64_t step, int64_t b) { return h_before(step, b); };
    if (args_.grad_w_ih) pack_rows_of(block, team, input_, x, x_);
    if (args_.grad_w_hh) pack_rows_of(block, team, hidden_, h, h_);
    team.barrier();
    if (args_.grad_w_ih)
      accumulate(block, team, 0, input_, x_, static_cast<A*>(args_.grad_w_ih), Cell::input_gate);
    if (args_.grad_w_hh)
      accumulate(block, team, D - G, hidden_, h_, static_cast<A*>(args_.grad_w_hh), same_gate);
  }
  static constexpr int same_gate(int j) { return j; }

  template <class Row>
  void pack_rows_of(Span block, const Team& team, const Columns& columns, Row&& row, A* to) const {
    const int64_t B = args_.size.B, depth = block.size() * B;
    const Span own = team.share(columns.count());
    for (int64_t p = own.begin; p < own.end; ++p)
      columns.template pack<S>([&](int64_t k) { return row(block.begin + k / B, k % B); }, depth, p,
                               columns.at(to, depth, p));
  }

  // grad[gate_of(j) * H + unit][n] (+)= sum over the rows of the block d_gates[first + j][unit]
  // right[n], j < G. Bands of rows times panels of columns are dealt to threads: a band for each
  // thread, unless that would make them too narrow for the tiles.
  template <class GateOf>
  void accumulate(Span block, const Team& team, int first, const Columns& columns, A* packed,
                  A* grad, GateOf gate_of) const {
    const int64_t B = args_.size.B, H = args_.size.H, rows = G * H;
    const int64_t depth = block.size() * B;
    const int64_t bands = std::clamp<int64_t>(rows / (4 * Columns::kRows), 1, team.size());
    const Span own = team.share(bands * columns.count());
    for (int64_t i = own.begin; i < own.end; ++i) {
      const int64_t band = i / columns.count(), p = i % columns.count();
      const int64_t begin = rows * band / bands, end = rows * (band + 1) / bands;
      for (int64_t j = begin / H; j * H < end; ++j) {
        const Span part{std::max(begin, j * H), std::min(end, (j + 1) * H)};
        A* to = grad + (gate_of(int(j)) * H + part.begin - j * H) * columns.N + p * Columns::kWidth;
        outer_product(left_ + (first * H + part.begin) * left_pitch_, part.size(), depth,
                      columns.at(packed, depth, p), columns, p, block.begin > 0, to);
      }
    }
  }

  // left[m][k] = d_gates[row k of the block][m], with zeros up to a whole vector of words
  void transpose_gates(Span block, Span own) const {
    const int64_t B = args_.size.B, depth = block.size() * B;
    for (int64_t k = 0; k < depth; k += kLanesA * Op::kPerWord) {
      const Element* from[kLanesA][Op::kPerWord];
      for (int64_t i = 0; i < kLanesA * Op::kPerWord; ++i)
        from[i / Op::kPerWord][i % Op::kPerWord] =
            k + i < depth ? gate_row(block.begin + (k + i) / B, (k + i) % B) + own.begin : nullptr;
      for (int64_t m = own.begin; m < own.end; m += kLanesA) {
        V square[kLanesA];
        for (int i = 0; i < kLanesA; ++i) {
          square[i] = Op::load_columns(from[i], own.end - m);
          for (const Element*& row : from[i]) row = row ? row + kLanesA : nullptr;
        }
        transpose<A>(square);
        const int64_t n = std::min<int64_t>(kLanesA, own.end - m);
        for (int64_t i = 0; i < n; ++i)
          __builtin_memcpy(left_ + (m + i) * left_pitch_ + k, &square[i], sizeof(V));
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

  void grad_bias(Span block, Span own) const {
    if (!args_.grad_b_ih && !args_.grad_b_hh) return;
    constexpr int64_t kPart =
        16;  // so that rounding errors do not grow with the length of the block
    const int64_t H = args_.size.H, depth = block.size() * args_.size.B;
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
              block.begin > 0);
        if (args_.grad_b_hh && j >= D - G)
          add(static_cast<A*>(args_.grad_b_hh) + (j - (D - G)) * H + unit, sums[i],
              block.begin > 0);
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
  const Columns hidden_, input_;
  const Panels gate_panels_;
  // Rows of d_gates and of its transpose are a vector longer than they need be: at multiples of 4
  // KiB they would compete for the same lines of L1.
  const int64_t pitch_, gate_pitch_, left_pitch_;
  A *w_hh_, *w_ih_;  // packed columns [panel][G*H][width], the rows of w_ih in the order of d_gates
  A *d_c_, *c0_;  // [B][pitch]
  A* d_h_;  // [B][pitch]: grad_h_n, then what bypasses W_hh
  Element* d_gates_;  // two blocks of steps [step][B][gate_pitch]
  Element* left_;  // transposed gate gradients [D*H][left_pitch]
  A *x_, *h_;  // packed columns of the rows of a block
  // only where gates are computed again
  S* gates_ = nullptr;  // [row of a block][K*H]
  A *gate_w_ih_ = nullptr, *gate_w_hh_ = nullptr;  // packed as in the forward, or null
  A *gate_b_ih_ = nullptr, *gate_b_hh_ = nullptr;
  Element *x_rows_ = nullptr, *h_rows_ = nullptr;  // copies [row of a block][whole words]
};
