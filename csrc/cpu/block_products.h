// The gradients of x, of the weights and of the biases as products over the rows of a block of
// steps. Included inside an instruction set's namespace.

// A row for each sequence of the last steps, so many of them.
template <class T>
struct StepRows {
  T* data = nullptr;
  int64_t slots = 0, batch = 0, pitch = 0;

  static StepRows take(Arena& arena, int64_t slots, int64_t batch, int64_t pitch) {
    return {arena.take<T>(slots * batch * pitch), slots, batch, pitch};
  }
  T* operator()(int64_t step, int64_t b) const { return data + (step % slots * batch + b) * pitch; }
  T* operator()(Row row) const { return (*this)(row.step, row.b); }
};

// The rows at work in a block of steps.
struct Block {
  Span steps;
  const Row* rows;
  int64_t count;

  bool is_first() const { return steps.begin == 0; }
};

template <class Cell, class S>
class BlockProducts {
  using A = Compute<S>;
  using V = Vec<A>;
  static constexpr int kLanesA = kLanes<A>;
  static constexpr int G = Cell::kGates, D = Cell::kGradBlocks;
  using Op = Operand<S>;
  using Element = typename Op::Element;
  using Columns = ColumnPanels<Op>;
  // So few rows of a block are not worth packing. At most what as_constant takes.
  static constexpr int64_t kFewRows = 4;

 public:
  // Of what the steps of the backward leave: gate gradients and, where h is projected, the gradient
  // of h and what the cells put out.
  BlockProducts(const BackwardArgs& args, const Plan& plan, const History<Cell, S>& history,
                const StepRows<Element>& d_gates, const StepRows<Element>& d_h,
                const StepRows<S>& unprojected, Arena& arena)
      : args_(args),
        history_(history),
        d_gates_(d_gates),
        d_h_(d_h),
        unprojected_(unprojected),
        in_parts_(plan.block_in_parts),
        hidden_{args.h_size, {in_parts_}},
        input_{args.size.I, {in_parts_}},
        units_{args.size.H},
        panelwise_(plan.input == Packing::kPanelwise) {
    const int64_t rows = plan.block_steps * args.size.B, H = args.size.H;
    const int64_t panels = panelwise_ ? plan.threads : input_.count();
    w_ih_ = arena.take<A>(args.grad_x ? panels * input_.panel_size(G * H) : 0);
    left_ = Transposed::take(arena, D * H, rows, in_parts_);
    if (in_parts_ && args.grad_x) {
      split_pitch_ = input_.format.row_size(G * H);
      split_ = arena.take<Element>(rows * split_pitch_);
    }
    x_ = arena.take<A>(input_.size(rows));
    h_ = arena.take<A>(hidden_.size(rows));
    if (!args.grad_w_hr) return;
    projection_left_ = Transposed::take(arena, args.h_size, rows, false);
    packed_unprojected_ = arena.take<A>(units_.size(rows));
  }

  void pack(const Team& team) {
    if (!args_.grad_x || panelwise_) return;
    const Span own = team.share(input_.count());
    for (int64_t p = own.begin; p < own.end; ++p)
      pack_w_ih(p, input_.at(w_ih_, G * args_.size.H, p));
  }

  // With a barrier inside if gradients of weights are wanted.
  void run(const Block& block, const Team& team) const {
    grad_input(block, team);
    grad_parameters(block, team);
  }

 private:
  // The left side of products over the rows of a block, [element][row of the block].
  struct Transposed {
    Element* data = nullptr;
    int64_t pitch = 0;
    bool in_parts = false;

    static Transposed take(Arena& arena, int64_t elements, int64_t rows, bool in_parts) {
      // A vector longer than they need be: at multiples of 4 KiB rows would compete for the same
      // lines of L1.
      constexpr int64_t kWhole = kLanesA * Op::kPerWord;
      const int64_t pitch =
          in_parts ? Format<Op>{true}.row_size(rows) : (ceil_div(rows, kWhole) + 1) * kWhole;
      return {arena.take<Element>(elements * pitch), pitch, in_parts};
    }
    Element* row(int64_t element) const { return data + element * pitch; }
    Transposed from(int64_t element) const { return {row(element), pitch, in_parts}; }
  };

