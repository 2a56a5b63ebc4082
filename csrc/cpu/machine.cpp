// Measures what the planner needs to know about this machine: barriers and loads from L3.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace rnnfast::cpu {
namespace {

// Whether a barrier took so long that threads must have shared a core.
bool is_shared(double nanoseconds, int threads) {
  return nanoseconds > kSharedCoreNanoseconds * std::bit_width(unsigned(threads - 1));
}

// The time of a barrier in nanoseconds, as the minimum over some short rounds; 0 if there are fewer
// threads. Threads that have just been woken may share a core for some milliseconds, so measuring
// goes on for that long while they seem to.
double time_barrier(int threads) {
  constexpr int kRounds = 12, kWaits = 8;
  constexpr int64_t kPatience = 5'000'000;
  Barrier barrier;
  std::atomic<bool> enough{false};
  double fastest = std::numeric_limits<double>::infinity();
  const bool complete = run_in_team(threads, [&](int index) {
    const int64_t begin = nanoseconds_now();
    for (int round = 1; !enough; ++round) {
      const int64_t start = nanoseconds_now();
      for (int i = 0; i < kWaits; ++i) barrier.wait(threads);
      const int64_t end = nanoseconds_now();
      if (index == 0) {
        fastest = std::min(fastest, double(end - start) / kWaits);
        enough = is_shared(fastest, threads) ? end - begin > kPatience : round >= kRounds;
      }
      barrier.wait(threads);  // so that all threads see `enough` and leave in the same round
    }
  });
  return complete ? fastest : 0;
}

// The time of a barrier for one number of threads, as last measured.
struct Measured {
  std::atomic<double> cycles{0};  // 0 if not measured yet
  std::atomic<int64_t> due{0};  // time of the next measurement
};

// The cycles of a barrier, rounded to a power of two.
double measured_barrier(int threads, int64_t now) {
  constexpr size_t kMaxThreads = 1 << (BarrierCycles::kSizes - 1);
  static std::array<Measured, kMaxThreads + 1> kept;
  static std::mutex one_at_a_time;
  Measured& last = kept[std::min(size_t(threads), kMaxThreads)];
  if (now < last.due.load(std::memory_order_acquire)) return last.cycles;
  const double typical = BarrierCycles::typical()(threads);
  // A caller does not wait for another one's measurement. In a child process the lock may be held
  // for ever, by a thread that was not forked.
  const std::unique_lock lock(one_at_a_time, std::try_to_lock);
  if (!lock || now < last.due) return last.cycles > 0 ? double(last.cycles) : typical;
  const double nanoseconds = time_barrier(threads);
  double cycles = nanoseconds * kCyclesPerNanosecond;
  if (nanoseconds == 0 || is_shared(nanoseconds, threads))
    cycles = last.cycles > 0 ? double(last.cycles) : typical;
  last.cycles = std::exp2(std::round(std::log2(cycles)));
  last.due.store(nanoseconds_now() + kBarrierKeptNanoseconds, std::memory_order_release);
  return last.cycles;
}

// The time to load one cache line in nanoseconds, when `bytes` of memory are read over and over.
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
  const int64_t now = threads > 1 ? nanoseconds_now() : 0;
  double last = 0;
  for (int k = 0; k < BarrierCycles::kSizes; ++k) {
    if (k > 0 && 1 << (k - 1) < threads) last = measured_barrier(std::min(1 << k, threads), now);
    all.of_doublings[size_t(k)] = last;
  }
  return all;
}

double measured_l3_line(int64_t l2_bytes) {
  // No static initialisation: a child process would wait for ever for a thread that is measuring.
  static std::atomic<double> kept{0};  // 0: not measured
  double cycles = kept.load(std::memory_order_relaxed);
  if (cycles == 0) {
    cycles = read_line(2 * l2_bytes) * kCyclesPerNanosecond;
    double none = 0;
    if (!kept.compare_exchange_strong(none, cycles)) cycles = none;  // plans must agree
  }
  return cycles;
}

}  // namespace rnnfast::cpu
