// How one sequence is cut into work: a pure function of sizes, instruction set, threads and caches.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "arguments.h"

namespace rnnfast::cpu {

struct Machine {
  int threads;
  int64_t l2_bytes;  // per core
  // asked for only where they matter
  std::function<double(int threads)> barrier_cycles;
  std::function<double(int64_t l2_bytes)> l3_line_cycles;  // to load a line that lies beyond L2

  Machine with(int other_threads) const {
    Machine part = *this;
    part.threads = other_threads;
    return part;
  }
};

// What a barrier of so many threads takes now, in cycles, roughly: between two cores 200 or 1700,
// as they share a cache or not, which changes in a virtual machine. Measured again, in some
// microseconds, where the last measurement is old.
double measured_barrier(int threads);
inline constexpr double kTypicalBarrier = 300;

// What a line from L3 takes one thread, in cycles, roughly: 3 on Zen 4, 7 on a Xeon with many
// cores. Measured once, in a millisecond or two.
double measured_l3_line(int64_t l2_bytes);
inline constexpr double kTypicalL3Line = 2.9;
inline constexpr int64_t kLineBytes = 64;  // of a line of cache

// How the recurrence is dealt to threads.
enum class Split {
  kNone,  // one thread runs it
  kRows,  // each thread runs all steps for its rows of the batch, without waiting for the others
  kUnits,  // each thread computes its hidden units for the whole batch; one barrier per step
};

// What is done to a weight matrix before its products.
enum class Packing {
  kNone,  // read as it lies: cheaper for a handful of uses
  kOnce,  // all panels are packed before the first step
  kPanelwise,  // each panel is packed just before its only use, in a buffer that stays in cache
};

struct Plan {
  int threads;
  Split split;
  // Of W_ih and W_hh; W_hr is packed once if W_hh is packed. The backward packs all, for products
  // with their columns.
  Packing input, hidden;
  int64_t block_steps;  // steps between input projection (forward) or gradient products (backward)
  double cycles;  // of the recurrence, roughly: to compare plans
  // Whether each number goes into products as the sum of several parts (cpu/parts.h): into those
  // with x and of a block of steps, and into those of a single step.
  bool block_in_parts = false, step_in_parts = false;

  Plan without_parts() const {
    Plan other = *this;
    other.block_in_parts = other.step_in_parts = false;
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
  int least_rows;  // fewer rows take a tile as long
  int element_bytes;  // of the compute type
  int weight_bytes;  // of what stands for one in packed weights
  int lanes;  // elements of a vector
  double row_cycles;  // of a tile, for one row, a vector of columns and one element of the sum
  double cell_cycles;  // gate maths for one row of one panel
  // where units are dealt: the least to fetch a line of the left side that another thread has
  // written, beyond what kExchange stands for
  double exchange_cycles;
};

// `pack`: whether weights are packed, else read as they lie. Blocks take `most_steps` at most.
Plan plan_forward(const Sizes& size, const StepShape& step, bool pack, const Machine& machine,
                  int64_t most_steps);
Plan plan_backward(const Sizes& size, const StepShape& step, const Machine& machine);

// Sequences of unequal length as kernels take them; `view` is valid as long as this lives.
struct Arrangement {
  std::vector<int64_t> lengths, places, rows, offsets;
  Ragged view() const;
  // Deals sequences of these lengths to so many threads' shares of the rows.
  void deal(std::span<const int64_t> of_sequences, int64_t shares);
  void give_to_one_thread();
};
// Deals sequences to threads so that each gets long and short ones, the longer ones first.
Arrangement arrange(std::span<const int64_t> lengths, bool packed, int64_t T, const Plan& plan);

// How many of `count` equal layers run side by side, each on its part of the threads, where
// `cycles` has a plan's estimate for a number of threads. In a stack a layer starts when the one
// before it has done the first of kStackBlocks blocks of its `stacked_steps`; 0 where layers do not
// wait for each other.
inline constexpr int64_t kStackBlocks = 8;
int side_by_side(int count, int threads, int64_t stacked_steps,
                 const std::function<double(int threads)>& cycles);

}  // namespace rnnfast::cpu
