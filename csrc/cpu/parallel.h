// The team of threads that runs one whole sequence: how work is split, its barriers, and how it
// ends if one of its threads throws.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <span>

#include "cpu/cores.h"
#include "cpu/crew.h"
#include "cpu/wait.h"

namespace rnnfast::cpu {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The barriers of one job: one of all its threads, and one for each group of threads that share the
// same rows.
class Barriers {
 public:
  // Resets them for a new team.
  void prepare(int threads, int row_shares, int unit_shares);
  Barrier& all() { return all_; }
  Barrier& of_rows(int row_index) { return groups_ > 0 ? of_rows_[size_t(row_index)] : all_; }
  // Makes every thread that meets the threads of this row index throw Cancelled.
  void cancel(int row_index);

 private:
  Barrier all_;
  std::unique_ptr<Barrier[]> of_rows_;
  int groups_ = 0;  // 0 if all threads share the same rows, or none do
};

// One thread's view of the threads of a job. For the recurrence they form a grid of
// row_shares x unit_shares. Threads beyond the grid are idle during the recurrence and take part in
// the other work.
class Team {
 public:
  // A team of one thread.
  Team() = default;
  Team(Barriers& barriers, int index, int size, int row_shares, int unit_shares)
      : barriers_(&barriers),
        index_(index),
        size_(size),
        row_shares_(row_shares),
        unit_shares_(unit_shares) {}

  int index() const { return index_; }
  int size() const { return size_; }
  int row_shares() const { return row_shares_; }
  int unit_shares() const { return unit_shares_; }
  int row_index() const { return index_ / unit_shares_; }
  int unit_index() const { return index_ % unit_shares_; }
  bool idle() const { return index_ >= row_shares_ * unit_shares_; }

  // This thread's part of n items that are split across all threads.
  Span share(int64_t n) const { return part(n, index_, size_); }
  // Its part of n rows in the recurrence; the same for all threads of one row_index.
  Span share_rows(int64_t n) const {
    return idle() ? Span{n, n} : part(n, row_index(), row_shares_);
  }
  // Its part of n units, or panels of units; the same for all threads of one unit_index.
  Span share_units(int64_t n) const {
    return idle() ? Span{n, n} : part(n, unit_index(), unit_shares_);
  }

  // Waits for all threads of the job.
  void barrier() const {
    if (size_ > 1) barriers_->all().wait(size_);
  }
  // Waits for the threads that have the same rows.
  void unit_barrier() const {
    if (unit_shares_ > 1 && !idle()) barriers_->of_rows(row_index()).wait(unit_shares_);
  }

 private:
  static Span part(int64_t n, int index, int shares) {
    return {n * index / shares, n * (index + 1) / shares};
  }

  Barriers* barriers_ = nullptr;
  int index_ = 0, size_ = 1, row_shares_ = 1, unit_shares_ = 1;
};

// Measures the time that the threads of a team lose to other processes, for free_cores(). It does
// so for one call per kSampleNanoseconds at most.
class LossSample {
 public:
  LossSample();
  // Each thread calls `begin` before its work, and `end` with the result after it.
  int64_t begin() const { return start_ > 0 ? lost_by_thread() : 0; }
  void end(int64_t before) {
    if (start_ > 0) lost_.fetch_add(lost_by_thread() - before, std::memory_order_relaxed);
  }
  void note(int threads) const;

 private:
  // Nanoseconds in which the calling thread neither ran nor was parked, since a fixed but unknown
  // time: only differences have a meaning.
  static int64_t lost_by_thread();

  int64_t start_ = 0;  // 0 if this call is not measured
  std::atomic<int64_t> lost_{0};
};

// Whether this thread has run a team. A forked child process has none of the team's other threads.
inline constinit thread_local bool has_team = false;

// Runs f(index) for every index < threads, each on a thread of its own. f must not throw. The
// threads are those of the calling thread's OpenMP team, which torch uses too. The whole team is
// always called, and threads without work return at once: OpenMP ends and creates threads whenever
// the team size changes. Where the team has more threads than there are cores, a crew (cpu/crew.h)
// is used instead. Returns false and runs nothing if there are too few threads.
template <class F>
bool run_in_team(int threads, F&& f) {
  if (omp_get_max_threads() < threads || omp_in_parallel()) return false;
  has_team = true;
  LossSample sample;
  const auto work = [&](int index) {
    const int64_t before = sample.begin();
    f(index);
    sample.end(before);
  };
  bool complete = true;
  if (threads > 1 && omp_get_max_threads() > usable_cores() && omp_get_num_places() == 0) {
    complete = Crew::of_this_thread().run(threads, work);
  } else {
    Barrier end;
#pragma omp parallel
    {
      const int index = omp_get_thread_num();
      if (omp_get_num_threads() < threads) {
        if (index == 0) complete = false;
      } else if (index < threads) {
        work(index);
        // OpenMP's barrier at the end of the region spins for milliseconds. This barrier parks, and
        // so leaves the core to a thread that is still at work without one.
        if (index == 0 && threads > 1) end.wait(threads);
        if (index > 0) end.arrive(threads);
      }
    }
  }
  sample.note(threads);
  return complete;
}

// Keeps the first exception that a thread of a team throws, for the calling thread.
class Failure {
 public:
  void take();  // keeps the current exception if it is the first
  void rethrow() const;  // throws the kept exception, if any

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

// Runs f(job, team) for all jobs side by side, each on plan.threads threads. If there are fewer
// threads than that in sum, runs the jobs one after the other on the calling thread: a plan and its
// workspace are made for one number of threads. If f throws in any thread, the others end at their
// next wait and the exception is rethrown here.
template <class Job, class F>
void parallel(std::span<Job> jobs, F&& f) {
  int threads = 0;
  for (const Job& job : jobs) threads += job.plan.threads;
  if (threads > 1) {
    for (Job& job : jobs)
      job.barriers.prepare(job.plan.threads, job.plan.row_shares, job.plan.unit_shares);
    Failure failure;
    const auto work = [&](int index) {
      Job* job = jobs.data();
      for (; index >= job->plan.threads; ++job) index -= job->plan.threads;
      const Team team(job->barriers, index, job->plan.threads, job->plan.row_shares,
                      job->plan.unit_shares);
      try {
        f(*job, team);
        return;
      } catch (const Cancelled&) {  // another thread has thrown the real exception
      } catch (...) {
        failure.take();
      }
      job->barriers.cancel(team.row_index());
      if constexpr (requires { job->progress.cancel(); }) job->progress.cancel();
    };
    if (run_in_team(threads, work)) return failure.rethrow();
  }
  for (Job& job : jobs) {
    if (job.plan.threads > 1) job.use_one_thread();
    f(job, Team());
  }
}

}  // namespace rnnfast::cpu
