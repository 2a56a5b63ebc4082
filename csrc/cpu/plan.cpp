// The cost model behind a plan.
//
// A step runs on r x u threads (r row shares, u unit shares). Each thread multiplies B / r rows by
// 1 / u of the panels, and reads the weights from the cache that holds them. Three costs come on
// top:
//
// - u > 1: in every step, a barrier of u threads and the loads of the lines of h (of B / r rows)
//   that the u - 1 other threads have written. This cost grows with u and not with r x u, since
//   rows of other row shares are not read.
// - r > 1: once in a sequence, each thread reads the weights that the r - 1 others have packed.
// - r x u > 1: entering and leaving the parallel region.
//
// Examples, computed with this model: a barrier takes 300, 600, 900, 1200 cycles for 2, 4, 8, 16
// threads; a vector of weights takes 2.1 cycles from L2 (1 MiB) and 2.9 from L3.
//
// LSTM with B = 8 and H = 1024 on 16 threads, in thousand cycles per step. W_hh has 16 MiB in 64
// panels.
//
//   grid    work of a thread                            products   exchange of h
//   8 x 1   64 panels for 1 row, all from L3                 768   none; 8 threads are idle
//   1 x 16  4 panels for 8 rows, in two tiles                 84   72, for 480 lines
//   2 x 8   8 panels for 4 rows, read by both row shares      99   26, for 224 lines
//
// The same with H = 256: W_hh has 1 MiB in 16 panels, and a unit share of it fits L2.
//
//   8 x 1   16 panels for 1 row                               49   none; 8 threads are idle
//   1 x 16  1 panel for 8 rows                                 5   20, for 120 lines
//   2 x 8   2 panels for 4 rows                                5    8, for 56 lines
//
// Splitting rows alone leaves threads idle. Splitting units alone makes every thread fetch all of
// h. A grid fetches only what its rows need, but each of its row shares reads all weights from L3.
//
// NUMA: a thread touches its part of the workspace first, so the pages are on its own node. Packed
// weights are shared: each thread packs an equal part, so they are spread evenly over the nodes.
#include "cpu/plan.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace rnnfast::cpu {
namespace {

double step_cycles(const StepShape& s, int64_t rows, int64_t panels, const Machine& machine) {
  const int64_t vector_bytes = s.lanes * s.weight_bytes;
  const int64_t bytes = panels * s.vectors * s.depth * vector_bytes;
  const double line = bytes <= kL1Bytes                   ? kL1Vector
                      : bytes <= machine.l2_bytes * 3 / 4 ? kL2Vector
                                                          : machine.l3_line_cycles;
  const double load = line * std::max(1.0, double(vector_bytes) / double(kLineBytes));
  const int64_t tiles = ceil_div(rows, s.tile_rows);
  // Cycles of one tile per vector and word; tiles are nearly equally high.
  const double products = s.row_cycles * std::max(double(s.min_rows), double(rows) / double(tiles));
  const double first = std::max(products, load);  // the first tile loads the panel
  const double rest = std::max(products, kL1Vector) * double(tiles - 1);
  return double(panels) *
         (double(s.depth) * s.vectors * (first + rest) + s.cell_cycles * double(rows));
}

// The cycles in which a thread reads, once in a sequence, the weights that other threads have
// packed: its unit share, without the part that it packed itself. This decides about short
// sequences. A line that another core has just written comes from L3 or, if the cores are far
// apart, from further away.
double packed_weight_cycles(const Sizes& size, const StepShape& s, int r, int u,
                            const Machine& machine) {
  const double of_h = double(s.panels) * s.vectors * double(s.depth);
  const double all = of_h * double(size.H + size.I) / double(size.H);
  return all / u * (r - 1) / r *
         std::max(machine.l3_line_cycles,
                  kBarrierOfLine * std::min(kFarBarrier, machine.barrier_cycles(r * u)));
}

// The extra cycles of a step in which u threads share the same rows: they wait for each other, and
// each fetches the part of the lhs that the others have written.
double exchange(const StepShape& s, int64_t rows, int u, const Machine& machine) {
  const double lines = double(rows * s.depth * s.weight_bytes) / double(kLineBytes) * (u - 1) / u;
  const double barrier = machine.barrier_cycles(u);
  const double line =
      std::max(s.exchange_cycles, kBarrierOfRowLine * std::min(kFarBarrier, barrier));
  return kExchange * barrier + line * lines;
}

struct Grid {
  int row_shares, unit_shares;
  double cycles;