  void pack_w_ih(int64_t panel, A* to) const {
    const int64_t I = args_.size.I, H = args_.size.H;
    const S* w_ih = static_cast<const S*>(args_.w_ih);
    const auto row = [&](int64_t k) {
      return w_ih + (Cell::input_gate(int(k / H)) * H + k % H) * I;
    };
    input_.template pack<S>(row, G * H, panel, to);
  }

  // grad_x[t] = d_gates[t] W_ih, rows of the block dealt to threads, or panels
  void grad_input(const Block& block, const Team& team) const {
    if (!args_.grad_x) return;
    const auto [T, B, I, H] = args_.size;
    const int64_t depth = G * H, inputs = I;
    const auto target = [&](int64_t step, int64_t b) {
      return static_cast<S*>(args_.grad_x) + history_.batch.row(history_.time(step), b) * inputs;
    };
    const int64_t count = input_.count();
    const Span own = panelwise_ ? Span{0, block.count} : team.share(block.count);
    const Span panels = panelwise_ ? team.share(count) : Span{0, count};
    if (in_parts_) {
      const Span split = panelwise_ ? team.share(block.count) : own;
      for (int64_t r = split.begin; r < split.end; ++r)
        input_.format.to_left(split_ + r * split_pitch_, d_gates_(block.rows[r]), depth);
      if (panelwise_) team.barrier();
    }
    alignas(64) A out[kMaxTileRows * Columns::kWidth];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      A* packed = input_.at(w_ih_, depth, panelwise_ ? team.index() : p);
      if (panelwise_) pack_w_ih(p, packed);
      const int64_t column = p * Columns::kWidth;
      for_row_tiles(own.size(), input_.tile_rows(p), [&](int64_t r, int n) {
        const int64_t first = own.begin + r;
        const Row* rows = block.rows + first;
        const Element* a[kMaxTileRows];
        for (int i = 0; i < n; ++i)
          a[i] = in_parts_ ? split_ + (first + i) * split_pitch_ : d_gates_(rows[i]);
        input_.template multiply<false, kLongChain>(p, n, depth, a, packed, out, Columns::kWidth);
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
    for (int64_t step = block.steps.begin; step < block.steps.end; ++step)
      for (int64_t b = cleared.begin; b < cleared.end; ++b)
        if (history_.time(step) >= history_.batch.length(b))
          __builtin_memset(target(step, b), 0, size_t(inputs) * sizeof(S));
  }

  // Of weights and biases. d_gates is transposed, and x and h are packed, once for all threads.
  void grad_parameters(const Block& block, const Team& team) const {
    if (args_.tokens && args_.grad_w_ih) grad_table(block, team);
    const bool of_x = args_.grad_w_ih && !args_.tokens;
    const bool any_weight = of_x || args_.grad_w_hh || args_.grad_w_hr;
    if (!any_weight && !args_.grad_b_ih && !args_.grad_b_hh) return;
    const int64_t H = args_.size.H, P = args_.h_size;
    const auto x = [&](Row row) { return history_.x(row.step, row.b); };
    const auto h = [&](Row row) { return history_.h_before(row.step, row.b); };
    const Span own = share_vectors(team, D * H);
    if (block.count > 0 && block.count <= kFewRows) {
      const auto d_gates = [&](int64_t first) {
        return [=, this](Row row) { return d_gates_(row) + first; };
      };
      grad_bias(block, own, [&](int64_t m, int64_t n) {
        V sum{};
        for (int64_t k = 0; k < block.count; ++k) sum += load(d_gates_(block.rows[k]) + m, n);
        return sum;
      });
      if (of_x)
        sum_few(block, team, d_gates(0), G, H, x, args_.size.I, args_.grad_w_ih, Cell::input_gate);
      if (args_.grad_w_hh)
        sum_few(block, team, d_gates((D - G) * H), G, H, h, P, args_.grad_w_hh, same_place);
      if (args_.grad_w_hr)
        sum_few(block, team, d_h_, 1, P, unprojected_, H, args_.grad_w_hr, same_place);
      return;
    }
    transpose_rows(block, own, d_gates_, left_);
    grad_bias(block, own, [&](int64_t m, int64_t n) { return sums_of_rows(m, n, block.count); });
    if (!any_weight) return;
    if (of_x) pack_rows_of(block, team, input_, x, x_);
    if (args_.grad_w_hh) pack_rows_of(block, team, hidden_, h, h_);
    if (args_.grad_w_hr) {
      transpose_rows(block, share_vectors(team, P), d_h_, projection_left_);
      pack_rows_of(block, team, units_, unprojected_, packed_unprojected_);
    }
    team.barrier();
    if (of_x) accumulate(block, team, left_, G, H, input_, x_, args_.grad_w_ih, Cell::input_gate);
    if (args_.grad_w_hh)
      accumulate(block, team, left_.from((D - G) * H), G, H, hidden_, h_, args_.grad_w_hh,
                 same_place);
    if (args_.grad_w_hr)
      accumulate(block, team, projection_left_, 1, P, units_, packed_unprojected_, args_.grad_w_hr,
                 same_place);
  }

  // grad[place(j) * height + i][n] (+)= sum over a few rows left(row)[j * height + i]
  // right(row)[n], j < count: as the rows lie, for transposing and packing them would take longer.
  template <class Left, class Right, class Place>
  void sum_few(const Block& block, const Team& team, Left&& left, int count, int64_t height,
               Right&& right, int64_t columns, void* grad, Place place) const {
    const Span own = share_vectors(team, count * height);
    as_constant(int(block.count), [&]<int R>() {
      const S* values[R];
      for (int r = 0; r < R; ++r) values[r] = right(block.rows[r]);
      for (int64_t m = own.begin; m < own.end; m += kLanesA) {
        const int64_t n = std::min<int64_t>(kLanesA, own.end - m);
        alignas(64) A factors[R][kLanesA];
        for (int r = 0; r < R; ++r) store(factors[r], load(left(block.rows[r]) + m, n));
        for (int64_t i = 0; i < n; ++i) {
          const int64_t j = (m + i) / height, row = place(int(j)) * height + (m + i) % height;
          A* to = static_cast<A*>(grad) + row * columns;
          const auto add = [&](int64_t at, auto... rest) __attribute__((always_inline)) {
            V sum = block.is_first() ? V{} : load(to + at, rest...);
            unrolled<R>([&](auto r) __attribute__((always_inline)) {
              sum += factors[r][i] * load(values[r] + at, rest...);
            });
            store(to + at, sum, rest...);
          };
          int64_t at = 0;
          for (; at + kLanesA <= columns; at += kLanesA) add(at);
          if (at < columns) add(at, columns - at);
        }
      }
    });
  }

  // The rows of tokens; a thread has its part of the columns.
  void grad_table(const Block& block, const Team& team) const {
    const int64_t H = args_.size.H;
    const Span own = share_vectors(team, G * H);
    for (int64_t k = 0; k < block.count; ++k) {
      const Row row = block.rows[k];
      const Element* d_gates = d_gates_(row);
      A* table = history_.token_row(static_cast<A*>(args_.grad_w_ih), row.step, row.b);
      for (int64_t j = own.begin / H; j * H < own.end; ++j) {
        const int64_t begin = std::max(own.begin, j * H), end = std::min(own.end, (j + 1) * H);
        A* to = table + (Cell::input_gate(int(j)) - j) * H;
        for (int64_t m = begin; m < end; m += kLanesA)
          store(to + m, load(to + m, end - m) + load(d_gates + m, end - m), end - m);
      }
    }
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
    // a few rows at a time, for all panels, as rows come from memory
    constexpr int64_t kAtOnce = 32;
    const Span own = team.share(columns.count());
    for (int64_t k = 0; k < block.count; k += kAtOnce)
      for (int64_t p = own.begin; p < own.end; ++p)
        columns.template pack<S>(
            [&](int64_t i) { return source(block.rows[k + i]); },
            std::min(kAtOnce, block.count - k), p,
            columns.at(to, block.count, p) + columns.format.panel_size(columns.vectors(p), k));
  }

  // grad[place(j) * height + i][n] (+)= sum over the rows of the block left[j * height + i]
  // right[n], j < count. Bands of rows times panels of columns are dealt to threads: a band for
  // each thread, unless that would make them too narrow for the tiles, or several, which stay in
  // L2 while the panels pass.
  template <class Place>
  void accumulate(const Block& block, const Team& team, const Transposed& left, int count,
                  int64_t height, const Columns& columns, A* packed, void* grad,
                  Place place) const {
    constexpr int64_t kLeastTiles = 4, kBandBytes = 512 << 10;
    const int64_t rows = count * height, depth = block.count, panels = columns.count();
    const int64_t tile_rows = columns.format.tile_rows(Columns::kVectors);
    const int64_t tiles = ceil_div(rows, tile_rows);
    const int64_t tile_bytes = tile_rows * left.pitch * int64_t(sizeof(Element));
    const int64_t most_tiles = std::max(kLeastTiles, kBandBytes / tile_bytes);
    const int64_t threads = std::clamp<int64_t>(tiles / kLeastTiles, 1, team.size());
    const int64_t bands = ceil_div(tiles, threads * most_tiles) * threads;
    // As many panels at once as stay in L2 beside what else is there: so that, of a few rows,
    // whole rows of the gradient are written, and not 256 bytes here and there.
    constexpr int64_t kGroupBytes = 256 << 10;
    const int64_t panel_bytes = columns.panel_size(depth) * int64_t(sizeof(A));
    const int64_t at_once = std::max<int64_t>(kGroupBytes / std::max<int64_t>(panel_bytes, 1), 1);
    const Span own = team.share(bands * panels);
    for (int64_t i = own.begin; i < own.end;) {
      const int64_t band = i / panels, p = i % panels;
      const Span group{p, std::min(p + at_once, std::min(panels, p + own.end - i))};
      const int64_t begin = tiles * band / bands * tile_rows;
      const int64_t end = std::min(rows, tiles * (band + 1) / bands * tile_rows);
      for (int64_t j = begin / height; j * height < end; ++j) {
        const Span part{std::max(begin, j * height), std::min(end, (j + 1) * height)};
        A* to =
            static_cast<A*>(grad) + (place(int(j)) * height + part.begin - j * height) * columns.N;
        outer_product(left.from(part.begin), part.size(), depth, packed, columns, group,
                      !block.is_first(), to);
      }
      i += group.size();
    }
  }

  // left[m][k] = element m of row k of the block, with zeros up to a whole vector of words
  template <class Source>
  void transpose_rows(const Block& block, Span own, Source&& source, const Transposed& left) const {
    const int64_t depth = block.count;
    if constexpr (kHasParts<Op>)
      if (left.in_parts) return transpose_in_parts(block, own, source, left);
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
          __builtin_memcpy(left.row(m + i) + k, &square[i], sizeof(V));
      }
    }
  }
  template <class Source>
  void transpose_in_parts(const Block& block, Span own, Source&& source,
                          const Transposed& left) const {
    using InParts = Parts<Op>;
    for (int64_t k = 0; k < block.count; k += InParts::kStep) {
      const Element* from[InParts::kStep];
      for (int64_t i = 0; i < InParts::kStep; ++i)
        from[i] = k + i < block.count ? source(block.rows[k + i]) : nullptr;
      for (int64_t m = own.begin; m < own.end; m += kLanesA) {
        V squares[2][kLanesA];
        for (int64_t i = 0; i < InParts::kStep; ++i)
          squares[i / kLanesA][i % kLanesA] = from[i] ? load(from[i] + m, own.end - m) : V{};
        for (V(&square)[kLanesA] : squares) transpose<A>(square);
        const int64_t n = std::min<int64_t>(kLanesA, own.end - m);
        for (int64_t i = 0; i < n; ++i)
          InParts::store_words(InParts::split(squares[0][i], squares[1][i]),
                               left.row(m + i) + InParts::row_offset(k), kLanesA);
      }
    }
  }

