// The planner: decides how the work on one sequence is split across threads and blocks of steps. It
// is a pure function of the sizes, the instruction set and the numbers in Machine.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "arguments.h"
#include "cpu/microkernels.h"

namespace rnnfast::cpu {

// The cycles of a barrier by the number of threads: entry k is for up to 2^k threads.
struct BarrierCycles {
  static constexpr int kSizes = 11;
  std::array<double, kSizes> of_doublings{};

  // The same cost for every number of threads.
  static BarrierCycles constant(double cycles);
  // Typical costs, for when nothing has been measured.
  static BarrierCycles typical();
  double operator()(int threads) const;
  // A key for caches of plans. It distinguishes costs that are powers of two or 0, as measured
  // costs are.
  int64_t key() const;
};

struct Machine {
  int threads;
  int64_t l2_bytes;  // per core
  double l3_line_cycles;  // to load a cache line that is not in L2
  BarrierCycles barrier_cycles;

  Machine with(int other_threads) const {
    Machine part = *this;
    part.threads = other_threads;
    return part;
  }
};

// The measured cycles of barriers of up to this many threads, rounded to powers of two so that
// plans do not change with every measurement. Measuring one size takes some microseconds and is
// repeated after kBarrierKeptNanoseconds.
BarrierCycles measured_barriers(int threads);
// The measured cycles to load a line from L3. Measured once, in a millisecond or two.
double measured_l3_line(int64_t l2_bytes);

// How a weight matrix is packed before its products.
enum class Packing {
  kNone,  // not packed: cheaper for a handful of uses
  kOnce,  // all panels are packed before the first step
  kPanelwise,  // each panel is packed just before its only use, in a buffer that stays in cache;
               // or it is read in place
  kFrozen,  // packed before the call, see frozen.h
};

struct Plan {
  int threads;
  // The recurrence runs on a grid of row_shares x unit_shares threads. Threads with the same rows
  // (sequences of the batch) compute different hidden units and meet at a barrier in every step.
  // Threads with different rows do not wait for each other within a block. Only the backward has
  // threads beyond the grid; they take part in its products over blocks of steps.
  int row_shares, unit_shares;
  // The packing of W_ih and W_hh. W_hr is frozen if W_hh is, else packed once if W_hh is packed at
  // all. The backward never uses kNone, since it multiplies by columns of these matrices.
  Packing input, hidden;
  int64_t block_steps;  // steps per input projection (forward) or gradient product (backward)
  double cycles;  // rough estimate for the recurrence, to compare plans
  // Whether products use split precision (cpu/kernels/bf16x3.h): those over a block of steps, and
  // those of a single step.
  bool block_split_precision = false, step_split_precision = false;
  WeightType frozen = WeightType::kFloat32;  // the type of weights whose packing is kFrozen

  bool by_rows() const { return row_shares > 1; }
  bool by_units() const { return unit_shares > 1; }
  Plan without_split_precision() const {
    Plan other = *this;
    other.block_split_precision = other.step_split_precision = false;
    return other;
  }
};

// The recurrent product of one step as the planner sees it: rows of the lhs times panels of packed
// weights. A projection of h (proj_size) is ignored.
struct StepShape {
  int64_t rows;  // B
  int64_t panels;  // panels of the rhs
  int64_t depth;  // K in words of the weight format (WeightFormat::word)
  int vectors;  // vectors of columns in a panel
  int tile_rows;  // MR, rows of the register tile
  int min_rows;  // a tile with fewer rows takes as long as one with this many
  int element_bytes;  // bytes of an element of the compute type
  int weight_bytes;  // bytes of a word of packed weights
  int lanes;  // elements of a vector
  double row_cycles;  // cycles of a tile per row, vector of columns and word of K
  double cell_cycles;  // cycles of the gate maths per row of one panel
  // Minimum cycles to fetch a line of the lhs that another thread has written, where units are
  // split across threads; this comes on top of kExchange.
  double exchange_cycles;
  bool whole_rows = false;  // whether a thread must have all units of its rows
};

// `pack` says whether weights are packed. A block has at most `max_steps` steps.
Plan plan_forward(const Sizes& size, const StepShape& step, bool pack, const Machine& machine,
                  int64_t max_steps);
Plan plan_backward(const Sizes& size, const StepShape& step, const Machine& machine);

// Owns the order in which kernels process sequences of unequal length. A `view` is valid as long as
// the object lives.
struct Arrangement {
  std::vector<int64_t> lengths, places, rows, offsets;
  Ragged view() const;
  // Distributes sequences of these lengths over the threads' shares of the rows, round-robin from
  // the longest to the shortest: each share has long and short ones, the long ones first.
  void distribute(std::span<const int64_t> of_sequences, int64_t shares);
  // Reorders the rows for a single thread.
  void use_one_thread();
};
// The arrangement for a plan. `lengths` are those of the batch's sequences; with `packed` data they
// do not increase.
Arrangement arrange(std::span<const int64_t> lengths, bool packed, int64_t T, const Plan& plan);

// How many of `count` equal layers run side by side, each on its part of the threads.
// cycles[n - 1] is a plan's estimate for a layer when n layers share the threads, for n up to the
// smaller of `count` and `threads`. In a stack a layer starts when the one below has finished the
// first of kStackBlocks blocks of its `stacked_steps`; `stacked_steps` is 0 if layers do not wait
// for each other.
int side_by_side(int count, int threads, int64_t stacked_steps, std::span<const double> cycles);

}  // namespace rnnfast::cpu
