// A team of threads for one whole sequence, and its barrier.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

namespace rnnfast::cpu {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Waits by spinning: steps are a few microseconds apart. Yields once that has gone on for long, so
// that more threads than cores still make progress.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round;) {
      if (spins < kSpins) {
        ++spins;
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 10000;

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

class Team {
 public:
  Team(Barrier& barrier, int index, int size) : barrier_(barrier), index_(index), size_(size) {}
  int index() const { return index_; }
  int size() const { return size_; }
  void barrier() const {
    if (size_ > 1) barrier_.wait();
  }
  // this thread's part of n items
  Span share(int64_t n) const { return {n * index_ / size_, n * (index_ + 1) / size_}; }

 private:
  Barrier& barrier_;
  int index_, size_;
};

// Runs f(team) on `threads` threads of the OpenMP pool, the one that torch uses, or on one thread
// if the pool gives fewer: the work has been planned, and its memory laid out, for that number.
template <class F>
void parallel(int threads, F&& f) {
  Barrier alone(1), together(threads);
  if (threads == 1 || omp_in_parallel()) return f(Team(alone, 0, 1));
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads)
      f(Team(together, omp_get_thread_num(), threads));
    else if (omp_get_thread_num() == 0)
      f(Team(alone, 0, 1));
  }
}

}  // namespace rnnfast::cpu
