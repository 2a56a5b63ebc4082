// How threads wait for each other: Barrier, and Progress of a sequence.
#pragma once

#include <atomic>
#include <cstdint>

namespace rnnfast::cpu {

// The time of a monotonic clock.
int64_t nanoseconds_now();
// The total time that the calling thread has spent parked. A park ends when the thread is woken;
// the delay until it runs again is not counted.
int64_t nanoseconds_parked();

// Thrown by a barrier or a wait in a thread whose team has failed. It ends that thread's work;
// parallel() (cpu/parallel.h) catches it.
struct Cancelled {};

// A barrier whose waiting threads spin for a bounded time, since steps are a few microseconds
// apart, and then park. A thread that waits for long thus leaves its core to other threads,
// including the one that it waits for.
class Barrier {
 public:
  void wait(int threads) { meet(threads, true); }
  // Counts this thread as arrived, without waiting for the others.
  void arrive(int threads) { meet(threads, false); }

  // Makes this and every later wait throw Cancelled. To be called by a thread that the others wait
  // for and that will not arrive again.
  void cancel();
  // To be called only while no thread waits.
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
  std::atomic<int64_t> woken_at_{0};  // time at which parked threads were last woken
};

// The number of finished steps of a sequence. One team advances it, and another reads the finished
// steps while later ones are still being written.
class Progress {
 public:
  void reach(int64_t steps) {
    steps_.store(steps);
    if (parked_.load()) unpark();
  }
  // Throws Cancelled if the writing team has failed before these steps.
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
  mutable std::atomic<uint32_t> parked_{0};  // number of parked threads
  mutable std::atomic<uint32_t> news_{0};  // the futex word; it changes with every wake-up
  std::atomic<int64_t> woken_at_{0};
};

}  // namespace rnnfast::cpu
