// The gates of a block of steps computed again, where the forward did not save them: no step of
// this waits for another, as y and cells hold all states. Included inside an instruction set's
// namespace.

template <class Cell, class S>
class Recompute {
  using A = Compute<S>;
  using Op = Operand<S>;
  using Element = typename Op::Element;
  using Panels = GatePanels<Op, Cell::kGates>;
  using Tile = CellTile<Cell, S>;

 public:
  static bool wanted(const BackwardArgs& args) { return Cell::kSaved > 0 && !args.gates; }

  Recompute(const BackwardArgs& args, const Plan& plan, const History<Cell, S>& history,
            Arena& arena)
      : args_(args),
        history_(history),
        x_panels_{args.size.H, {Panels::template x_in_parts<S>(args.size)}},
        h_panels_{args.size.H, {Panels::template h_in_parts<S>(args.size)}},
        block_steps_(plan.block_steps) {
    if (!wanted(args)) return;
    const auto [T, B, I, H] = args.size;
    const int64_t block_rows = plan.block_steps * B, count = h_panels_.count();
    const int64_t width = count * Panels::kWidth, P = args.h_size;
    gates_ = arena.take<S>(block_rows * Cell::kSaved * H);
    // as in the forward, which would sum in another order else
    if (Panels::template pays_to_pack<S>(args.size)) {
      w_ih_ = arena.take<A>(count * x_panels_.size(I));
      w_hh_ = arena.take<A>(count * h_panels_.size(P));
    }
    good_ = arena.take<bool>(plan.threads);
    b_ih_ = arena.take<A>(width);
    b_hh_ = arena.take<A>(width);
    if (needs_copy(x_panels_, I))
      x_rows_ = arena.take<Element>(block_rows * x_panels_.format.row_size(I));
    if (needs_copy(h_panels_, P))
      h_rows_ = arena.take<Element>(block_rows * h_panels_.format.row_size(P));
  }

  void pack(const Team& team) {
    if (!wanted(args_)) return;
    const int64_t I = args_.size.I, P = args_.h_size;
    const Span panels = team.share(h_panels_.count());
    bool good = true;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t at = p * Panels::kWidth;
      if (w_ih_) {
        good &= x_panels_.pack(w_ih(), I, p, w_ih_ + p * x_panels_.size(I));
        good &= h_panels_.pack(w_hh(), P, p, w_hh_ + p * h_panels_.size(P));
      }
      h_panels_.pack_bias(static_cast<const S*>(args_.b_ih), p, b_ih_ + at);
      h_panels_.pack_bias(static_cast<const S*>(args_.b_hh), p, b_hh_ + at);
    }
    good_[team.index()] = good;
  }

  // for this thread's share of so many rows of a block
  void run(const Row* rows, int64_t count, const Team& team) const {
    const int64_t I = args_.size.I, P = args_.h_size;
    const Span own = team.share(count);
    const auto x = [&](int64_t i) { return history_.x(rows[i].step, rows[i].b); };
    const auto h = [&](int64_t i) { return history_.h_before(rows[i].step, rows[i].b); };
    const int64_t x_pitch = x_panels_.format.row_size(I), h_pitch = h_panels_.format.row_size(P);
    bool good = true;
    for (int i = 0; i < team.size(); ++i) good &= good_[i];
    for (int64_t i = own.begin; i < own.end; ++i) {
      if (x_rows_) good &= x_panels_.format.to_left(x_rows_ + i * x_pitch, x(i), I);
      if (h_rows_) good &= h_panels_.format.to_left(h_rows_ + i * h_pitch, h(i), P);
    }
    alignas(64) A from_x[kMaxTileRows * Panels::kWidth], from_h[kMaxTileRows * Panels::kWidth];
    for (int64_t p = 0; p < h_panels_.count(); ++p) {
      const int64_t at = p * Panels::kWidth;
      const A* w_ih_panel = w_ih_ && good ? w_ih_ + p * x_panels_.size(I) : nullptr;
      const A* w_hh_panel = w_hh_ && good ? w_hh_ + p * h_panels_.size(P) : nullptr;
      for_row_tiles(own.size(), kMaxTileRows, [&](int64_t r, int n) {
        const int64_t first = own.begin + r;
        const Element *a[kMaxTileRows], *b[kMaxTileRows];
        typename Tile::Row tile[kMaxTileRows];
        for (int i = 0; i < n; ++i) {
          const Row row = rows[first + i];
          a[i] = left_row(x(first + i), good ? x_rows_ : nullptr, (first + i) * x_pitch);
          b[i] = left_row(h(first + i), good ? h_rows_ : nullptr, (first + i) * h_pitch);
          const bool in_parts = h_panels_.format.in_parts;
          tile[i].h_prev =
              left_row(h(first + i), in_parts ? nullptr : h_rows_, (first + i) * h_pitch);
          tile[i].c_prev = Cell::kHasCell ? history_.c_before(row.step, row.b) : nullptr;
          tile[i].saved = const_cast<S*>(gates(row.step, row.b));
          tile[i].h = nullptr;
          tile[i].c = tile[i].cells = nullptr;
        }
        multiply(x_panels_, w_ih(), w_ih_panel, b_ih_ + at, I, p, a, n, from_x);
        multiply(h_panels_, w_hh(), w_hh_panel, b_hh_ + at, P, p, b, n, from_h);
        for (int i = 0; args_.tokens && i < n; ++i)
          x_panels_.look_up(history_.token_row(w_ih(), rows[first + i].step, rows[first + i].b),
                            b_ih_ + at, p, from_x + i * Panels::kWidth);
        Tile::forward(args_.size.H, p, tile, n, from_x, Panels::kWidth, from_h);
      });
    }
  }

  // the saved blocks of a step and a sequence, [K][H]
  const S* gates(int64_t step, int64_t b) const {
    return gates_ + (step % block_steps_ * args_.size.B + b) * Cell::kSaved * args_.size.H;
  }

 private:
  const S* w_ih() const { return static_cast<const S*>(args_.w_ih); }
  const S* w_hh() const { return static_cast<const S*>(args_.w_hh); }

  // whether rows of so many elements cannot be multiplied as they lie
  static bool needs_copy(const Panels& panels, int64_t elements) {
    return !std::is_same_v<S, Element> || panels.format.row_size(elements) != elements;
  }

  // A row as the left side of a product: its copy, or where there are no copies as it lies.
  static const Element* left_row(const S* row, const Element* copies, int64_t at) {
    if (copies) return copies + at;
    if constexpr (std::is_same_v<S, Element>) return row;
    return nullptr;
  }

  static void multiply(const Panels& panels, const S* w, const A* packed, const A* bias, int64_t K,
                       int64_t panel, const Element* const* a, int rows, A* out) {
    for_row_tiles(rows, panels.tile_rows(panel), [&](int64_t first, int n) {
      panels.multiply(w, packed, bias, K, panel, a + first, n, out + first * Panels::kWidth,
                      Panels::kWidth);
    });
  }

  const BackwardArgs& args_;
  const History<Cell, S>& history_;
  const Panels x_panels_, h_panels_;
  const int64_t block_steps_;
  S* gates_ = nullptr;  // [step of a block][B][K*H]
  A *w_ih_ = nullptr, *w_hh_ = nullptr;  // packed as in the forward, or null
  A *b_ih_ = nullptr, *b_hh_ = nullptr;
  bool* good_ = nullptr;  // of each thread: whether the weights that it packed have parts
  Element *x_rows_ = nullptr, *h_rows_ = nullptr;  // copies [row of a block][row_size]
};
