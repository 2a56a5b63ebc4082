#include "cpu/parallel.h"

#include "cpu/tuning.h"

#if defined(__linux__)
#include <time.h>
#endif

namespace rnnfast::cpu {

void Barriers::prepare(int threads, int row_shares, int unit_shares) {
  all_.reset();
  groups_ = unit_shares > 1 && unit_shares < threads ? row_shares : 0;
  of_rows_ = groups_ > 0 ? std::make_unique<Barrier[]>(size_t(groups_)) : nullptr;
}

void Barriers::cancel(int row_index) {
  all_.cancel();
  if (row_index < groups_) of_rows(row_index).cancel();
}

LossSample::LossSample() {
  static std::atomic<int64_t> due{0};
  const int64_t now = nanoseconds_now();
  if (now < due.load(std::memory_order_relaxed)) return;
  due.store(now + kSampleNanoseconds, std::memory_order_relaxed);
  start_ = now;
}

int64_t LossSample::lost_by_thread() {
#if defined(__linux__)
  timespec used;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
  return nanoseconds_now() - used.tv_sec * 1'000'000'000 - used.tv_nsec - nanoseconds_parked();
#else
  return 0;
#endif
}

void LossSample::note(int threads) const {
  if (start_ > 0 && threads > 1) note_losses(threads, lost_.load(), nanoseconds_now() - start_);
}

void Failure::take() {
  const std::lock_guard lock(mutex_);
  if (!first_) first_ = std::current_exception();
}

void Failure::rethrow() const {
  if (first_) std::rethrow_exception(first_);
}

}  // namespace rnnfast::cpu
