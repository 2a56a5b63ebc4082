#include "torch/threads.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cores.h"
#include "cpu/crew.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace rnnfast {
namespace {

// State of a forked child process, for the thread that forked: fork copies only that thread, so its
// OpenMP team is gone. Threads that the child starts have new teams.
thread_local bool team_is_lost = false;
thread_local bool should_warn = false;  // whether several threads would have been used
bool several_threads_before_fork = false;

int count_threads() {
  struct stat tasks;  // the link count of a folder is 2 plus its number of subfolders
  return stat("/proc/self/task", &tasks) == 0 ? int(tasks.st_nlink) - 2 : 1;
}

// There is no way to tell whether the process's threads are OpenMP's or another library's. If they
// are OpenMP's, calling the team in the child would hang; if not, using one thread is only slower.
void prepare_fork() { several_threads_before_fork = count_threads() > 1; }

void continue_child() {
  cpu::Crew::forget();
  if (!several_threads_before_fork) return;
  team_is_lost = true;
  should_warn = at::get_num_threads() > 1;
  // torch's own operations would wait for the same team, maybe before the first call here.
  if (cpu::has_team) at::set_num_threads(1);
}

[[maybe_unused]] const int registered = pthread_atfork(&prepare_fork, nullptr, &continue_child);

void warn() {
  static bool has_warned = false;
  if (has_warned) return;
  has_warned = true;
  const pybind11::gil_scoped_acquire acquire;
  if (PyErr_WarnEx(PyExc_RuntimeWarning,
                   "rnnfast: this process was forked from one that ran on several threads. OpenMP "
                   "cannot use threads after that, so rnnfast and torch run on one thread. Start "
                   "processes with the method 'spawn' or 'forkserver' to use several.",
                   1) < 0)
    throw pybind11::error_already_set();
}

}  // namespace

int usable_threads() {
  const int threads = at::get_num_threads();
  if (!team_is_lost) return threads > 1 ? std::min(threads, cpu::free_cores()) : 1;
  if (threads > 1) at::set_num_threads(1);
  if (threads > 1 || should_warn) warn();
  return 1;
}

namespace {

// A job for parallel() without any computation.
struct EmptyJob {
  struct {
    int threads, row_shares, unit_shares;
  } plan;
  cpu::Barriers barriers;
  cpu::Progress progress;
  cpu::Progress* upstream = nullptr;

  void use_one_thread() {}
};

// For tests: runs a team of row_shares x unit_shares threads, of which one throws at its n-th
// barrier, after `seconds`. Meanwhile the others wait at that barrier, and a second job waits for
// the progress of the first.
void fail_in_team(int row_shares, int unit_shares, int failing_thread, int nth_barrier,
                  double seconds) {
  std::vector<EmptyJob> jobs(2);
  jobs[0].plan = {row_shares * unit_shares, row_shares, unit_shares};
  jobs[1].plan = {1, 1, 1};
  jobs[1].upstream = &jobs[0].progress;
  cpu::parallel(std::span(jobs), [&](EmptyJob& job, const cpu::Team& team) {
    if (job.upstream) return job.upstream->wait_for(1);
    for (int n = 1; n <= nth_barrier + 10; ++n) {
      if (team.index() == failing_thread && n == nth_barrier) {
        std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
        throw std::runtime_error("thread " + std::to_string(team.index()) + " of " +
                                 std::to_string(team.size()) + " failed");
      }
      n % 3 == 0 ? team.barrier() : team.unit_barrier();
    }
  });
}

}  // namespace

void bind_threads(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("usable_cores", &cpu::usable_cores);
  m.def("free_cores", &cpu::free_cores);
  m.def("assume_cores", &cpu::assume_cores, py::arg("cores"));
  m.def("quota_cores", &cpu::quota_cores, py::arg("root") = "");
  m.def("barrier_cycles", [](int threads) {
    const cpu::BarrierCycles table = cpu::measured_barriers(threads);
    return std::vector<double>(table.of_doublings.begin() + 1, table.of_doublings.end());
  });
  m.def("fail_in_team", &fail_in_team, py::arg("row_shares"), py::arg("unit_shares"),
        py::arg("failing_thread"), py::arg("nth_barrier"), py::arg("seconds") = 0.0,
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace rnnfast