  // to[m][columns of the panels] (+)= sum_k left[m][k] packed[k]
  void outer_product(const Transposed& left, int64_t rows, int64_t depth, A* packed,
                     const Columns& columns, Span panels, bool add, A* to) const {
    // the first panel is the widest
    for_row_tiles(rows, columns.tile_rows(panels.begin), [&](int64_t m, int n) {
      const Element* a[kMaxTileRows];
      for (int i = 0; i < n; ++i) a[i] = left.row(m + i);
      Ahead ahead{left.row(m + n), n * left.pitch * int64_t(sizeof(Element))};
      for (int64_t p = panels.begin; p < panels.end; ++p, ahead = {}) {
        A* target = to + m * columns.N + p * Columns::kWidth;
        // a tile of so few terms would wait for the lines that it writes
        if (depth <= kLongChain && p + 1 < panels.end)
          fetch_tile(target + Columns::kWidth, n, columns.N, columns.vectors(p + 1));
        add_tile(a, n, depth, columns, p, columns.at(packed, depth, p), ahead, add, target);
      }
    });
  }

  static void fetch_tile(const A* at, int rows, int64_t pitch, int vectors) {
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) __builtin_prefetch(at + i * pitch + v * kLanesA, 1, 2);
  }

  void add_tile(const Element* const* a, int n, int64_t depth, const Columns& columns, int64_t p,
                const A* panel, const Ahead& ahead, bool add, A* to) const {
    const int vectors = columns.vectors(p);
    const int64_t width = columns.N - p * Columns::kWidth;
    if (vectors * kLanesA <= width) {
      // the matrix unit would wait for the lines to add to
      if (add && columns.format.in_parts) fetch_tile(to, n, columns.N, vectors);
      if (add)
        columns.template multiply<true, kLongChain>(p, n, depth, a, panel, to, columns.N, {ahead});
      else
        columns.template multiply<false, kLongChain>(p, n, depth, a, panel, to, columns.N, {ahead});
      return;
    }
    alignas(64) A edge[kMaxTileRows * Columns::kWidth];
    columns.template multiply<false, kLongChain>(p, n, depth, a, panel, edge, Columns::kWidth);
    for (int i = 0; i < n; ++i) {
      for (int v = 0; v < vectors; ++v) {
        A* cell = to + i * columns.N + v * kLanesA;
        V value = load(edge + i * Columns::kWidth + v * kLanesA);
        if (add) value += load(cell, width - v * kLanesA);
        store(cell, value, width - v * kLanesA);
      }
    }
  }

  // sums(m, n): of n gate gradients from the m-th on, over the rows of the block
  template <class Sums>
  void grad_bias(const Block& block, Span own, Sums&& sums) const {
    if (!args_.grad_b_ih && !args_.grad_b_hh) return;
    const int64_t H = args_.size.H;
    for (int64_t m = own.begin; m < own.end; m += kLanesA) {
      const int64_t n = std::min<int64_t>(kLanesA, own.end - m);
      alignas(64) A of_gates[kLanesA];
      store(of_gates, sums(m, n));
      // a vector may end in another gate
      for (int64_t i = 0, j = m / H, unit = m % H; i < n; ++j, unit = 0) {
        const int64_t count = std::min(n - i, H - unit);
        const auto add = [&](void* grad, int64_t to) {
          A* at = static_cast<A*>(grad) + to * H + unit;
          V sum = load(of_gates + i, count);
          if (!block.is_first()) sum += load(at, count);
          store(at, sum, count);
        };
        if (args_.grad_b_ih && j < G) add(args_.grad_b_ih, Cell::input_gate(int(j)));
        if (args_.grad_b_hh && j >= D - G) add(args_.grad_b_hh, j - (D - G));
        i += count;
      }
    }
  }
  // of transposed rows
  V sums_of_rows(int64_t m, int64_t n, int64_t depth) const {
    // so that rounding errors do not grow with the length of the block
    constexpr int64_t kPart = 16;
    V rows[kLanesA] = {};
    for (int i = 0; i < n; ++i)
      for (int64_t k = 0; k < depth; k += kPart * kLanesA)
        rows[i] += partial_sum<kPart>(left_.row(m + i), k, depth);
    return lane_sums<A>(rows);
  }
  template <int64_t kVectors>
  V partial_sum(const Element* row, int64_t k, int64_t depth) const {
    V sum{};
    const int64_t end = std::min(depth, k + kVectors * kLanesA);
    if constexpr (kHasParts<Op>) {
      for (; in_parts_ && k < end; k += Parts<Op>::kStep)
        sum += Parts<Op>::sum_of_step(row + Parts<Op>::row_offset(k));
    }
    for (; k < end; k += kLanesA) sum += load(row + k);
    return sum;
  }

  const BackwardArgs& args_;
  const History<Cell, S>& history_;
  const StepRows<Element>& d_gates_;
  const StepRows<Element>& d_h_;
  const StepRows<S>& unprojected_;
  const bool in_parts_;  // the products take parts, but the one for W_hr
  const Columns hidden_, input_, units_;
  const bool panelwise_;  // W_ih is packed by each thread, one panel at a time
  A* w_ih_;  // packed columns [panel, or thread][G*H][width], its rows in the order of d_gates
  Transposed left_;  // gate gradients [D*H]
  Element* split_ = nullptr;  // gate gradients in parts [row of a block][split_pitch], for grad_x
  int64_t split_pitch_ = 0;
  A *x_, *h_;  // packed columns of the rows of a block
  Transposed projection_left_;  // gradient of h [P]
  A* packed_unprojected_ = nullptr;  // columns of the rows of a block
};
