// Products of bfloat16 pairs in Intel's matrix unit (AMX). Included inside an instruction set's
// namespace.
//
// One of its eight registers holds up to 16 rows of 64 bytes: sums of 16 rows and a vector of
// columns; 16 words of k of 16 rows of the left side; or 16 words of k of a vector of columns as
// they lie in a panel. GCC's intrinsics are macros that take no template argument as the register,
// hence the assembler.
namespace matrix_unit {

inline constexpr int kRows = 16, kWords = 16;

template <int kRegister>
RNNFAST_HD void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kRegister) : "memory");
}
template <int kRegister>
RNNFAST_HD void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kRegister) : "memory");
}
template <int kRegister>
RNNFAST_HD void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}
template <int kSums, int kLeft, int kRight>
RNNFAST_HD void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

// What registers are used for, where R is 1 or 2 groups of up to 16 rows and L registers have the
// left side.
template <int R, int L = R>
struct Registers {
  static constexpr int kMostColumns = R == 1 ? 4 : 2;
  static constexpr int sums(int group, int column) { return group * kMostColumns + column; }
  static constexpr int left(int i) { return 4 + i; }
  static constexpr int right(int column) { return 4 + L + column % (4 - L); }
};

// The shapes of the registers, as the unit takes them.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // for a left side of so many rows; one group of them has `lefts` registers
  constexpr Shapes(int of_rows, int lefts) {
    for (int i = 0; i < 8; ++i) row_bytes[i] = kLineBytes, rows[i] = kWords;
    if (of_rows > kRows) {
      set<2>(0, kRows);
      set<2>(1, of_rows - kRows);
    } else {
      set<1>(0, of_rows);
      for (int i = 1; i < lefts; ++i) rows[Registers<1>::left(i)] = uint8_t(of_rows);
    }
  }

 private:
  template <int R>
  constexpr void set(int group, int of_rows) {
    rows[Registers<R>::left(group)] = uint8_t(of_rows);
    for (int c = 0; c < Registers<R>::kMostColumns; ++c)
      rows[Registers<R>::sums(group, c)] = uint8_t(of_rows);
  }
};
static_assert(sizeof(Shapes) == 64);

// for 1, 2, ... rows
template <int kLefts, int... I>
constexpr std::array<Shapes, sizeof...(I)> all_shapes(std::integer_sequence<int, I...>) {
  return {Shapes(I + 1, kLefts)...};
}
inline constexpr auto kShapes = all_shapes<1>(std::make_integer_sequence<int, 2 * kRows>());

// While it lives a thread's registers are its own, so that shapes need only be set where they
// change: that takes as long as a dozen products.
class Use {
 public:
  Use() { shapes_ = nullptr; }
  ~Use() { asm volatile("tilerelease"); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

  static void take(const Shapes& shapes) {
    if (&shapes == shapes_) return;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    shapes_ = &shapes;
  }

 private:
  static inline thread_local const Shapes* shapes_ = nullptr;
};

// The left side: rows at equal distances.
struct Left {
  const char* rows;
  int64_t stride;
};

// What is done between the steps of a tile.
class Between {
 public:
  Between(const Meanwhile& meanwhile, int64_t steps, int blocks, const void* harmless)
      : fetching_(meanwhile.ahead, steps * kWords, harmless),
        errand_(meanwhile.errand),
        pieces_(meanwhile.pieces(steps * blocks)) {}
  RNNFAST_HD void step(int lines) {
    for (int i = 0; i < lines; ++i) fetching_.fetch();
    if (pieces_ > 0) errand_->some(pieces_);
  }

 private:
  Fetching fetching_;
  Errand* errand_;
  int64_t pieces_;
};

// out (=, or += if kAdd) bias + the sums over `steps` times kWords words of k, for R groups of rows
// and C vectors of columns out of NR in a panel
template <int R, int C, int NR, bool kAdd>
RNNFAST_HD void block(int64_t steps, const Left& left, const float* panel, const float* bias,
                      float* out, int64_t row_stride, Between& between) {
  using In = Registers<R>;
  constexpr int kLanesA = kLanes<float>;
  constexpr int64_t kPanelStride = NR * kLineBytes;
  const int64_t out_stride = row_stride * int64_t(sizeof(float));
  const auto sums = [&](auto f) __attribute__((always_inline)) {
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      unrolled<C>([&](auto c) __attribute__((always_inline)) {
        f(r, c, out + r * kRows * row_stride + c * kLanesA);
      });
    });
  };
  sums([&](auto r, auto c, float* at) __attribute__((always_inline)) {
    if constexpr (kAdd)
      load<In::sums(r, c)>(at, out_stride);
    else if (bias)
      load<In::sums(r, c)>(bias + c * kLanesA, 0);
    else
      clear<In::sums(r, c)>();
  });
  const char* from = left.rows;
  for (int64_t step = 0; step < steps; ++step, from += kLineBytes, panel += kWords * NR * kLanesA) {
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      load<In::left(r)>(from + r * kRows * left.stride, left.stride);
    });
    unrolled<C>([&](auto c) __attribute__((always_inline)) {
      load<In::right(c)>(panel + c * kLanesA, kPanelStride);
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        multiply_add<In::sums(r, c), In::left(r), In::right(c)>();
      });
    });
    between.step(kWords * C / NR);
  }
  sums([&](auto r, auto c, float* at)
           __attribute__((always_inline)) { store<In::sums(r, c)>(at, out_stride); });
}

