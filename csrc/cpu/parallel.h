// The team of threads that runs one whole sequence: its shares of the work, its barriers, and how
// it ends when one of its threads fails.
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

// The barriers of one job: of all its threads, and of those that share the same rows.
class Barriers {
 public:
  // Makes them ready for a team that has not met yet.
  void prepare(int threads, int row_shares, int unit_shares);
  Barrier& all() { return all_; }
  Barrier& of_rows(int row_index) { return groups_ > 0 ? of_rows_[size_t(row_index)] : all_; }
  // Ends the waiting of all that meet a thread of this row.
  void cancel(int row_index);

 private:
  Barrier all_;
  std::unique_ptr<Barrier[]> of_rows_;
  int groups_ = 0;  // 0 where the threads of the same rows are all threads
};

// One thread's view of the threads of a job. They form a grid of row_shares x unit_shares for the
// recurrence; those beyond the grid are idle in it and share the other work.
class Team {
 public:
  // a thread alone
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

  // This thread's part of n items that all threads share.
  Span share(int64_t n) const { return part(n, index_, size_); }
  // Its part of n rows, in the recurrence. The threads of one row_index have the same.
  Span share_rows(int64_t n) const {
    return idle() ? Span{n, n} : part(n, row_index(), row_shares_);
  }
  // Its part of n units, or panels of units. The threads of one unit_index have the same.
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

// The time that the threads of a team have lost to other processes; see free_cores().
class LossSample {
 public:
  LossSample();
  // Around the work of each thread.
  int64_t begin() const { return start_ > 0 ? lost_by_thread() : 0; }
  void end(int64_t before) {
    if (start_ > 0) lost_.fetch_add(lost_by_thread() - before, std::memory_order_relaxed);
  }
  void note(int threads) const;

 private:
  // By the calling thread so far, from some beginning on, in nanoseconds.
  static int64_t lost_by_thread();

  int64_t start_ = 0;  // 0: not taken, as there has just been one
  std::atomic<int64_t> lost_{0};
};

// Whether this thread has worked with others. A process that it forks off has none of them.
inline constinit thread_local bool has_team = false;

// Runs f(index), which must not throw, on so many threads: on those of this thread's OpenMP team,
// which is the one that torch uses, while the others return at once. It is always the whole team
// that is called: OpenMP ends and creates threads where the size changes from call to call. Where
// the team has more threads than there are cores, a crew (cpu/crew.h) works in its place. Returns
// false, and runs nothing, where there are fewer threads.
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
        // OpenMP's own wait for the end spins for milliseconds. This one leaves the core to a
        // thread that has lost its own.
        if (index == 0 && threads > 1) end.wait(threads);
        if (index > 0) end.arrive(threads);
      }
    }
  }
  sample.note(threads);
  return complete;
}

// The first exception of a team, for the thread that has called it.
class Failure {
 public:
  void take();  // the current exception, if it is the first
  void rethrow() const;  // if there is one

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

// Runs f(job, team) for all jobs side by side, each on plan.threads threads; or one after the other
// on one thread if the team has fewer in all: the work has been planned, and its memory laid out,
// for that number. If f throws, in whichever thread, the others end at their next wait and the
// exception is thrown here.
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
      } catch (const Cancelled&) {  // by another thread, whose exception it is
      } catch (...) {
        failure.take();
      }
      job->barriers.cancel(team.row_index());
      if constexpr (requires { job->progress.cancel(); }) job->progress.cancel();
    };
    if (run_in_team(threads, work)) return failure.rethrow();
  }
  for (Job& job : jobs) {
    if (job.plan.threads > 1) job.give_to_one_thread();
    f(job, Team());
  }
}

}  // namespace rnnfast::cpu
