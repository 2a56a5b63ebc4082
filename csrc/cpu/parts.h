// Products of floats in the matrix unit, each float as the sum of three bfloat16. Included inside
// an instruction set's namespace.
//
// A float has 24 bits and a bfloat16 8, so that a = a0 + a1 + a2 without an error, each part being
// what the ones before leave, rounded. Of the nine products of parts the six that may reach the
// last bit of a float are summed, a0 b0 last: a0 b2, a0 b1, a1 b1, a1 b0, a2 b0, a0 b0. They are
// exact and the unit sums in float. (Henry, Tang, Heinecke: Leveraging the bfloat16 artificial
// intelligence datatype for higher-precision computations, 2019.)
//
// Infinite numbers and NaN have no such parts, nor have numbers that round to infinity as a
// bfloat16: products that meet one are NaN. Parts below 2^-126 are taken as zero.
template <>
inline constexpr bool kHasParts<Operand<float>> = true;

template <>
struct Parts<Operand<float>> {
  using V = Vec<float>;
  static constexpr int kParts = 3;
  static constexpr int kLanesA = kLanes<float>;
  static constexpr int64_t kStep = 2 * kLanesA;  // elements of k that the unit takes at once
  static constexpr int64_t kRowStep = kParts * kLanesA;  // floats' memory that they take in a row
  static constexpr int64_t kBlock = kLanesA * kLanesA;  // and in a panel, for a vector and a part
  static constexpr int kTileRows = 2 * matrix_unit::kRows;
  // for the planner
  static constexpr double kRowCycles = 0.22;
  static constexpr double kExchangeCycles = 60;
  static constexpr int kLeastRows = 14;
  static constexpr int kWeightBytes = kParts * 2;

  // Whether parts are worth splitting for, as measured: where weights (K, columns) are multiplied
  // by so many rows in each of the steps; by all rows at once; and in sums over rows, which make
  // gradients of such weights. By sizes alone, for results must not depend on the number of
  // threads.
  static constexpr bool pay_in_steps(int64_t rows, int64_t steps, int64_t K, int64_t columns) {
    return rows >= 12 && steps * rows >= least_uses(K, columns) && K >= 24 && columns >= 48;
  }
  static constexpr bool pay_at_once(int64_t rows, int64_t K, int64_t columns) {
    return pay_in_steps(rows, 1, K, columns) && rows * K * columns >= kLeastWork;
  }
  static constexpr bool pay_in_gradients(int64_t rows, int64_t K, int64_t columns) {
    return rows >= 96 && rows * K * columns >= kLeastWork;
  }

  static constexpr int64_t steps(int64_t K) { return ceil_div(K, kStep); }
  // In memory, of a left side's row, [step][part][kStep], and of a panel, [step][vector][part] and
  // then words of two elements of k, [word][lane]. Zeros complete the last step. A row is a vector
  // longer, as rows at multiples of 4 KiB would compete for the same lines of L1.
  static constexpr int64_t row_size(int64_t K) { return steps(K) * kRowStep + kLanesA; }
  static constexpr int64_t row_offset(int64_t k) { return k / kStep * kRowStep; }  // whole steps
  static constexpr int64_t panel_size(int vectors, int64_t K) {
    return steps(K) * vectors * kParts * kBlock;
  }

  // 32 consecutive numbers
  struct Words {
    V part[kParts];
  };
  RNNFAST_HD static Words split(V first, V second) {
    Words words;
    unrolled<kParts>([&](auto p) __attribute__((always_inline)) {
      words.part[p] = bit_cast<V>(_mm512_cvtne2ps_pbh(__m512(second), __m512(first)));
      const auto [low, high] = decoded(words.part[p]);
      first -= low;
      second -= high;
    });
    return words;
  }
  // the first n of them, zeros in place of the others
  RNNFAST_HD static Words split_first(V first, V second, int64_t n) {
    if (n >= kStep) return split(first, second);
    const auto mask = n <= 0 ? 0 : (uint64_t(1) << n) - 1;
    return split(V(_mm512_maskz_mov_ps(__mmask16(mask), __m512(first))),
                 V(_mm512_maskz_mov_ps(__mmask16(mask >> kLanesA), __m512(second))));
  }
  RNNFAST_HD static void store_words(const Words& words, float* to, int64_t distance) {
    unrolled<kParts>(
        [&](auto p) __attribute__((always_inline)) { store(to + p * distance, words.part[p]); });
  }
  // whether all have parts
  RNNFAST_HD static bool finite(const Words& words) {
    const __m512i infinite = _mm512_set1_epi16(0x7f80);
    const __m512i exponents = _mm512_and_si512(__m512i(words.part[0]), infinite);
    return _mm512_cmpeq_epi16_mask(exponents, infinite) == 0;
  }