template <int R, int NR, bool kAdd>
void columns(int64_t steps, const Left& left, const float* panel, const float* bias, float* out,
             int64_t row_stride, const Meanwhile& meanwhile) {
  constexpr int kMost = Registers<R>::kMostColumns;
  constexpr int kBlocks = (NR + kMost - 1) / kMost;
  Between between(meanwhile, steps, kBlocks, left.rows);
  unrolled<kBlocks>([&](auto i) __attribute__((always_inline)) {
    constexpr int first = i * kMost, count = NR - first < kMost ? NR - first : kMost;
    const int64_t at = first * kLanes<float>;
    block<R, count, NR, kAdd>(steps, left, panel + at, bias ? bias + at : nullptr, out + at,
                              row_stride, between);
  });
}

// Whole steps of kWords words of k of a tile of up to 2 * kRows rows.
template <int NR, bool kAdd>
void tile(int rows, int64_t steps, const Left& left, const float* panel, const float* bias,
          float* out, int64_t row_stride, const Meanwhile& meanwhile) {
  Use::take(kShapes[rows - 1]);
  rows > kRows ? columns<2, NR, kAdd>(steps, left, panel, bias, out, row_stride, meanwhile)
               : columns<1, NR, kAdd>(steps, left, panel, bias, out, row_stride, meanwhile);
}

inline bool at_equal_distances(const bf16* const* rows, int count) {
  for (int i = 2; i < count; ++i)
    if (rows[i] - rows[i - 1] != rows[1] - rows[0]) return false;
  return true;
}

// The same arguments as kTiles' functions, and the number of rows.
template <int NR, bool kAdd>
void product(int rows, int64_t K, const bf16* const* a, const float* panel, const float* bias,
             float* out, int64_t row_stride, const Meanwhile& meanwhile) {
  using Op = Operand<bf16>;
  const int64_t steps = K / kWords, left_over = K % kWords;
  if (steps > 0 && at_equal_distances(a, rows)) {
    const int64_t stride = rows > 1 ? (a[1] - a[0]) * int64_t(sizeof(bf16)) : 0;
    tile<NR, kAdd>(rows, steps, {reinterpret_cast<const char*>(a[0]), stride}, panel, bias, out,
                   row_stride, meanwhile);
  } else {
    constexpr int64_t kSteps = 16;  // copied at once
    alignas(64) char copy[2 * kRows][kSteps * kLineBytes];
    for (int64_t step = 0; step < steps; step += kSteps) {
      const int64_t count = std::min(kSteps, steps - step);
      for (int i = 0; i < rows; ++i)
        __builtin_memcpy(copy[i], a[i] + step * kWords * Op::kPerWord, size_t(count * kLineBytes));
      const Left left{copy[0], kSteps * kLineBytes};
      const float* words = panel + step * kWords * NR * kLanes<float>;
      if (step == 0)
        tile<NR, kAdd>(rows, count, left, words, bias, out, row_stride, meanwhile);
      else
        tile<NR, true>(rows, count, left, words, nullptr, out, row_stride, meanwhile);
    }
  }
  if (left_over == 0 && steps > 0) return;
  const bool add = kAdd || steps > 0;
  for_row_tiles(rows, kRegisterRows<NR>, [&](int64_t first, int n) {
    const bf16* rest[kMaxTileRows];
    for (int i = 0; i < n; ++i) rest[i] = a[first + i] + steps * kWords * Op::kPerWord;
    const auto& tiles = add ? kTiles<Op, NR, true> : kTiles<Op, NR, false>;
    tiles[n - 1](left_over, rest, panel + steps * kWords * NR * kLanes<float>,
                 steps > 0 ? nullptr : bias, out + first * row_stride, row_stride, {});
  });
}

}  // namespace matrix_unit
