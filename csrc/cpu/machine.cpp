// What planning needs to know of this machine, measured where it matters.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace rnnfast::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr double kCyclesPerNanosecond = 3.5;

double nanoseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

// the fastest of a few rounds, in nanoseconds; 0 if there are not so many threads
double wait_together(int threads) {
  constexpr int kRounds = 3, kWaits = 4;
  Barrier barrier;
  double least = 0;
  run_in_team(threads, [&](int index) {
    double best = std::numeric_limits<double>::infinity();
    for (int round = 0; round < kRounds; ++round) {
      const auto start = Clock::now();
      for (int i = 0; i < kWaits; ++i) barrier.wait(threads);
      best = std::min(best, nanoseconds_since(start) / kWaits);
    }
    if (index == 0) least = best;
  });
  return least;
}

// to read one line of so many bytes of memory, over and over, in nanoseconds
double read_line(int64_t bytes) {
  constexpr int kRounds = 4;
  constexpr int64_t kWords = kLineBytes / int64_t(sizeof(uint64_t));
  const std::vector<uint64_t> memory(bytes / int64_t(sizeof(uint64_t)), 1);
  double best = std::numeric_limits<double>::infinity();
  uint64_t sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = Clock::now();
    for (size_t i = 0; i < memory.size(); i += kWords) sum += memory[i];
    best = std::min(best, nanoseconds_since(start));
  }
  static volatile uint64_t sink;  // keeps the reads from being optimised away
  sink = sum;
  return best * kLineBytes / double(bytes);
}

struct Measurement {
  std::atomic<double> cycles{0};  // 0: none yet
  std::atomic<int> patience{0};  // see below
  std::atomic<Clock::rep> until{0};  // when it is to be repeated
};

}  // namespace

double measured_barrier(int threads) {
  // Threads that share a core wait for each other's time slices, and measuring them takes
  // milliseconds. They may do so just after they have been woken, or always, where they outnumber
  // the cores: it is measured again soon, and then less and less often.
  constexpr Clock::duration kFresh = std::chrono::milliseconds(20);
  constexpr double kShared = 10e3;  // nanoseconds
  constexpr int kFirst = 4, kMost = 256;  // of the time that measuring takes
  static std::array<Measurement, 1024> measurements;  // by number of threads
  Measurement& last = measurements[std::min<size_t>(size_t(threads), measurements.size() - 1)];
  const Clock::time_point now = Clock::now();
  if (last.cycles > 0 && now.time_since_epoch().count() < last.until) return last.cycles;
  const double nanoseconds = wait_together(threads);
  if (nanoseconds == 0) return kTypicalBarrier;
  last.patience = nanoseconds < kShared ? 0 : std::clamp(2 * last.patience.load(), kFirst, kMost);
  last.cycles = nanoseconds * kCyclesPerNanosecond;
  const Clock::time_point end = Clock::now();
  last.until =
      (end + std::max(kFresh, last.patience.load() * (end - now))).time_since_epoch().count();
  return last.cycles;
}

double measured_l3_line(int64_t l2_bytes) {
  static const double cycles = read_line(2 * l2_bytes) * kCyclesPerNanosecond;
  return cycles;
}

}  // namespace rnnfast::cpu
