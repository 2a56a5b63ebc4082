// What planning needs to know of this machine, measured once.
#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <mutex>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace rnnfast::cpu {
namespace {

// The fastest of some short rounds, in nanoseconds; 0 if there are not so many threads. The first
// rounds wait for threads to wake up. Where threads share a core a round takes as long as time
// slices, and few are enough to see that.
double wait_together(int threads) {
  constexpr int kRounds = 12, kWaits = 8;
  constexpr int64_t kEnough = 2'000'000;
  Barrier barrier;
  std::atomic<bool> enough{false};
  double fastest = 0;
  run_in_team(threads, [&](int index) {
    double best = std::numeric_limits<double>::infinity();
    const int64_t begin = nanoseconds_now();
    for (int round = 0; round < kRounds && !enough; ++round) {
      const int64_t start = nanoseconds_now();
      for (int i = 0; i < kWaits; ++i) barrier.wait(threads);
      const int64_t end = nanoseconds_now();
      best = std::min(best, double(end - start) / kWaits);
      if (index == 0 && end - begin > kEnough) enough = true;
      barrier.wait(threads);  // all see `enough`
    }
    if (index == 0) fastest = best;
  });
  return fastest;
}

// For so many threads, in cycles.
double measured_barrier(int threads) {
  constexpr size_t kMaxThreads = 1 << (BarrierCycles::kSizes - 1);
  static std::array<std::atomic<double>, kMaxThreads + 1> kept{};  // 0: not measured
  static std::mutex one_at_a_time;
  std::atomic<double>& cycles = kept[std::min(size_t(threads), kMaxThreads)];
  if (cycles.load(std::memory_order_relaxed) > 0) return cycles;
  const double typical = BarrierCycles::typical()(threads);
  const std::lock_guard lock(one_at_a_time);
  if (cycles > 0) return cycles;
  const double nanoseconds = wait_together(threads);
  if (nanoseconds == 0) return typical;
  cycles = nanoseconds < kSharedCoreNanoseconds ? nanoseconds * kCyclesPerNanosecond : typical;
  return cycles;
}

// to read one line of so many bytes of memory, over and over, in nanoseconds
double read_line(int64_t bytes) {
  constexpr int kRounds = 4;
  constexpr int64_t kWords = kLineBytes / int64_t(sizeof(uint64_t));
  const std::vector<uint64_t> memory(size_t(bytes) / sizeof(uint64_t), 1);
  double best = std::numeric_limits<double>::infinity();
  uint64_t sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int64_t start = nanoseconds_now();
    for (size_t i = 0; i < memory.size(); i += kWords) sum += memory[i];
    best = std::min(best, double(nanoseconds_now() - start));
  }
  [[maybe_unused]] static volatile uint64_t sink;  // keeps the reads from being optimised away
  sink = sum;
  return best * kLineBytes / double(bytes);
}

}  // namespace

BarrierCycles measured_barriers(int threads) {
  BarrierCycles all;
  double last = 0;
  for (int k = 0; k < BarrierCycles::kSizes; ++k) {
    if (k > 0 && 1 << (k - 1) < threads) last = measured_barrier(std::min(1 << k, threads));
    all.of_doublings[size_t(k)] = last;
  }
  return all;
}

double measured_l3_line(int64_t l2_bytes) {
  static const double cycles = read_line(2 * l2_bytes) * kCyclesPerNanosecond;
  return cycles;
}

}  // namespace rnnfast::cpu
