#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace rnnfast::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr double kCyclesPerNanosecond = 3.5;

// the fastest of a few rounds, in nanoseconds; 0 if OpenMP does not give so many threads
double measure(int threads) {
  constexpr int kRounds = 3, kWaits = 4;
  Barrier barrier;
  double least = 0;
#pragma omp parallel num_threads(threads)
  if (omp_get_num_threads() == threads) {
    double best = std::numeric_limits<double>::infinity();
    for (int round = 0; round < kRounds; ++round) {
      const auto start = Clock::now();
      for (int i = 0; i < kWaits; ++i) barrier.wait(threads);
      const std::chrono::duration<double, std::nano> taken = Clock::now() - start;
      best = std::min(best, taken.count() / kWaits);
    }
    if (omp_get_thread_num() == 0) least = best;
  }
  return least;
}

struct Measurement {
  std::atomic<int> threads{0};
  std::atomic<double> cycles{0};
  std::atomic<Clock::rep> until{0};  // when it is to be repeated
};

}  // namespace

double measured_barrier(int threads) {
  // Where threads outnumber cores, measuring takes long, and happens the less often.
  constexpr Clock::duration kFresh = std::chrono::milliseconds(20);
  constexpr int kShare = 200;
  static Measurement last;
  const Clock::time_point now = Clock::now();
  if (last.threads == threads && now.time_since_epoch().count() < last.until) return last.cycles;
  if (omp_in_parallel()) return kTypicalBarrier;
  const double nanoseconds = measure(threads);
  last.cycles = nanoseconds > 0 ? nanoseconds * kCyclesPerNanosecond : kTypicalBarrier;
  last.threads = threads;
  const Clock::time_point end = Clock::now();
  last.until = (end + std::max(kFresh, kShare * (end - now))).time_since_epoch().count();
  return last.cycles;
}

}  // namespace rnnfast::cpu
