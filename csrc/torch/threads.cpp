#include "torch/threads.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <sys/stat.h>

#include "cpu/parallel.h"

namespace rnnfast {
namespace {

// Of the thread that forked, in the new process; threads that this one starts get teams of their
// own.
thread_local bool team_is_lost = false;
thread_local bool should_warn = false;  // it would have run on several threads
bool several_threads_before_fork = false;

int count_threads() {
  struct stat tasks;  // a folder has two links of its own and one of each folder in it
  return stat("/proc/self/task", &tasks) == 0 ? int(tasks.st_nlink) - 2 : 1;
}

// Whose threads they are cannot be told: OpenMP's, or only those of another library. To take one
// thread for several does no harm; to call a team that is not there would never end.
void prepare_fork() { several_threads_before_fork = count_threads() > 1; }

void continue_child() {
  if (!several_threads_before_fork) return;
  team_is_lost = true;
  should_warn = at::get_num_threads() > 1;
  // torch's own operations, before the first call here, would wait for the same team
  if (cpu::has_team) at::set_num_threads(1);
}

[[maybe_unused]] const int registered = pthread_atfork(&prepare_fork, nullptr, &continue_child);

void warn() {
  static bool has_warned = false;
  if (has_warned) return;
  has_warned = true;
  const pybind11::gil_scoped_acquire acquire;
  if (PyErr_WarnEx(PyExc_RuntimeWarning,
                   "rnnfast: this process was forked from one that ran on several threads, which "
                   "OpenMP cannot use here. rnnfast and torch run on one thread. Start processes "
                   "by the method 'spawn' or 'forkserver' to use several.",
                   1) < 0)
    throw pybind11::error_already_set();
}

}  // namespace

int usable_threads() {
  const int threads = at::get_num_threads();
  if (!team_is_lost) return threads;
  if (threads > 1) at::set_num_threads(1);
  if (threads > 1 || should_warn) warn();
  return 1;
}

}  // namespace rnnfast
