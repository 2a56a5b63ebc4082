// Right-hand sides of products as packed panels: weights by gates and units, and columns of
// anything. Included inside an instruction set's namespace.

// A weight matrix (G * H, K) seen as panels of whole units: one panel holds all G gates of
// kUnits consecutive hidden units, as G * kUnitVectors vectors in the order [gate][unit vector].
// With one gate the last panel has no more vectors than its units need.
template <class Op, int G>
struct GatePanels {
  using A = typename Op::A;
  using Element = typename Op::Element;
  static constexpr int kLanesA = kLanes<A>;
  static constexpr int kUnitVectors = G == 1 ? 4 : 1;
  static constexpr int kVectors = G * kUnitVectors;
  static constexpr int kUnits = kUnitVectors * kLanesA;
  static constexpr int kWidth = kVectors * kLanesA;
  static constexpr int kDotRows = RNNFAST_REGISTERS == 32 ? 3 : 1;

  int64_t H;
  Format<Op> format = {};

  int64_t count() const { return ceil_div(H, kUnits); }
  // of a packed panel
  int64_t size(int64_t K) const { return format.panel_size(kVectors, K); }
  int vectors(int64_t panel) const {
    const int64_t left = ceil_div(H - panel * kUnits, kLanesA);
    return G == 1 && left < kVectors ? int(left) : kVectors;
  }
  int tile_rows(int64_t panel) const { return format.tile_rows(vectors(panel)); }
  // elements of a row of the products with some panels
  int64_t width(Span panels) const {
    const int64_t last = panels.end - 1;
    return panels.size() > 0 ? (panels.size() - 1) * kWidth + vectors(last) * kLanesA : 0;
  }

  // Whether the weights of a layer are used often enough for tiles to make up for packing them. A
  // small matrix is packed within L2, and its rows are too short for dot products; these are slow
  // where they have to convert, most of all where tiles need not.
  template <class S>
  static bool pays_to_pack(const Sizes& size) {
    const int64_t bytes = G * size.H * size.H * int64_t(sizeof(S));
    const int64_t uses = Op::kPerWord > 1              ? 3
                         : !std::is_same_v<S, Element> ? 6
                         : bytes < (128 << 10)         ? 8
                         : bytes < (512 << 10)         ? 12
                                                       : 24;
    return size.T * size.B >= uses;
  }

  // Whether the products with x and with h take parts.
  template <class S>
  static bool x_in_parts([[maybe_unused]] const Sizes& size) {
    if constexpr (kHasParts<Op>)
      return Parts<Op>::pay_at_once(size.T * size.B, size.I, G * size.H) && pays_to_pack<S>(size);
    return false;
  }
  template <class S>
  static bool h_in_parts([[maybe_unused]] const Sizes& size) {
    if constexpr (kHasParts<Op>)
      return Parts<Op>::pay_in_steps(size.B, size.T, size.H, G * size.H) && pays_to_pack<S>(size);
    return false;
  }

  // the row of the weight matrix behind column `lane` of vector j of a panel; -1 beyond the last
  // unit
  int64_t weight_row(int64_t panel, int j, int lane) const {
    const int64_t unit = panel * kUnits + (j % kUnitVectors) * kLanesA + lane;
    return unit < H ? (j / kUnitVectors) * H + unit : -1;
  }

  // False if the weights have no parts.
  template <class S>
  bool pack(const S* w, int64_t K, int64_t panel, A* to) const {
    const int vectors = this->vectors(panel);
    bool good = true;
    for (int j = 0; j < vectors; ++j) {
      const auto source = [&](int lane) {
        const int64_t row = weight_row(panel, j, lane);
        return row < 0 ? nullptr : w + row * K;
      };
      if constexpr (kHasParts<Op>)
        if (format.in_parts) {
          good &= Parts<Op>::pack_transposed(source, K, to, j, vectors);
          continue;
        }
      pack_transposed<Op, S>(source, K, to + j * kLanesA, vectors * kLanesA);
    }
    return good;
  }

  template <class S>
  void pack_bias(const S* bias, int64_t panel, A* to) const {
    for (int j = 0; j < kVectors; ++j) {
      const int64_t row = weight_row(panel, j, 0);
      const int64_t n = H - panel * kUnits - (j % kUnitVectors) * kLanesA;
      store(to + j * kLanesA, bias && row >= 0 ? load(bias + row, n) : Vec<A>{});
    }
  }

  // The part of a panel of a row [G][H], of a table or a product, plus its bias, if not null.
  template <class S>
  void look_up(const S* row, const A* bias, int64_t panel, A* out) const {
    for (int j = 0; j < vectors(panel); ++j) {
      const int64_t n = H - panel * kUnits - (j % kUnitVectors) * kLanesA;
      Vec<A> value = load(row + weight_row(panel, j, 0), n);
      if (bias) value += load(bias + j * kLanesA);
      store(out + j * kLanesA, value);
    }
  }

  // A panel of w (G * H, K), of which `packed` has all or room for one; null: as it lies. Not good
  // where it has no parts.
  template <class S>
  const A* packed_panel(Packing packing, const S* w, int64_t K, A* packed, int64_t panel,
                        bool& good) const {
    if (packing == Packing::kOnce) return packed + panel * size(K);
    if (packing == Packing::kPanelwise) good &= pack(w, K, panel, packed);
    return packed;
  }

