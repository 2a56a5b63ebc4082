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
      : args_(args), history_(history), panels_{args.size.H}, block_steps_(plan.block_steps) {
    if (!wanted(args)) return;
    const auto [T, B, I, H] = args.size;
    const int64_t block_rows = plan.block_steps * B, width = panels_.count() * Panels::kWidth;
    const int64_t P = args.h_size;
    gates_ = arena.take<S>(block_rows * Cell::kSaved * H);
    if (Panels::template pays_to_pack<S>(
            args.size)) {  // as in the forward, which would sum in another order else
      w_ih_ = arena.take<A>(width * words<Op>(I));
      w_hh_ = arena.take<A>(width * words<Op>(P));
    }
    b_ih_ = arena.take<A>(width);
    b_hh_ = arena.take<A>(width);
    if (needs_copy(I)) x_rows_ = arena.take<Element>(block_rows * whole_words(I));
    if (needs_copy(P)) h_rows_ = arena.take<Element>(block_rows * whole_words(P));
  }

  void pack(const Team& team) {
    if (!wanted(args_)) return;
    const int64_t I = args_.size.I, P = args_.h_size;
    const Span panels = team.share(panels_.count());
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t at = p * Panels::kWidth;
      if (w_ih_) {
        panels_.pack(static_cast<const S*>(args_.w_ih), I, p, w_ih_ + at * words<Op>(I));
        panels_.pack(static_cast<const S*>(args_.w_hh), P, p, w_hh_ + at * words<Op>(P));
      }
      panels_.pack_bias(static_cast<const S*>(args_.b_ih), p, b_ih_ + at);
      panels_.pack_bias(static_cast<const S*>(args_.b_hh), p, b_hh_ + at);
    }
  }

  // for this thread's share of the rows of a block
  void run(const Row* rows, Span own) const {
    const int64_t I = args_.size.I, P = args_.h_size;
    const auto x = [&](int64_t i) { return history_.x(rows[i].step, rows[i].b); };
    const auto h = [&](int64_t i) { return history_.h_before(rows[i].step, rows[i].b); };
    for (int64_t i = own.begin; i < own.end; ++i) {
      if (x_rows_) copy_row(x(i), I, x_rows_ + i * whole_words(I));
      if (h_rows_) copy_row(h(i), P, h_rows_ + i * whole_words(P));
    }
    alignas(64) A from_x[kMaxTileRows * Panels::kWidth], from_h[kMaxTileRows * Panels::kWidth];
    for (int64_t p = 0; p < panels_.count(); ++p) {
      const int64_t at = p * Panels::kWidth;
      const A* w_ih = w_ih_ ? w_ih_ + at * words<Op>(I) : nullptr;
      const A* w_hh = w_hh_ ? w_hh_ + at * words<Op>(P) : nullptr;
      for_row_tiles(own.size(), panels_.tile_rows(p), [&](int64_t r, int n) {
        const int64_t first = own.begin + r;
        const Element *a[kMaxTileRows], *b[kMaxTileRows];
        for (int i = 0; i < n; ++i) {
          a[i] = left_row(x(first + i), I, x_rows_, first + i);
          b[i] = left_row(h(first + i), P, h_rows_, first + i);
        }
        panels_.multiply(static_cast<const S*>(args_.w_ih), w_ih, b_ih_ + at, I, p, a, n, from_x,
                         Panels::kWidth);
        panels_.multiply(static_cast<const S*>(args_.w_hh), w_hh, b_hh_ + at, P, p, b, n, from_h,
                         Panels::kWidth);
        typename Tile::Row tile[kMaxTileRows];
        for (int i = 0; i < n; ++i) {
          const Row row = rows[first + i];
          if (args_.tokens)
            panels_.look_up(history_.token_row(static_cast<const S*>(args_.w_ih), row.step, row.b),
                            b_ih_ + at, p, from_x + i * Panels::kWidth);
          tile[i].h_prev = b[i];
          tile[i].c_prev = Cell::kHasCell ? history_.c_before(row.step, row.b) : nullptr;
          tile[i].saved = const_cast<S*>(gates(row.step, row.b));
          tile[i].h = nullptr;
          tile[i].c = tile[i].cells = nullptr;
        }
        Tile::forward(args_.size.H, p, tile, n, from_x, Panels::kWidth, from_h);
      });
    }
  }

  // the saved blocks of a step and a sequence, [K][H]
  const S* gates(int64_t step, int64_t b) const {
    return gates_ + (step % block_steps_ * args_.size.B + b) * Cell::kSaved * args_.size.H;
  }

 private:
  static int64_t whole_words(int64_t elements) { return words<Op>(elements) * Op::kPerWord; }
  // whether rows of so many elements cannot be multiplied as they lie
  static bool needs_copy(int64_t elements) {
    return !std::is_same_v<S, Element> || whole_words(elements) != elements;
  }

  // A row as the left side of a product, copied to its place in `copies` where it must be.
  static const Element* left_row(const S* row, int64_t elements, Element* copies, int64_t place) {
    if (copies) return copies + place * whole_words(elements);
    if constexpr (std::is_same_v<S, Element>) return row;
    return nullptr;
  }
  static void copy_row(const S* row, int64_t elements, Element* to) {
    convert(to, row, elements);
    for (int64_t i = elements; i < whole_words(elements); ++i) to[i] = Element{};
  }

  const BackwardArgs& args_;
  const History<Cell, S>& history_;
  const Panels panels_;
  const int64_t block_steps_;
  S* gates_ = nullptr;  // [step of a block][B][K*H]
  A *w_ih_ = nullptr, *w_hh_ = nullptr;  // packed as in the forward, or null
  A *b_ih_ = nullptr, *b_hh_ = nullptr;
  Element *x_rows_ = nullptr, *h_rows_ = nullptr;  // copies [row of a block][whole words]
};