  // Whether all of the row has parts.
  static bool split_row(const float* from, int64_t K, float* to) {
    bool all_finite = true;
    for (int64_t k = 0; k < K; k += kStep, to += kRowStep) {
      const Words words = split(load(from + k, K - k), load(from + k + kLanesA, K - k - kLanesA));
      store_words(words, to, kLanesA);
      all_finite = all_finite && finite(words);
    }
    return all_finite;
  }

  // the sum of a row's numbers of one step
  RNNFAST_HD static V sum_of_step(const float* row) {
    V sum{};
    unrolled<kParts>([&](auto p) __attribute__((always_inline)) {
      const auto [low, high] = decoded(load(row + p * kLanesA));
      sum += low + high;
    });
    return sum;
  }

  // Vector j of a panel of so many vectors, from rows along k: source(lane), null for zeros.
  // Whether all has parts.
  template <class Source>
  static bool pack_transposed(Source&& source, int64_t K, float* panel, int j, int vectors) {
    bool all_finite = true;
    float* to = panel + j * kParts * kBlock;
    const int64_t pitch = vectors * kParts * kBlock;
    const float* from[kLanesA];
    for (int i = 0; i < kLanesA; ++i) from[i] = source(i);
    for (int64_t k = 0; k < K; k += kStep, to += pitch) {
      V squares[kParts][kLanesA];
      for (int i = 0; i < kLanesA; ++i) {
        const Words words =
            from[i] ? split(load(from[i] + k, K - k), load(from[i] + k + kLanesA, K - k - kLanesA))
                    : Words{};
        all_finite = all_finite && finite(words);
        for (int p = 0; p < kParts; ++p) squares[p][i] = words.part[p];
      }
      for (int p = 0; p < kParts; ++p) {
        transpose<float>(squares[p]);
        for (int i = 0; i < kLanesA; ++i) store(to + p * kBlock + i * kLanesA, squares[p][i]);
      }
    }
    return all_finite;
  }

  // A panel from rows of columns: source(k), null for zeros; columns at and beyond `columns` are
  // zeros.
  template <class Source>
  static void pack_rows(Source&& source, int64_t K, int64_t column, int64_t columns, int vectors,
                        float* panel) {
    for (int64_t k = 0; k < K; k += kStep, panel += vectors * kParts * kBlock) {
      for (int i = 0; i < kLanesA; ++i) {
        const int64_t at = k + 2 * i;
        const float* even = at < K ? source(at) : nullptr;
        const float* odd = at + 1 < K ? source(at + 1) : nullptr;
        for (int j = 0; j < vectors; ++j) {
          const int64_t first = column + j * kLanesA, left = columns - first;
          const Words words =
              split(even ? load(even + first, left) : V{}, odd ? load(odd + first, left) : V{});
          unrolled<kParts>([&](auto p) __attribute__((always_inline)) {
            store(panel + (j * kParts + p) * kBlock + i * kLanesA, in_pairs(words.part[p]));
          });
        }
      }
    }
  }

  // out = bias + a panel, or out += a panel, for up to kTileRows rows at equal distances
  template <int NR, bool kAdd>
  static void product(int rows, int64_t K, const float* const* a, const float* panel,
                      const float* bias, float* out, int64_t row_stride,
                      const Meanwhile& meanwhile) {
    const int64_t stride = rows > 1 ? (a[1] - a[0]) * int64_t(sizeof(float)) : 0;
    matrix_unit::Left left{reinterpret_cast<const char*>(a[0]), stride};
    matrix_unit::Use::take(kShapes[rows - 1]);
    const int64_t all = steps(K);
    for (int64_t step = 0; step == 0 || step < all; step += kChainSteps) {
      const int64_t count = std::min(kChainSteps, all - step);
      if (step == 0 && !kAdd)
        columns<NR, false>(rows, count, left, panel, bias, out, row_stride, meanwhile);
      else
        columns<NR, true>(rows, count, left, panel, nullptr, out, row_stride,
                          {step == 0 ? meanwhile.ahead : Ahead{}, meanwhile.errand});
      left.rows += count * kRowStep * int64_t(sizeof(float));
      panel += panel_size(NR, count * kStep);
    }
  }