  // W a + bias for the rows of a tile and one panel of W, packed or (null) as it lies in w
  template <class S>
  RNNFAST_HD void multiply(const S* w, const A* packed, const A* bias, int64_t K, int64_t panel,
                           const Element* const* a, int rows, A* out, int64_t row_stride,
                           const Meanwhile& meanwhile = {}) const {
    if (packed)
      return as_constant(vectors(panel), [&]<int NR>() __attribute__((always_inline)) {
        format.template multiply<NR>(rows, K, a, packed, bias, out, row_stride, meanwhile);
      });
    for_row_tiles(rows, kDotRows, [&](int64_t first, int n) {
      as_constant(n, [&]<int R>() {
        if constexpr (R <= kDotRows)
          dots<R>(w, K, panel, a + first, bias, out + first * row_stride, row_stride);
      });
    });
  }

 private:
  // A few rows against a panel of unpacked weights: rows of w as dot products. For few rows, where
  // packing would cost more than it saves. Same arguments as a tile. Out of line, as it would take
  // registers from the loops over tiles.
  template <int R, class S>
  __attribute__((noinline)) void dots(const S* w, int64_t K, int64_t panel, const Element* const* a,
                                      const A* bias, A* out, int64_t row_stride) const {
    constexpr int64_t kPart = kChain * kLanesA;  // lanes have chains of their own
    for (int j = 0; j < vectors(panel); ++j) {
      const int64_t left = H - panel * kUnits - (j % kUnitVectors) * kLanesA;
      const int units = left < kLanesA ? int(left) : kLanesA;
      const S* rows = w + weight_row(panel, j, 0) * K;
      for (int64_t k = 0; k == 0 || k < K; k += kPart) {
        Vec<A> sum[R][kLanesA] = {};
        dot_rows(rows, K, units, {k, std::min(K, k + kPart)}, a, sum);
        for (int r = 0; r < R; ++r) {
          A* to = out + r * row_stride + j * kLanesA;
          store(to, lane_sums<A>(sum[r]) + load(k == 0 ? bias + j * kLanesA : to));
        }
      }
    }
  }

  // sum[r][i] += the products of row i of w and a[r] over some of k, eight rows of w at a time: so
  // many have their addresses in registers. In place of rows that w has not, the last one is read
  // again.
  template <int R, class S>
  RNNFAST_HD static void dot_rows(const S* w, int64_t pitch, int rows, Span k_range,
                                  const Element* const* a, Vec<A> (&sum)[R][kLanesA]) {
    constexpr int kGroup = kLanesA < 8 ? kLanesA : 8;
#pragma GCC unroll 2
    for (int first = 0; first < kLanesA; first += kGroup) {
      const S* from[kGroup];
      for (int i = 0; i < kGroup; ++i) from[i] = w + std::min(first + i, rows - 1) * pitch;
      const auto add = [&](int64_t k, auto... left) __attribute__((always_inline)) {
        Vec<A> value[R];
#pragma GCC unroll 3
        for (int r = 0; r < R; ++r) value[r] = load(a[r] + k, left...);
#pragma GCC unroll 8
        for (int i = 0; i < kGroup; ++i) {
          Vec<A> weights = load(from[i] + k, left...);
          if (R > 1) keep_in_register(weights);
#pragma GCC unroll 3
          for (int r = 0; r < R; ++r) sum[r][first + i] += value[r] * weights;
        }
      };
      int64_t k = k_range.begin;
      for (; k + kLanesA <= k_range.end; k += kLanesA) add(k);
      if (k < k_range.end) add(k, k_range.end - k);
    }
  }
};

// A general right-hand side (K, N), packed in panels of up to four vectors of columns.
template <class Op>
struct ColumnPanels {
  using A = typename Op::A;
  using Element = typename Op::Element;
  static constexpr int kVectors = 4;
  static constexpr int kWidth = kVectors * kLanes<A>;

  int64_t N;
  Format<Op> format = {};

  int64_t count() const { return ceil_div(N, kWidth); }
  // a narrow last panel is not padded to four vectors
  int vectors(int64_t panel) const {
    const int64_t left = ceil_div(N - panel * kWidth, kLanes<A>);
    return left < kVectors ? int(left) : kVectors;
  }
  int tile_rows(int64_t panel) const { return format.tile_rows(vectors(panel)); }
  int64_t panel_size(int64_t K) const { return format.panel_size(kVectors, K); }
  int64_t size(int64_t K) const { return count() * panel_size(K); }
  A* at(A* packed, int64_t K, int64_t panel) const { return packed + panel * panel_size(K); }

  template <class S, class Source>
  void pack(Source&& source, int64_t K, int64_t panel, A* to) const {
    if constexpr (kHasParts<Op>)
      if (format.in_parts)
        return Parts<Op>::pack_rows(source, K, panel * kWidth, N, vectors(panel), to);
    pack_rows<Op, S>(source, K, panel * kWidth, N, vectors(panel), to);
  }

  template <bool kAdd, int64_t kPart = kChain>
  RNNFAST_HD void multiply(int64_t panel, int rows, int64_t K, const Element* const* a,
                           const A* packed, A* out, int64_t row_stride,
                           const Meanwhile& meanwhile = {}) const {
    as_constant(vectors(panel), [&]<int NR>() __attribute__((always_inline)) {
      format.template multiply<NR, kAdd, kPart>(rows, K, a, packed, nullptr, out, row_stride,
                                                meanwhile);
    });
  }
};
