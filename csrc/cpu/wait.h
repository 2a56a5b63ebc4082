// How threads wait for each other: barriers, and the progress of a sequence.
#pragma once

#include <atomic>
#include <cstdint>

namespace rnnfast::cpu {

int64_t nanoseconds_now();
// For how long the calling thread has been parked so far, without the time it took to go on.
int64_t nanoseconds_parked();

// What a barrier or a wait throws in a thread whose team has failed. It ends that thread's work;
// parallel() (cpu/parallel.h) catches it.
struct Cancelled {};

// Threads that wait spin first, as steps are a few microseconds apart, and then park. So a thread
// that waits for long leaves its core to others, also to the one that it waits for.
class Barrier {
 public:
  void wait(int threads) { meet(threads, true); }
  // Counts this thread as one that has come. It does not wait for the others.
  void arrive(int threads) { meet(threads, false); }

  // Makes this and every later wait throw Cancelled. Only for a thread that the others wait for,
  // and that does not come to this barrier again.
  void cancel();
  // Only where no thread waits.
  void reset() {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(0, std::memory_order_relaxed);
  }

 private:
  static constexpr uint32_t kCancelled = 1, kRound = 2;  // in round_
  static constexpr uint32_t kParked = uint32_t(1) << 31;  // in arrived_

  void meet(int threads, bool waits) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (round & kCancelled) throw Cancelled{};
    const uint32_t arrived = arrived_.fetch_add(1, std::memory_order_acq_rel);
    if ((arrived & ~kParked) == uint32_t(threads - 1)) {
      arrived_.store(0, std::memory_order_relaxed);
      if (arrived & kParked) return end_with_parked(round);
      round_.store(round + kRound, std::memory_order_release);
    } else if (waits) {
      wait_for_end(round, threads);
    }
  }
  void wait_for_end(uint32_t round, int threads);
  void end_with_parked(uint32_t round);

  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  std::atomic<int64_t> woken_at_{0};  // when those that had parked could go on
};

// How many steps of a sequence are done, for a team that reads them while others are being written.
class Progress {
 public:
  void reach(int64_t steps) {
    steps_.store(steps);
    if (parked_.load()) unpark();
  }
  // Throws Cancelled where they will never be reached.
  void wait_for(int64_t steps) const {
    if (steps_.load(std::memory_order_acquire) < steps) wait_long(steps);
  }
  void cancel() {
    cancelled_.store(true);
    unpark();
  }

 private:
  void unpark();
  void wait_long(int64_t steps) const;

  alignas(64) std::atomic<int64_t> steps_{0};
  std::atomic<bool> cancelled_{false};
  mutable std::atomic<uint32_t> parked_{0};  // threads
  mutable std::atomic<uint32_t> news_{0};  // what they park on
  std::atomic<int64_t> woken_at_{0};
};

}  // namespace rnnfast::cpu
