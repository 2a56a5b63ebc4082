// The numbers that decide how work is cut, and why they are what they are. Times are in cycles,
// roughly; only their ratios matter. Measured on a Zen 4 with two cores unless it says otherwise;
// see csrc/EXPERIMENTS.md.
#pragma once

#include <cstdint>

namespace rnnfast::cpu {

// ---- waiting ----

// So long a thread spins before it parks: about what it takes to park and to be woken, so that
// waiting never costs more than twice what the better of the two would have cost.
inline constexpr int64_t kSpinNanoseconds = 50'000;

// The threads of a team lose time where they could run and another process has the core. Two of
// them lose half of the time together beside one process that is always busy, and a twentieth of it
// on a machine that is not. One thread alone takes less time than two that lose half of it. Calls
// of so much time, at least, are looked at together, and one in a millisecond at most.
inline constexpr double kTooMuchLost = 0.3;
inline constexpr double kLookSeconds = 0.15;
inline constexpr int64_t kSampleNanoseconds = 1'000'000;
// So long fewer threads work before one more is tried. The time doubles with every try in vain.
inline constexpr double kMinHoldSeconds = 0.1, kMaxHoldSeconds = 1.6;

// ---- what the planner takes for granted about a machine ----

inline constexpr double kCyclesPerNanosecond = 3.5;
inline constexpr int64_t kLineBytes = 64;  // of a line of cache

// A barrier takes 50 ns between two cores that share a cache, 450 ns between others. Two threads
// that share a core, as another process has the second one, take 4 us: they park in turns. What
// takes longer than kSharedCoreNanoseconds for each doubling of the threads was measured in that
// state, and says nothing: then kTypicalBarrier stands for two threads, and kBarrierPerDoubling
// more for each doubling.
inline constexpr double kTypicalBarrier = 300;
inline constexpr double kBarrierPerDoubling = 300;
inline constexpr double kSharedCoreNanoseconds = 2000;
// A virtual machine's cores may move: near ones become far ones, and a small layer with a barrier
// in each step then takes less time on one thread. To measure again takes some microseconds.
inline constexpr int64_t kBarrierKeptNanoseconds = 500'000'000;

// To load a line that lies beyond L2: 3 on Zen 4, 7 on a Xeon with many cores.
inline constexpr double kTypicalL3Line = 2.9;

// ---- the recurrence: which threads take which rows and units ----

// To call a team and to wait for its end.
inline constexpr double kRegion = 5000;
// Where units are dealt, a step waits and then fetches what the others have written: so many
// barriers in all.
inline constexpr double kExchange = 2.5;
// A line from another core, in barriers: one of many that are read one after the other, and one of
// a few rows, where the hardware fetches several at a time.
inline constexpr double kBarrierOfLine = 0.02;
inline constexpr double kBarrierOfRowLine = 0.12;
// A barrier that takes longer waits for a core that is not free. A line does not.
inline constexpr double kFarBarrier = 2000;
// To load one vector of weights, up to a line.
inline constexpr double kL1Vector = 1, kL2Vector = 2.1;
// So many bytes of weights stay in L1 beside the states, of 32 KiB.
inline constexpr int64_t kL1Bytes = 24 * 1024;

// ---- blocks of steps ----

// A projection of the whole sequence may take this much memory: read once, it only passes the
// caches.
inline constexpr int64_t kWholeProjectionBytes = 4 << 20;
// The weight gradients sum over the rows of a block: enough of them to pay for reading and writing
// the gradient, few enough for the gate gradients to stay in cache.
inline constexpr int64_t kGradientRows = 512;
// Products over the whole sequence use every thread, even where the recurrence cannot, if they take
// so many times kRegion.
inline constexpr double kProductsForAllThreads = 40;
// In a stack a layer starts when the one before it has done the first of so many blocks.
inline constexpr int64_t kStackBlocks = 8;

// ---- products ----

// A chain of more words would lose more bits than torch's products do; a longer sum is cut into
// several chains. For products with weights, and for those over many rows.
inline constexpr int64_t kChain = 128, kLongChain = 64;

// Whether weights (G*H, K) are used often enough for tiles to make up for packing them. A small
// matrix is packed within L2, and its rows are too short for dot products; these are slow where
// they have to convert, most of all where tiles need not (pairs of bfloat16).
constexpr bool pays_to_pack(int64_t uses, int64_t weight_bytes, bool converts, bool pairs) {
  const int64_t min_uses = pairs                        ? 3
                           : converts                   ? 6
                           : weight_bytes < (128 << 10) ? 8
                           : weight_bytes < (512 << 10) ? 12
                                                        : 24;
  return uses >= min_uses;
}

// A matrix W_ih is multiplied by whole rows, not by panels of units, where that saves so many times
// as many vectors as it costs to take the results apart.
inline constexpr int64_t kWholeRowsGain = 4;

// ---- split precision: floats as three bfloat16, on AMX tiles ----

inline constexpr double kAmxRowCycles = 1. / 16;
inline constexpr double kSplitRowCycles = 0.22;
inline constexpr double kSplitExchangeCycles = 60;
inline constexpr int kSplitMinRows = 14;
inline constexpr int64_t kSplitChainSteps = 16;  // of 32 elements
inline constexpr int64_t kSplitMinWork = 6'000'000;  // multiply-adds

// Whether it pays, as measured: where weights (K, columns) are multiplied by so many rows in each
// of the steps; by all rows at once; and in sums over rows, which make gradients of such weights.
// By sizes alone, for results must not depend on the number of threads.
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

// ---- gate maths, for planning: cycles of a row for a vector of columns ----

inline constexpr double kCellCycles = 30;

// ---- gradients of weights ----

// So few rows of a block are not worth packing. At most what MicroKernels::outer_few takes.
inline constexpr int64_t kFewRows = 4;
// Rows are packed so many at a time, for all panels, as they come from memory.
inline constexpr int64_t kPackedRows = 32;
// Bands of rows are at least so many tiles high, and stay in L2 while the panels pass.
inline constexpr int64_t kMinBandTiles = 4, kBandBytes = 512 << 10;
// So many bytes of panels at once stay in L2 beside a band: then whole rows of the gradient are
// written, and not 256 bytes here and there.
inline constexpr int64_t kPanelGroupBytes = 256 << 10;

// ---- memory ----

// What threads write at the same time lies so far apart. Nearer by, the hardware's prefetching for
// one thread's rows, which runs ahead, takes lines away from another's.
inline constexpr int64_t kApartBytes = 16384;

}  // namespace rnnfast::cpu