  int threads() const { return row_shares * unit_shares; }
};

class Search {
 public:
  Search(const Sizes& size, const StepShape& step, const Machine& machine)
      : size_(size), step_(step), machine_(machine) {
    best_ = {1, 1, double(size.T) * step_cycles(step, step.rows, step.panels, machine)};
    for (int n = 2; n <= machine.threads;
         n = n < machine.threads ? std::min(2 * n, machine.threads) : n + 1) {
      for (int r = n; r >= 1; --r)
        if (n % r == 0) consider(r, n / r);
      // One row per row share, with the remaining threads splitting the units.
      if (0 < step.rows && step.rows < n && n % step.rows != 0)
        consider(int(step.rows), n / int(step.rows));
    }
  }
  Grid best() const { return best_; }

 private:
  void consider(int r, int u) {
    const StepShape& s = step_;
    if (r > s.rows || u > s.panels || (u > 1 && s.whole_rows)) return;
    const int64_t rows = ceil_div(s.rows, r), panels = ceil_div(s.panels, u);
    double cycles = kRegion + double(size_.T) * step_cycles(s, rows, panels, machine_);
    if (cycles >= best_.cycles) return;
    if (r > 1) cycles += packed_weight_cycles(size_, s, r, u, machine_);
    if (u > 1) cycles += double(size_.T) * exchange(s, rows, u, machine_);
    if (cycles < best_.cycles) best_ = {r, u, cycles};
  }

  const Sizes& size_;
  const StepShape& step_;
  const Machine& machine_;
  Grid best_;
};

Grid choose_grid(const Sizes& size, const StepShape& step, const Machine& machine) {
  return Search(size, step, machine).best();
}

}  // namespace

BarrierCycles BarrierCycles::constant(double cycles) {
  BarrierCycles all;
  all.of_doublings.fill(cycles);
  return all;
}

BarrierCycles BarrierCycles::typical() {
  BarrierCycles all;
  for (int k = 0; k < kSizes; ++k)
    all.of_doublings[size_t(k)] = kTypicalBarrier + kBarrierPerDoubling * std::max(0, k - 1);
  return all;
}

double BarrierCycles::operator()(int threads) const {
  const int k = std::bit_width(unsigned(threads - 1));
  return of_doublings[size_t(std::min(k, kSizes - 1))];
}

int64_t BarrierCycles::key() const {
  int64_t key = 0;
  for (const double cycles : of_doublings)  // the low five bits of each exponent
    key = key << 5 | int64_t(std::bit_cast<uint64_t>(cycles) >> 52 & 31);
  return key;
}

Plan plan_forward(const Sizes& size, const StepShape& step, bool pack, const Machine& machine,
                  int64_t max_steps) {
  const Grid grid = choose_grid(size, step, machine);
  const int64_t T = std::max<int64_t>(1, size.T), B = std::max<int64_t>(1, size.B);
  const int64_t rows = ceil_div(B, grid.row_shares);
  const int64_t panels = ceil_div(step.panels, grid.unit_shares);
  const int64_t row_bytes = panels * step.vectors * step.lanes * step.element_bytes;
  Plan plan{.threads = grid.threads(),
            .row_shares = grid.row_shares,
            .unit_shares = grid.unit_shares,
            .input = pack ? Packing::kOnce : Packing::kNone,
            .hidden = pack ? Packing::kOnce : Packing::kNone,
            .block_steps = T,
            .cycles = grid.cycles};
  // With few rows the input projection of the whole sequence is one block, so each panel of W_ih is
  // used once and need not be kept. The same holds for W_hh if there is a single step.
  const bool few_rows = T == 1 || T * rows * row_bytes <= kWholeProjectionBytes;
  if (!plan.by_rows() && T <= max_steps && few_rows) {
    if (pack) plan.input = Packing::kPanelwise;
    if (pack && T == 1) plan.hidden = Packing::kPanelwise;
    return plan;
  }
  // Otherwise a projected block should stay in L2, yet have enough rows to reuse each panel of
  // W_ih.
  const int64_t fitting = machine.l2_bytes / 4 / (rows * row_bytes);
  const int64_t useful = ceil_div(4 * step.tile_rows, rows);
  plan.block_steps = std::clamp<int64_t>(std::max(fitting, useful), 1, std::min(T, max_steps));
  return plan;
}

