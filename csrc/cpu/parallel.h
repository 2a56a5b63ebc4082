// A team of threads for one whole sequence, its barrier, and the memory it works in.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace rnnfast::cpu {

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
      if (++spins > kSpins) sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 20000;
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

// Runs f(team) on up to `threads` threads of the OpenMP pool, the one that torch uses.
template <class F>
void parallel(int threads, F&& f) {
  if (threads == 1 || omp_in_parallel()) {
    Barrier barrier(1);
    f(Team(barrier, 0, 1));
    return;
  }
  Barrier* barrier = nullptr;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier = new Barrier(omp_get_num_threads());
    f(Team(*barrier, omp_get_thread_num(), omp_get_num_threads()));
  }
  delete barrier;
}

// Hands out aligned pieces of a workspace; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace rnnfast::cpu
