// Threads of the library's own, where OpenMP's team has more threads than there are cores.
#pragma once

#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/wait.h"

namespace rnnfast::cpu {

// In a container that may use 2 of 64 cores torch has 64 threads. To call them all takes longer
// than a small layer, and they push those that work from core to core. A crew has no more threads
// than a call asks for, and keeps them, parked, for the next call.
class Crew {
 public:
  // The crew of the calling thread, like OpenMP's teams. It ends with the thread.
  static Crew& of_this_thread();
  // Drops the crew of the calling thread, in a child process: its threads have stayed behind.
  static void forget();

  Crew() = default;
  Crew(const Crew&) = delete;
  ~Crew();

  // Runs f(index), which must not throw, for all index < threads: 0 in the calling thread. Returns
  // false, and runs nothing, if the system gives no more threads.
  template <class F>
  bool run(int threads, F& f) {
    return run(threads, {[](void* f, int index) { (*static_cast<F*>(f))(index); },
                         const_cast<std::remove_const_t<F>*>(&f)});
  }

 private:
  struct Work {
    void (*function)(void*, int);  // null: the end
    void* argument;
  };
  struct Worker {
    Barrier start;  // of the worker and the one who calls it
    std::thread thread;
  };
  bool run(int threads, Work work);
  void live(int index, Barrier& start);

  std::vector<std::unique_ptr<Worker>> workers_;  // the one with index i at i - 1
  Work work_{};
  int threads_ = 0;  // that work_ is for
  Barrier end_;
};

}  // namespace rnnfast::cpu
