// A stack of layers that reads back what is sampled from its outputs. Every thread computes its
// panels of each layer's units and of the scores; a barrier follows each. Included inside an
// instruction set's namespace.

template <class Cell, class S>
class Generate {
  using A = Compute<S>;
  using Op = Operand<S>;
  using Element = typename Op::Element;
  using Panels = GatePanels<Op, Cell::kGates>;
  using Tile = CellTile<Cell, S>;
  using HeadPanels = GatePanels<Op, 1>;
  static constexpr int kLanesA = kLanes<A>;

 public:
  Generate(const GenerateArgs& args, Arena& arena)
      : args_(args),
        panels_{args.H},
        head_panels_{args.V},
        width_(panels_.count() * Panels::kWidth),
        pitch_((ceil_div(args.H, kLanesA) + 1) * kLanesA * Op::kPerWord),
        score_pitch_(head_panels_.count() * HeadPanels::kWidth) {
    const int64_t matrix = width_ * words<Op>(args.H), states = args.layers * args.B * pitch_;
    w_ih_ = arena.take<A>((args.layers - 1) * matrix);
    w_hh_ = arena.take<A>(args.layers * matrix);
    b_ih_ = arena.take<A>(args.layers * width_);
    b_hh_ = arena.take<A>(args.layers * width_);
    h_[0] = arena.take<Element>(states);
    h_[1] = arena.take<Element>(states);
    if (Cell::kHasCell) c_ = arena.take<A>(states);
    head_ = arena.take<A>(score_pitch_ * words<Op>(args.H));
    head_bias_ = arena.take<A>(score_pitch_);
    scores_ = arena.take<A>(args.B * score_pitch_);
  }