 private:
  static constexpr int64_t kLeastWork = 6'000'000;
  static constexpr int64_t least_uses(int64_t K, int64_t columns) {
    return K * columns >= 256 * 256 ? 96 : 192;
  }

  // One chain of more steps would lose bits.
  static constexpr int64_t kChainSteps = 16;
  static constexpr auto kShapes =
      matrix_unit::all_shapes<kParts>(std::make_integer_sequence<int, kTileRows>());

  struct Decoded {
    V low, high;
  };
  RNNFAST_HD static Decoded decoded(V words) {
    const __m512i bits = __m512i(words);
    const auto half = [](__m256i one) __attribute__((always_inline)) {
      return V(_mm512_slli_epi32(_mm512_cvtepu16_epi32(one), 16));
    };
    return {half(_mm512_castsi512_si256(bits)), half(_mm512_extracti64x4_epi64(bits, 1))};
  }
  // element i beside element 16 + i
  RNNFAST_HD static V in_pairs(V words) {
    alignas(64) static constexpr auto kOrder = [] {
      std::array<uint16_t, 2 * kLanesA> order{};
      for (int i = 0; i < kLanesA; ++i)
        order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(kLanesA + i);
      return order;
    }();
    return V(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder.data()), __m512i(words)));
  }

  template <int NR, bool kAdd>
  RNNFAST_HD static void columns(int rows, int64_t steps, const matrix_unit::Left& left,
                                 const float* panel, const float* bias, float* out,
                                 int64_t row_stride, const Meanwhile& meanwhile) {
    rows > matrix_unit::kRows
        ? columns_of<2, NR, kAdd>(rows, steps, left, panel, bias, out, row_stride, meanwhile)
        : columns_of<1, NR, kAdd>(rows, steps, left, panel, bias, out, row_stride, meanwhile);
  }
  template <int R, int NR, bool kAdd>
  static void columns_of(int rows, int64_t steps, const matrix_unit::Left& left, const float* panel,
                         const float* bias, float* out, int64_t row_stride,
                         const Meanwhile& meanwhile) {
    constexpr int kMost = Registers<R>::kMostColumns, kBlocks = (NR + kMost - 1) / kMost;
    Between between(meanwhile, steps * kBlocks, kRounds<R>);
    unrolled<kBlocks>([&](auto i) __attribute__((always_inline)) {
      constexpr int first = i * kMost, count = NR - first < kMost ? NR - first : kMost;
      const int64_t at = first * kLanesA;
      block<R, count, NR, kAdd>(rows, steps, left, panel + first * kParts * kBlock,
                                bias ? bias + at : nullptr, out + at, row_stride, between);
    });
  }

  // With one group of rows all parts of the left side have registers, with two only one.
  template <int R>
  using Registers = matrix_unit::Registers<R, R == 1 ? kParts : R>;
  template <int R>
  static constexpr int kRounds = R == 1 ? 3 : 6;  // of a step, after which lines are fetched

  // What is done between the steps of a tile, and between the rounds of a step. Several lines are
  // fetched after each round; none where there would be so many that they took longer than they
  // save.
  class Between {
   public:
    Between(const Meanwhile& meanwhile, int64_t steps, int rounds)
        : next_(static_cast<const char*>(meanwhile.ahead.from)),
          lines_(
              ceil_div(meanwhile.ahead.bytes, std::max<int64_t>(steps * rounds, 1) * kLineBytes)),
          errand_(meanwhile.errand),
          pieces_(meanwhile.pieces(steps)) {
      constexpr int64_t kMost = 8;
      if (lines_ > kMost) lines_ = 0;
    }
    RNNFAST_HD void round() {
      for (int64_t i = 0; i < lines_; ++i, next_ += kLineBytes) __builtin_prefetch(next_, 0, 2);
    }
    RNNFAST_HD void step() {
      if (pieces_ > 0) errand_->some(pieces_);
    }

   private:
    const char* next_;
    int64_t lines_;
    Errand* errand_;
    int64_t pieces_;
  };

  // R groups of rows and C vectors of columns out of NR in a panel
  template <int R, int C, int NR, bool kAdd>
  RNNFAST_HD static void block(int rows, int64_t steps, const matrix_unit::Left& left,
                               const float* panel, const float* bias, float* out,
                               int64_t row_stride, Between& between) {
    using In = Registers<R>;
    const auto sums = [&](auto f) __attribute__((always_inline)) {
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        unrolled<C>([&](auto c) __attribute__((always_inline)) { f(r, c); });
      });
    };
    sums([&](auto r, auto c) __attribute__((always_inline)) {
      if (!kAdd && bias)
        matrix_unit::load<In::sums(r, c)>(bias + c * kLanesA, 0);
      else
        matrix_unit::clear<In::sums(r, c)>();
    });
    const char* from = left.rows;
    for (int64_t step = 0; step < steps; ++step) {
      const auto load_left = [&](auto i, int part) __attribute__((always_inline)) {
        const int group = R == 1 ? 0 : int(i);
        matrix_unit::load<In::left(i)>(
            from + part * kLineBytes + group * matrix_unit::kRows * left.stride, left.stride);
      };
      const auto load_right = [&](auto c, int part) __attribute__((always_inline)) {
        matrix_unit::load<In::right(c)>(panel + (c * kParts + part) * kBlock, kLineBytes);
      };
      if constexpr (R == 1) {
        unrolled<kParts>([&](auto p) __attribute__((always_inline)) { load_left(p, p); });
        unrolled<kParts>([&](auto round) __attribute__((always_inline)) {
          unrolled<C>([&](auto c) __attribute__((always_inline)) {
            load_right(c, kParts - 1 - round);
            unrolled<round + 1>([&](auto i) __attribute__((always_inline)) {
              constexpr int left = round < 2 ? i : (i + 1) % kParts;
              matrix_unit::multiply_add<In::sums(0, c), In::left(left), In::right(c)>();
            });
          });
          between.round();
        });
      } else {
        // pairs of parts that differ from the pair before on one side
        constexpr int kLeft[] = {0, 0, 1, 1, 2, 0}, kRight[] = {2, 1, 1, 0, 0, 0};
        unrolled<kRounds<R>>([&](auto round) __attribute__((always_inline)) {
          constexpr bool kFirst = round == 0;
          constexpr int kBefore = kFirst ? 0 : round - 1;
          if (kFirst || kLeft[round] != kLeft[kBefore])
            unrolled<R>([&](auto r) __attribute__((always_inline)) { load_left(r, kLeft[round]); });
          unrolled<C>([&](auto c) __attribute__((always_inline)) {
            if (kFirst || kRight[round] != kRight[kBefore]) load_right(c, kRight[round]);
            unrolled<R>([&](auto r) __attribute__((always_inline)) {
              matrix_unit::multiply_add<In::sums(r, c), In::left(r), In::right(c)>();
            });
          });
          between.round();
        });
      }
      between.step();
      from += kRowStep * int64_t(sizeof(float));
      panel += NR * kParts * kBlock;
    }
    constexpr int64_t kPitch = C * kLanesA;
    alignas(64) float part[kAdd ? R * matrix_unit::kRows * kPitch : 1];
    const int64_t pitch = kAdd ? kPitch : row_stride;
    float* to = kAdd ? part : out;
    sums([&](auto r, auto c) __attribute__((always_inline)) {
      matrix_unit::store<In::sums(r, c)>(to + r * matrix_unit::kRows * pitch + c * kLanesA,
                                         pitch * int64_t(sizeof(float)));
    });
    for (int i = 0; kAdd && i < rows; ++i)
      for (int c = 0; c < C; ++c) {
        float* sum = out + i * row_stride + c * kLanesA;
        store(sum, load(sum) + load(part + i * kPitch + c * kLanesA));
      }
  }
};
