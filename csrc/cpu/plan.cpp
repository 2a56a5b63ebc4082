#include "cpu/plan.h"

#include <algorithm>
#include <numeric>

namespace rnnfast::cpu {
namespace {

// Rough costs in cycles; only their ratios matter. Measured on Zen 4, see csrc/README.md.
constexpr double kRegion = 5000;
constexpr double kExchange = 2.5;  // barriers: a step waits, then fetches what others have written
constexpr double kBarrierOfLine = 0.02;  // a line from another core, one of many, in barriers
constexpr double kBarrierOfRowLine = 0.12;  // the same, of a few rows, which come side by side
constexpr double kFarBarrier = 2000;  // a longer one waits for a core that is not free
constexpr double kL1Vector = 1, kL2Vector = 2.1;  // to load one vector of weights, up to a line
constexpr int64_t kL1Bytes = 24 * 1024;

// A projection of the whole sequence may take this much memory: read once, it only passes the
// caches.
constexpr int64_t kWholeProjectionBytes = 4 << 20;

double step_cycles(const StepShape& s, int64_t rows, int64_t panels, const Machine& machine) {
  const int64_t vector_bytes = s.lanes * s.weight_bytes;
  const int64_t bytes = panels * s.vectors * s.depth * vector_bytes;
  const double line = bytes <= kL1Bytes ? kL1Vector
                      : bytes <= machine.l2_bytes * 3 / 4
                          ? kL2Vector
                          : machine.l3_line_cycles(machine.l2_bytes);
  const double load = line * std::max(1.0, double(vector_bytes) / double(kLineBytes));
  const int64_t tiles = ceil_div(rows, s.tile_rows);
  // of a tile; they are nearly equally high
  const double products =
      s.row_cycles * std::max(double(s.least_rows), double(rows) / double(tiles));
  const double first = std::max(products, load);  // brings in the panel
  const double rest = std::max(products, kL1Vector) * double(tiles - 1);
  return double(panels) *
         (double(s.depth) * s.vectors * (first + rest) + s.cell_cycles * double(rows));
}

// Where rows are dealt every thread reads all weights, also those that others have packed, and
// where units are dealt only its own: the difference, once in a sequence, decides short ones. A
// line that another core has just written comes from L3 or, where cores are far apart, from further
// away.
double others_weights(const Sizes& size, const StepShape& s, int threads, const Machine& machine) {
  const double of_h = double(s.panels) * s.vectors * double(s.depth);
  const double all = of_h * double(size.H + size.I) / double(size.H);
  return all * (threads - 1) / threads *
         std::max(machine.l3_line_cycles(machine.l2_bytes),
                  kBarrierOfLine * std::min(kFarBarrier, machine.barrier_cycles(threads)));
}

struct Choice {
  int threads;
  Split split;
  double cycles;
};

Choice choose_split(const Sizes& size, const StepShape& s, const Machine& machine) {
  Choice best{1, Split::kNone, double(size.T) * step_cycles(s, s.rows, s.panels, machine)};
  for (int n = 2; n <= machine.threads;
       n = n < machine.threads ? std::min(2 * n, machine.threads) : n + 1) {
    double by_rows =
        kRegion + double(size.T) * step_cycles(s, ceil_div(s.rows, n), s.panels, machine);
    if (n <= s.rows && by_rows < best.cycles) {
      by_rows += others_weights(size, s, n, machine);
      if (by_rows < best.cycles) best = {n, Split::kRows, by_rows};
    }
    double by_units =
        kRegion + double(size.T) * step_cycles(s, s.rows, ceil_div(s.panels, n), machine);
    if (n > s.panels || by_units >= best.cycles) continue;
    // of the left side, of which a thread has written its own part
    const double lines =
        double(s.rows * s.depth * s.weight_bytes) / double(kLineBytes) * (n - 1) / n;
    const double barrier = machine.barrier_cycles(n);
    const double line =
        std::max(s.exchange_cycles, kBarrierOfRowLine * std::min(kFarBarrier, barrier));
    by_units += double(size.T) * (kExchange * barrier + line * lines);
    if (by_units < best.cycles) best = {n, Split::kUnits, by_units};
  }
  return best;
}

}  // namespace

Plan plan_forward(const Sizes& size, const StepShape& step, bool pack, const Machine& machine,
                  int64_t most_steps) {
  const Choice choice = choose_split(size, step, machine);
  const bool by_rows = choice.split == Split::kRows;
  const int64_t T = std::max<int64_t>(1, size.T), B = std::max<int64_t>(1, size.B);
  const int64_t rows = by_rows ? ceil_div(B, choice.threads) : B;
  const int64_t panels =
      choice.split == Split::kUnits ? ceil_div(step.panels, choice.threads) : step.panels;
  const int64_t row_bytes = panels * step.vectors * step.lanes * step.element_bytes;

  // With few rows the whole sequence is projected at once, and W_ih need not be kept packed; nor
  // W_hh where there is only one step.
  const bool few_rows = T == 1 || T * rows * row_bytes <= kWholeProjectionBytes;
  if (!by_rows && T <= most_steps && few_rows) {
    return {choice.threads,
            choice.split,
            pack ? Packing::kPanelwise : Packing::kNone,
            !pack    ? Packing::kNone
            : T == 1 ? Packing::kPanelwise
                     : Packing::kOnce,
            T,
            choice.cycles};
  }
  // Else the projected block should stay in L2, yet be high enough to reuse each panel of W_ih.
  const int64_t fitting = machine.l2_bytes / 4 / (rows * row_bytes);
  const int64_t useful = ceil_div(4 * step.tile_rows, rows);
  const int64_t steps = std::clamp<int64_t>(std::max(fitting, useful), 1, std::min(T, most_steps));
  const Packing packing = pack ? Packing::kOnce : Packing::kNone;
  return {choice.threads, choice.split, packing, packing, steps, choice.cycles};
}

Plan plan_backward(const Sizes& size, const StepShape& step, const Machine& machine) {
  const Choice choice = choose_split(size, step, machine);
  // The weight gradients sum over the rows of a block: enough of them to pay for reading and
  // writing the gradient, few enough for the gate gradients to stay in cache.
  constexpr int64_t kBlockRows = 512;
  const int64_t steps = std::clamp<int64_t>(ceil_div(kBlockRows, std::max<int64_t>(size.B, 1)), 1,
                                            std::max<int64_t>(1, size.T));
  // Products over the whole sequence use every thread even where the recurrence cannot.
  const double products = double(size.T) * double(size.B) * double(step.depth) * step.row_cycles *
                          double(size.H + size.I) / step.lanes;
  const int threads = choice.threads > 1        ? choice.threads
                      : products > 40 * kRegion ? machine.threads
                                                : 1;
  // What has a single use is packed panel by panel for it: W_ih in a single block, W_hh in a single
  // step.
  const int64_t panels = ceil_div(size.I, int64_t(step.vectors) * step.lanes);
  const Packing input = steps >= size.T && panels >= threads ? Packing::kPanelwise : Packing::kOnce;
  const Packing hidden =
      size.T == 1 && choice.split != Split::kRows ? Packing::kPanelwise : Packing::kOnce;
  return {threads, choice.split, input, hidden, steps, choice.cycles};
}

Ragged Arrangement::view() const {
  const auto pointer = [](const std::vector<int64_t>& v) { return v.empty() ? nullptr : v.data(); };
  return {pointer(lengths), pointer(places), pointer(rows), pointer(offsets)};
}

void Arrangement::give_to_one_thread() {
  std::vector<int64_t> of_sequences;
  for (const int64_t row : rows) of_sequences.push_back(lengths[row]);
  deal(of_sequences, 1);
}

void Arrangement::deal(std::span<const int64_t> of_sequences, int64_t shares) {
  const int64_t B = int64_t(of_sequences.size());
  std::vector<int64_t> falling(of_sequences.size());
  std::iota(falling.begin(), falling.end(), 0);
  std::stable_sort(falling.begin(), falling.end(),
                   [&](int64_t a, int64_t b) { return of_sequences[a] > of_sequences[b]; });
  lengths.resize(of_sequences.size());
  places.resize(of_sequences.size());
  rows.resize(of_sequences.size());
  // in turn to each thread's share of the rows, as Team::share has it
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
  result.deal(lengths, plan.split == Split::kRows ? plan.threads : 1);
  if (!packed) return result;
  result.offsets.resize(T);
  int64_t at = 0, running = int64_t(lengths.size());
  for (int64_t t = 0; t < T; at += running, ++t) {
    while (running > 0 && lengths[running - 1] <= t) --running;  // packed lengths fall
    result.offsets[t] = at;
  }
  return result;
}

int side_by_side(int count, int threads, int64_t stacked_steps,
                 const std::function<double(int threads)>& cycles) {
  const auto group = [&](int layers) {
    const double blocks = double(std::min(kStackBlocks, stacked_steps));
    const double waiting = blocks > 0 ? double(layers - 1) / blocks : 0;
    return (layers > 1 ? kRegion : 0) + cycles(threads / layers) * (1 + waiting);
  };
  int best = 1;
  double least = count * group(1);
  for (int n = 2; n <= std::min(count, threads); ++n) {
    const double all = count / n * group(n) + (count % n ? group(count % n) : 0);
    if (all < least) best = n, least = all;
  }
  return best;
}

}  // namespace rnnfast::cpu
