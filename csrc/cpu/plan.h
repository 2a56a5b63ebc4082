// How one sequence is cut into work: a pure function of sizes, instruction set, threads and caches.
// Numbers go in and a plan comes out; nothing is measured here.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "arguments.h"
#include "cpu/tuning.h"

namespace rnnfast::cpu {

// What a barrier takes, in cycles, by the number of threads: entry k is for up to 2^k threads.
struct BarrierCycles {
  static constexpr int kSizes = 11;
  std::array<double, kSizes> of_doublings{};

  // The same for all numbers of threads.
  static BarrierCycles constant(double cycles);
  // What is typical where nothing has been measured.
  static BarrierCycles typical();
  double operator()(int threads) const;
  // A number that tells costs apart which are powers of two, as measured ones are, or 0.
  int64_t key() const;
};

struct Machine {
  int threads;
  int64_t l2_bytes;  // per core
  double l3_line_cycles;  // to load a line that lies beyond L2
  BarrierCycles barrier_cycles;

  Machine with(int other_threads) const {
    Machine part = *this;
    part.threads = other_threads;
    return part;
  }
};

// What barriers take on this machine in teams of up to so many threads, to the nearest power of
// two: a plan changes only where the cost does. Each size is measured in some microseconds, and
// again after kBarrierKeptNanoseconds.
BarrierCycles measured_barriers(int threads);
// What a line from L3 takes one thread. Measured once, in a millisecond or two.
double measured_l3_line(int64_t l2_bytes);

// What is done to a weight matrix before its products.
enum class Packing {
  kNone,  // read as it lies: cheaper for a handful of uses
  kOnce,  // all panels are packed before the first step
  kPanelwise,  // each panel is packed just before its only use, in a buffer that stays in cache
};

struct Plan {
  int threads;
  // The recurrence runs on a grid of row_shares x unit_shares threads. Threads with the same rows
  // meet at a barrier in every step, and each computes its hidden units; those with other rows do
  // not wait for each other within a block. Only the backward has threads beyond the grid, for its
  // products over blocks of steps.
  int row_shares, unit_shares;
  // Of W_ih and W_hh; W_hr is packed once if W_hh is packed. The backward packs all, for products
  // with their columns.
  Packing input, hidden;
  int64_t block_steps;  // steps between input projection (forward) or gradient products (backward)
  double cycles;  // of the recurrence, roughly: to compare plans
  // Whether numbers go into products in split precision (cpu/parts.h): into those with x and of a
  // block of steps, and into those of a single step.
  bool block_split_precision = false, step_split_precision = false;

  bool by_rows() const { return row_shares > 1; }
  bool by_units() const { return unit_shares > 1; }
  Plan without_split_precision() const {
    Plan other = *this;
    other.block_split_precision = other.step_split_precision = false;
    return other;
  }
};

// The recurrent product of one step as the planner sees it: rows times panels of packed weights.
// The planner knows nothing of a projection.
struct StepShape {
  int64_t rows;  // B
  int64_t panels;  // panels of the right-hand side
  int64_t depth;  // length of the sums
  int vectors;  // vectors of columns in a panel
  int tile_rows;  // rows of the register tile
  int min_rows;  // fewer rows take a tile as long
  int element_bytes;  // of the compute type
  int weight_bytes;  // of what stands for one in packed weights
  int lanes;  // elements of a vector
  double row_cycles;  // of a tile, for one row, a vector of columns and one element of the sum
  double cell_cycles;  // gate maths for one row of one panel
  // where units are dealt: the min to fetch a line of the lhs that another thread has written,
  // beyond what kExchange stands for
  double exchange_cycles;
};

// `pack`: whether weights are packed, else read as they lie. Blocks take `max_steps` at most.
Plan plan_forward(const Sizes& size, const StepShape& step, bool pack, const Machine& machine,
                  int64_t max_steps);
Plan plan_backward(const Sizes& size, const StepShape& step, const Machine& machine);

// Sequences of unequal length as kernels take them; `view` is valid as long as this lives.
struct Arrangement {
  std::vector<int64_t> lengths, places, rows, offsets;
  Ragged view() const;
  // Deals sequences of these lengths to so many shares of the rows.
  void deal(std::span<const int64_t> of_sequences, int64_t shares);
  void give_to_one_thread();
};
// Deals sequences to shares of the rows so that each gets long and short ones, the longer ones
// first.
Arrangement arrange(std::span<const int64_t> lengths, bool packed, int64_t T, const Plan& plan);

// How many of `count` equal layers run side by side, each on its part of the threads. `cycles` has
// a plan's estimate where 1, 2, ... layers share the threads, up to the smaller of `count` and
// `threads`. In a stack a layer starts when the one before it has done the first of kStackBlocks
// blocks of its `stacked_steps`; 0 where layers do not wait for each other.
int side_by_side(int count, int threads, int64_t stacked_steps, std::span<const double> cycles);

}  // namespace rnnfast::cpu