Plan plan_backward(const Sizes& size, const StepShape& step, const Machine& machine) {
  const Grid grid = choose_grid(size, step, machine);
  Plan plan{
      .threads = grid.threads(),
      .row_shares = grid.row_shares,
      .unit_shares = grid.unit_shares,
      .input = Packing::kOnce,
      .hidden = Packing::kOnce,
      .block_steps = std::clamp<int64_t>(ceil_div(kGradientRows, std::max<int64_t>(size.B, 1)), 1,
                                         std::max<int64_t>(1, size.T)),
      .cycles = grid.cycles};
  const double products = double(size.T) * double(size.B) * double(step.depth) * step.row_cycles *
                          double(size.H + size.I) / step.lanes;
  if (plan.threads == 1 && products > kProductsForAllThreads * kRegion)
    plan.threads = machine.threads;
  // Panels that are used once are packed just before, or not at all (Columns::reads_in_place):
  // those of W_ih if there is a single block, those of W_hh if there is a single step.
  const int64_t panels = ceil_div(size.I, int64_t(step.vectors) * step.lanes);
  if (plan.block_steps >= size.T && panels >= plan.threads) plan.input = Packing::kPanelwise;
  if (size.T == 1 && !plan.by_rows()) plan.hidden = Packing::kPanelwise;
  return plan;
}

Ragged Arrangement::view() const {
  const auto pointer = [](const std::vector<int64_t>& v) { return v.empty() ? nullptr : v.data(); };
  return {pointer(lengths), pointer(places), pointer(rows), pointer(offsets)};
}

void Arrangement::use_one_thread() {
  std::vector<int64_t> of_sequences;
  for (const int64_t row : rows) of_sequences.push_back(lengths[row]);
  distribute(of_sequences, 1);
}

void Arrangement::distribute(std::span<const int64_t> of_sequences, int64_t shares) {
  const int64_t B = int64_t(of_sequences.size());
  std::vector<int64_t> falling(of_sequences.size());
  std::iota(falling.begin(), falling.end(), 0);
  std::stable_sort(falling.begin(), falling.end(),
                   [&](int64_t a, int64_t b) { return of_sequences[a] > of_sequences[b]; });
  lengths.resize(of_sequences.size());
  places.resize(of_sequences.size());
  rows.resize(of_sequences.size());
  // Round-robin over the shares of the rows; their limits are those of Team::share_rows.
  auto next = falling.begin();
  for (int64_t i = 0; next != falling.end(); ++i)
    for (int64_t share = 0; share < shares; ++share)
      if (const int64_t row = B * share / shares + i; row < B * (share + 1) / shares)
        places[row] = *next++;
  for (int64_t row = 0; row < B; ++row) {
    lengths[row] = of_sequences[places[row]];
    rows[places[row]] = row;
  }
}

Arrangement arrange(std::span<const int64_t> lengths, bool packed, int64_t T, const Plan& plan) {
  Arrangement result;
  result.distribute(lengths, plan.row_shares);
  if (!packed) return result;
  result.offsets.resize(T);
  int64_t at = 0, running = int64_t(lengths.size());
  for (int64_t t = 0; t < T; at += running, ++t) {
    while (running > 0 && lengths[running - 1] <= t) --running;  // packed lengths do not increase
    result.offsets[t] = at;
  }
  return result;
}

int side_by_side(int count, int threads, int64_t stacked_steps, std::span<const double> cycles) {
  const auto group = [&](int layers) {
    const double blocks = double(std::min(kStackBlocks, stacked_steps));
    const double waiting = blocks > 0 ? double(layers - 1) / blocks : 0;
    return (layers > 1 ? kRegion : 0) + cycles[size_t(layers - 1)] * (1 + waiting);
  };
  int best = 1;
  double best_cycles = count * group(1);
  for (int n = 2; n <= std::min(count, threads); ++n) {
    const double all = count / n * group(n) + (count % n ? group(count % n) : 0);
    if (all < best_cycles) best = n, best_cycles = all;
  }
  return best;
}

}  // namespace rnnfast::cpu