  // Packs the weights and loads the states.
  void start(const Team& team) {
    const int64_t H = args_.H, depth = words<Op>(H);
    const Span panels = team.share(panels_.count());
    for (int64_t l = 0; l < args_.layers; ++l) {
      const auto& layer = args_.layer[l];
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        const int64_t at = l * width_ + p * Panels::kWidth;
        if (l > 0)
          panels_.pack(static_cast<const S*>(layer.w_ih), H, p, w_ih_ + (at - width_) * depth);
        panels_.pack(static_cast<const S*>(layer.w_hh), H, p, w_hh_ + at * depth);
        panels_.pack_bias(static_cast<const S*>(layer.b_ih), p, b_ih_ + at);
        panels_.pack_bias(static_cast<const S*>(layer.b_hh), p, b_hh_ + at);
      }
    }
    const Span rows = team.share(args_.layers * args_.B);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t at = row * pitch_;
      convert(h_[0] + at, static_cast<const S*>(args_.h0) + row * H, H);
      // what completes the last word of an odd number of elements
      if (H % Op::kPerWord) h_[0][at + H] = h_[1][at + H] = Element{};
      if (Cell::kHasCell) convert(c_ + at, static_cast<const S*>(args_.c0) + row * H, H);
    }
    const Span head_panels = team.share(head_panels_.count());
    for (int64_t p = head_panels.begin; p < head_panels.end; ++p) {
      const int64_t at = p * HeadPanels::kWidth;
      head_panels_.pack(static_cast<const S*>(args_.head_weight), H, p, head_ + at * depth);
      head_panels_.pack_bias(static_cast<const S*>(args_.head_bias), p, head_bias_ + at);
    }
  }

  // Ends early where a token cannot be sampled; that is -1 then.
  void run(const GenerateSteps& steps, Sampler* samplers, const Team& team) {
    const int64_t B = args_.B;
    const Span rows = team.share(B), panels = team.share(panels_.count());
    for (int64_t step = 0; step < steps.count; ++step) {
      const int64_t* tokens = steps.tokens + step * B;
      for (int64_t b = 0; b < B; ++b)
        if (tokens[b] < 0) return;
      const int64_t parity = (steps.done + step) & 1;
      for (int64_t l = 0; l < args_.layers; ++l) {
        advance(l, parity, tokens, panels);
        team.barrier();
      }
      score(parity ^ 1, team.share(head_panels_.count()));
      team.barrier();
      for (int64_t b = rows.begin; b < rows.end; ++b)
        steps.tokens[(step + 1) * B + b] = samplers[team.index()](
            args_.sampling, scores_ + b * score_pitch_, args_.V, steps.uniforms[step * B + b]);
      team.barrier();
    }
  }

 private:
  Element* h(int64_t layer, int64_t parity, int64_t b) const {
    return h_[parity] + (layer * args_.B + b) * pitch_;
  }

  // one layer, from the states of one parity to those of the other
  void advance(int64_t layer, int64_t parity, const int64_t* tokens, Span panels) {
    const int64_t H = args_.H, depth = words<Op>(H);
    const S* table = static_cast<const S*>(args_.layer[0].w_ih);
    alignas(64) A from_x[kMaxTileRows * Panels::kWidth], from_h[kMaxTileRows * Panels::kWidth];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t at = layer * width_ + p * Panels::kWidth;
      for_row_tiles(args_.B, panels_.tile_rows(p), [&](int64_t first, int n) {
        const Element *below[kMaxTileRows], *before[kMaxTileRows];
        for (int i = 0; i < n; ++i) {
          before[i] = h(layer, parity, first + i);
          below[i] = layer > 0 ? h(layer - 1, parity ^ 1, first + i) : nullptr;
        }
        if (layer > 0)
          panels_.template multiply<S>(nullptr, w_ih_ + (at - width_) * depth, b_ih_ + at, H, p,
                                       below, n, from_x, Panels::kWidth);
        panels_.template multiply<S>(nullptr, w_hh_ + at * depth, b_hh_ + at, H, p, before, n,
                                     from_h, Panels::kWidth);
        typename Tile::Row tile[kMaxTileRows];
        for (int i = 0; i < n; ++i) {
          if (layer == 0)
            panels_.look_up(table + tokens[first + i] * Cell::kGates * H, b_ih_ + at, p,
                            from_x + i * Panels::kWidth);
          A* c = Cell::kHasCell ? c_ + (layer * args_.B + first + i) * pitch_ : nullptr;
          tile[i].h_prev = before[i];
          tile[i].h = h(layer, parity ^ 1, first + i);
          tile[i].c_prev = tile[i].c = c;
          tile[i].saved = nullptr;
          tile[i].cells = nullptr;
        }
        Tile::forward(H, p, tile, n, from_x, Panels::kWidth, from_h);
      });
    }
  }

  // the scores of tokens from the last layer's h
  void score(int64_t parity, Span panels) {
    const int64_t depth = words<Op>(args_.H);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t at = p * HeadPanels::kWidth;
      for_row_tiles(args_.B, head_panels_.tile_rows(p), [&](int64_t first, int n) {
        const Element* from[kMaxTileRows];
        for (int i = 0; i < n; ++i) from[i] = h(args_.layers - 1, parity, first + i);
        head_panels_.template multiply<S>(nullptr, head_ + at * depth, head_bias_ + at, args_.H, p,
                                          from, n, scores_ + first * score_pitch_ + at,
                                          score_pitch_);
      });
    }
  }

  const GenerateArgs& args_;
  const Panels panels_;
  const HeadPanels head_panels_;
  const int64_t width_, pitch_, score_pitch_;
  A* w_ih_;  // packed [layer but the first][panel][words of H][kWidth]
  A* w_hh_;  // packed [layer][panel][words of H][kWidth]
  A *b_ih_, *b_hh_;  // [layer][panel][kWidth]
  Element* h_[2];  // before even and odd steps [layer][B][pitch]
  A* c_ = nullptr;  // [layer][B][pitch]
  A* head_;  // packed [panel][words of H][kWidth]
  A* head_bias_;  // [panel][kWidth]
  A* scores_;  // [B][score_pitch]
};
