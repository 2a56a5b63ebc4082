// The thresholds and cost estimates that decide how work is split, and the reason for each. Times
// are rough cycles; only their ratios matter. They were measured on a Zen 4 with two cores unless a
// comment says otherwise; see csrc/EXPERIMENTS.md.
#pragma once

#include <cstdint>

namespace rnnfast::cpu {

// ---- waiting ----

// How long a thread spins before it parks. It is about the time to park and be woken, so waiting
// never costs more than twice the better of spinning and parking.
inline constexpr int64_t kSpinNanoseconds = 50'000;

// A team loses time when its threads are ready to run but another process has the core. Two threads
// on two cores lose, in sum, half of the elapsed time beside one busy process, and a twentieth on
// an idle machine. At a loss of one half a single thread is faster than two. So the number of
// threads is reduced if the losses exceed kTooMuchLost of the elapsed time. Losses are sampled once
// in kSampleNanoseconds at most, and judged when the samples cover kLookSeconds.
inline constexpr double kTooMuchLost = 0.3;
inline constexpr double kLookSeconds = 0.15;
inline constexpr int64_t kSampleNanoseconds = 1'000'000;
// How long the number of threads stays reduced before more are tried. The time doubles with each
// attempt that fails.
inline constexpr double kMinHoldSeconds = 0.1, kMaxHoldSeconds = 1.6;

// ---- what the planner assumes about a machine ----

inline constexpr double kCyclesPerNanosecond = 3.5;
inline constexpr int64_t kLineBytes = 64;  // of a cache line

// A barrier takes 50 ns between two cores that share a cache, 450 ns between others. It takes 4 us
// between two threads that share a core because another process has the second core: they park in
// turns. A measurement above kSharedCoreNanoseconds per doubling of the threads was taken in that
// state and is discarded. Without a measurement, a barrier of two threads is assumed to take
// kTypicalBarrier, and each doubling of the threads adds kBarrierPerDoubling.
inline constexpr double kTypicalBarrier = 300;
inline constexpr double kBarrierPerDoubling = 300;
inline constexpr double kSharedCoreNanoseconds = 2000;
// How long a measured barrier is valid. The virtual cores of a virtual machine may move to other
// physical cores; if they end up far apart, a small layer with a barrier in each step is faster on
// one thread. Measuring again takes some microseconds.
inline constexpr int64_t kBarrierKeptNanoseconds = 500'000'000;

// Cycles to load a line that is not in L2: 3 on Zen 4, 7 on a Xeon with many cores.
inline constexpr double kTypicalL3Line = 2.9;

// ---- the recurrence: how rows and units are split across threads ----

// Cycles to enter and leave a parallel region.
inline constexpr double kRegion = 5000;
// Cost of a step in which units are split across threads, in barriers: the barrier itself and the
// first loads of what the other threads have written.
inline constexpr double kExchange = 2.5;
// Measured cost of loading a line that another core has written, as a fraction of a barrier:
// kBarrierOfLine for packed weights, kBarrierOfRowLine for rows of the hidden state.
inline constexpr double kBarrierOfLine = 0.02;
inline constexpr double kBarrierOfRowLine = 0.12;
// An upper limit of the barrier in those two costs. A slower barrier waits for a core that is not
// free, which does not slow down the loads.
inline constexpr double kFarBarrier = 2000;
// Cycles to load one vector of weights (up to a cache line) from L1 and L2.
inline constexpr double kL1Vector = 1, kL2Vector = 2.1;
// The part of an L1 cache of 32 KiB in which weights stay; the states take the rest.
inline constexpr int64_t kL1Bytes = 24 * 1024;

// ---- blocks of steps ----

// The most memory that an input projection of the whole sequence may take. It is read only once, so
// it need not stay in cache.
inline constexpr int64_t kWholeProjectionBytes = 4 << 20;
// Minimum rows (steps times sequences) of a block of the backward. The weight gradients sum over
// the rows of a block: more rows amortise reading and writing the gradient, but the gate gradients
// should stay in cache.
inline constexpr int64_t kGradientRows = 512;
// The backward's products over blocks of steps use every thread, even if the recurrence runs on
// one, when they take more than this many times kRegion.
inline constexpr double kProductsForAllThreads = 40;
// Layers of a stack overlap: a sequence is cut into this many blocks, and a layer starts when the
// one below has finished its first block.
inline constexpr int64_t kStackBlocks = 8;

// ---- products ----

// The most rows of a product that reads weights in place rather than packing them for one use. From
// 20 to 32 rows that took 0.87 to 0.96 of the time; more rows were not tried.
inline constexpr int64_t kInPlaceRows = 32;

// The longest chain of additions, in words of K. Longer sums are cut into several chains, since one
// chain would lose more bits than torch's products do. kChain is for products with weights,
// kLongChain for those that sum over many rows.
inline constexpr int64_t kChain = 128, kLongChain = 64;

// Whether weights (G*H, K) are used often enough to make up for packing them. The alternative is
// dot products with the unpacked rows (dots). A small matrix pays early: it is packed within L2,
// and its rows are too short for fast dot products. Half types pay early too, since dot products
// have to convert them; most of all where the tiles do not (pairs of bfloat16). The panels of a
// single step are packed one at a time, while the next one is prefetched, so packing waits less.
constexpr bool pays_to_pack(int64_t steps, int64_t rows, int64_t weight_bytes, bool converts,
                            bool pairs) {
  const int64_t min_uses = pairs                        ? 3
                           : converts                   ? 6
                           : weight_bytes < (128 << 10) ? 8
                           : weight_bytes < (512 << 10) ? 12
                           : steps == 1                 ? 16
                                                        : 24;
  return steps * rows >= min_uses;
}

// So many words of k are packed for all vectors of a panel of gates before the next ones are: that
// part of the panel, whose lines are written vector by vector, stays in L1.
inline constexpr int64_t kPackedWords = 64;

// W_ih is multiplied as one matrix of G*H columns, not by panels of units, if the vectors this
// saves are more than this many times the vectors that it costs to regroup the results by units.
inline constexpr int64_t kWholeRowsGain = 4;

// Where a thread has a single sequence, each step multiplies W_ih by its own x if x has at most
// this many numbers. Results of a product over many steps would take longer to write and to read.
inline constexpr int64_t kFewInputs = 8;

// ---- split precision: floats as three bfloat16, on AMX tiles ----

// For planning, in cycles: a row, a vector of columns and an element of the sum, on AMX in bfloat16
// and in split precision, which takes six such products with less reuse; and the time to fetch a
// line of h that another thread has written, of which split precision reads three parts.
inline constexpr double kAmxRowCycles = 1. / 16;
inline constexpr double kSplitRowCycles = 0.22;
inline constexpr double kSplitExchangeCycles = 60;
// Fewer rows take an AMX tile of 16 rows as long.
inline constexpr int kSplitMinRows = 14;
// A chain has so many steps of 32 elements. A longer chain would err more than torch's products.
inline constexpr int64_t kSplitChainSteps = 16;
// With fewer multiply-adds, splitting and packing cost more than AMX saves.
inline constexpr int64_t kSplitMinWork = 6'000'000;

// Whether split precision pays, as measured, for weights (K, columns): multiplied by `rows` rows in
// each of `steps` steps; multiplied by all rows at once; and for the gradient of the weights, a sum
// over rows. The decision uses sizes alone, because results must not depend on the number of
// threads.
constexpr bool split_pays_in_steps(int64_t rows, int64_t steps, int64_t K, int64_t columns) {
  const int64_t min_uses = K * columns >= 256 * 256 ? 96 : 192;
  return rows >= 12 && steps * rows >= min_uses && K >= 24 && columns >= 48;
}
constexpr bool split_pays_at_once(int64_t rows, int64_t K, int64_t columns) {
  return split_pays_in_steps(rows, 1, K, columns) && rows * K * columns >= kSplitMinWork;
}
constexpr bool split_pays_in_gradients(int64_t rows, int64_t K, int64_t columns) {
  return rows >= 96 && rows * K * columns >= kSplitMinWork;
}

// ---- gate maths, for planning ----

// Cycles per row and vector of columns.
inline constexpr double kCellCycles = 30;

// ---- gradients of weights ----

// A block of this many rows or fewer is multiplied without packing, by MicroKernels::outer_few,
// whose limit this is.
inline constexpr int64_t kFewRows = 4;
// Rows are read from memory and packed into all panels this many at a time.
inline constexpr int64_t kPackedRows = 32;
// The rows of a gradient are computed in bands: at least kMinBandTiles tiles high, and with an lhs
// of about kBandBytes, so that it stays in L2 while the panels of the rhs are read.
inline constexpr int64_t kMinBandTiles = 4, kBandBytes = 512 << 10;
// Panels that stay in L2 beside a band, taken together so that long runs of each row of the
// gradient are written, instead of 256 bytes at a time.
inline constexpr int64_t kPanelGroupBytes = 256 << 10;

// ---- memory ----

// The distance between memory that different threads write at the same time. Closer together, the
// hardware prefetcher, which runs ahead of one thread's rows, would take lines from another thread.
inline constexpr int64_t kApartBytes = 16384;

}  // namespace rnnfast::cpu
