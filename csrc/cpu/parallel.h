// A team of threads for one whole sequence, and its barrier.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <span>

namespace rnnfast::cpu {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Waits by spinning: steps are a few microseconds apart. Yields once that has gone on for long, so
// that more threads than cores still make progress.
template <class Condition>
void spin_until(Condition&& condition) {
  constexpr int kSpins = 10000;
  for (int spins = 0; !condition();) {
    if (spins < kSpins) {
      ++spins;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    } else {
      sched_yield();
    }
  }
}

class Barrier {
 public:
  void wait(int threads) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// How many steps of a sequence are done, for a team that reads them while others are being written.
class Progress {
 public:
  void reach(int64_t steps) { steps_.store(steps, std::memory_order_release); }
  void wait_for(int64_t steps) const {
    spin_until([&] { return steps_.load(std::memory_order_acquire) >= steps; });
  }

 private:
  alignas(64) std::atomic<int64_t> steps_{0};
};

class Team {
 public:
  Team(Barrier& barrier, int index, int size) : barrier_(barrier), index_(index), size_(size) {}
  int index() const { return index_; }
  int size() const { return size_; }
  void barrier() const {
    if (size_ > 1) barrier_.wait(size_);
  }
  // this thread's part of n items
  Span share(int64_t n) const { return {n * index_ / size_, n * (index_ + 1) / size_}; }

 private:
  Barrier& barrier_;
  int index_, size_;
};

// Whether this thread has called its OpenMP team.
inline constinit thread_local bool has_team = false;

// Runs f(index) in this thread's OpenMP team, which is the one that torch uses, on as many of its
// threads as are asked for; the others return at once. Returns false, and runs nothing, where the
// team has fewer. It is always the whole team that is called: OpenMP ends and creates threads where
// the size changes from call to call.
template <class F>
bool run_in_team(int threads, F&& f) {
  if (omp_get_max_threads() < threads || omp_in_parallel()) return false;
  has_team = true;
  bool complete = true;
#pragma omp parallel
  {
    const int index = omp_get_thread_num();
    if (omp_get_num_threads() < threads) {
      if (index == 0) complete = false;
    } else if (index < threads) {
      f(index);
    }
  }
  return complete;
}

// Runs f(job, team) for all jobs side by side, each on plan.threads threads; or one after the other
// on one thread if the team has fewer in all: the work has been planned, and its memory laid out,
// for that number.
template <class Job, class F>
void parallel(std::span<Job> jobs, F&& f) {
  int threads = 0;
  for (const Job& job : jobs) threads += job.plan.threads;
  const auto alone = [&] {
    for (Job& job : jobs) {
      if (job.plan.threads > 1) job.give_to_one_thread();
      f(job, Team(job.barrier, 0, 1));
    }
  };
  const auto work = [&](int index) {
    Job* job = jobs.data();
    for (; index >= job->plan.threads; ++job) index -= job->plan.threads;
    f(*job, Team(job->barrier, index, job->plan.threads));
  };
  if (threads == 1 || !run_in_team(threads, work)) alone();
}

}  // namespace rnnfast::cpu
