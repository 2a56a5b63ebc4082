// The gate maths on a tile: rows of the batch for one panel of units. Included inside an
// instruction set's namespace.

template <class Cell, class S>
class CellTile {
  using Op = Operand<S>;
  using Element = typename Op::Element;
  using A = typename Op::A;
  using V = Vec<A>;
  using Panels = GatePanels<Op, Cell::kGates>;
  static constexpr int G = Cell::kGates, kLanesA = kLanes<A>;

 public:
  // The states of one sequence.
  struct Row {
    const Element* h_prev;  // before the step, [H] where the cell needs it
    const A* c_prev;  // [H], null for zeros
    Element* h;  // after it, [H]; null where they are not wanted
    A* c;
    S* saved;  // what the backward needs, [K][H], or null
    A* cells;  // c once more, or null
  };

  // from_x and from_h have what the weights made of x and h, [row][gate][unit vector], rows of
  // from_x lying x_stride apart. May write whole vectors of h and c.
  static void forward(int64_t H, int64_t panel, const Row* rows, int count, const A* from_x,
                      int64_t x_stride, const A* from_h) {
    const int64_t unit = panel * Panels::kUnits;
    const auto all_rows = [&]<int kUnitVectors>() __attribute__((always_inline)) {
      constexpr int kRows = kUnitVectors == 1 ? 3 : kUnitVectors == 2 ? 2 : 1;  // side by side
      const auto some = [&]<int R, bool kWhole>() __attribute__((always_inline)) {
        some_rows<R, kUnitVectors, kWhole>(H, unit, rows, from_x, x_stride, from_h);
        rows += R;
        count -= R;
        from_x += R * x_stride;
        from_h += R * Panels::kWidth;
      };
      if (unit + kUnitVectors * kLanesA <= H) {
        while (count >= kRows) some.template operator()<kRows, true>();
        if (kRows > 2 && count == 2) some.template operator()<2, true>();
        if (kRows > 1 && count == 1) some.template operator()<1, true>();
      }
      while (count > 0) some.template operator()<1, false>();
    };
    if constexpr (Panels::kUnitVectors == 1)
      all_rows.template operator()<1>();
    else
      as_constant(Panels{H}.vectors(panel), all_rows);
  }

 private:
  // kWhole: there are as many units as the vectors hold
  template <int R, int kUnitVectors, bool kWhole>
  RNNFAST_HD static void some_rows(int64_t H, int64_t unit, const Row* rows, const A* from_x,
                                   int64_t x_stride, const A* from_h) {
    constexpr int N = R * kUnitVectors;
    const auto left = [&](int i) {
      return kWhole ? kLanesA : H - unit - i % kUnitVectors * kLanesA;
    };
    Wide<V, N> px[G], ph[G], h_prev{}, h, c{}, saved[Cell::kSaved + 1];
    unrolled<N>([&](auto i) __attribute__((always_inline)) {
      const Row& row = rows[i / kUnitVectors];
      const int64_t at = unit + i % kUnitVectors * kLanesA;
      unrolled<G>([&](auto g) __attribute__((always_inline)) {
        const int gate = (g * kUnitVectors + i % kUnitVectors) * kLanesA;
        px[g].v[i] = load(from_x + i / kUnitVectors * x_stride + gate);
        ph[g].v[i] = load(from_h + i / kUnitVectors * Panels::kWidth + gate);
      });
      if (Cell::kDirect) h_prev.v[i] = load(row.h_prev + at, left(i));
      if (Cell::kHasCell && row.c_prev) c.v[i] = load(row.c_prev + at, left(i));
    });
    Cell::template forward<Math>(px, ph, h_prev, c, h, saved);
    unrolled<N>([&](auto i) __attribute__((always_inline)) {
      const Row& row = rows[i / kUnitVectors];
      const int64_t at = unit + i % kUnitVectors * kLanesA;
      if (row.h) store_rounded<S>(row.h + at, h.v[i], left(i));
      if (Cell::kHasCell && row.c) store(row.c + at, c.v[i]);
      if (Cell::kHasCell && row.cells) store(row.cells + at, c.v[i], left(i));
      if (row.saved)
        unrolled<Cell::kSaved>([&](auto k) __attribute__((always_inline)) {
          store(row.saved + k * H + at, saved[k].v[i], left(i));
        });
    });
  }
};
