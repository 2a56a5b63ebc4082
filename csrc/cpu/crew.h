// The library's own threads, used where OpenMP's team has more threads than there are cores.
#pragma once

#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/wait.h"

namespace rnnfast::cpu {

// A small thread pool. In a container that may use 2 of 64 cores, torch has 64 threads. Waking them
// all takes longer than a small layer, and the idle ones displace the working ones from their
// cores. A crew has no more threads than its calls ask for, and parks them between calls.
class Crew {
 public:
  // The calling thread's crew. Each thread has its own, as with OpenMP's teams; it ends with the
  // thread.
  static Crew& of_this_thread();
  // Drops the calling thread's crew in a forked child process, where its threads do not exist.
  static void forget();

  Crew() = default;
  Crew(const Crew&) = delete;
  ~Crew();

  // Runs f(index) for every index < threads, index 0 in the calling thread. f must not throw.
  // Returns false and runs nothing if the system refuses to create a thread.
  template <class F>
  bool run(int threads, F& f) {
    return run(threads, {[](void* f, int index) { (*static_cast<F*>(f))(index); },
                         const_cast<std::remove_const_t<F>*>(&f)});
  }

 private:
  struct Work {
    void (*function)(void*, int);  // null tells the threads to end
    void* argument;
  };
  struct Worker {
    Barrier start;  // between the worker and the calling thread
    std::thread thread;
  };
  bool run(int threads, Work work);
  void worker_loop(int index, Barrier& start);

  std::vector<std::unique_ptr<Worker>> workers_;  // index i is at i - 1
  Work work_{};
  int threads_ = 0;  // number of threads that run work_
  Barrier end_;
};

}  // namespace rnnfast::cpu
