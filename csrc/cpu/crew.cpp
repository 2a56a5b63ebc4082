#include "cpu/crew.h"

#include <system_error>

namespace rnnfast::cpu {
namespace {

thread_local std::unique_ptr<Crew> crew;

}  // namespace

Crew& Crew::of_this_thread() {
  if (!crew) crew = std::make_unique<Crew>();
  return *crew;
}

// Leaks the crew: its destructor would wait for threads that do not exist in this process.
void Crew::forget() { [[maybe_unused]] const Crew* left_behind = crew.release(); }

Crew::~Crew() {
  work_ = {};
  for (const auto& worker : workers_) {
    worker->start.arrive(2);
    worker->thread.join();
  }
}

bool Crew::run(int threads, Work work) {
  while (int(workers_.size()) < threads - 1) {
    auto worker = std::make_unique<Worker>();
    const int index = int(workers_.size()) + 1;
    try {
      worker->thread =
          std::thread([this, index, &start = worker->start] { worker_loop(index, start); });
    } catch (const std::system_error&) {
      return false;
    }
    workers_.push_back(std::move(worker));
  }
  work_ = work;
  threads_ = threads;
  for (int i = 1; i < threads; ++i) workers_[size_t(i - 1)]->start.arrive(2);
  work.function(work.argument, 0);
  if (threads > 1) end_.wait(threads);
  return true;
}

void Crew::worker_loop(int index, Barrier& start) {
  for (;;) {
    start.wait(2);
    if (!work_.function) return;
    work_.function(work_.argument, index);
    end_.arrive(threads_);
  }
}

}  // namespace rnnfast::cpu
