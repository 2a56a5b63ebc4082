// The slow ways of waiting: threads that park, and teams that fail.
#include "cpu/parallel.h"

#include <chrono>
#include <climits>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnnfast::cpu {

int64_t nanoseconds_now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

namespace {

// Spins for a bounded time. Returns false if the condition has not come true by then.
template <class Condition>
bool spin_until(Condition&& condition) {
  constexpr int kSpinsPerLook = 64;  // at the clock
  for (int64_t until = 0;;) {
    for (int spins = 0; spins < kSpinsPerLook; ++spins) {
      if (condition()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    const int64_t now = nanoseconds_now();
    if (until == 0) until = now + kSpinNanoseconds;
    if (now >= until) return condition();
  }
}

// Parks this thread while `word` has this value. It may return early.
void park_on(const std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  word.wait(value);
#endif
}
void unpark_from(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  word.notify_all();
#endif
}

}  // namespace

void Barrier::cancel() {
  round_.fetch_or(kCancelled);
  unpark();
}

void Barrier::unpark() { unpark_from(round_); }

void Barrier::wait_for_end(uint32_t round, int threads) {
  const auto over = [&] { return round_.load(std::memory_order_acquire) != round; };
  if (!spin_until(over)) {
    while (!over()) {
      // The last thread to come sees the mark and wakes the others. If it has come before, it is
      // just about to tell so, and may have reset the count.
      const uint32_t arrived = arrived_.fetch_or(kParked, std::memory_order_acq_rel) & ~kParked;
      if (arrived == 0 || arrived == uint32_t(threads))
        std::this_thread::yield();
      else
        park_on(round_, round);
    }
  }
  if (round_.load(std::memory_order_relaxed) & kCancelled) throw Cancelled{};
}

void Barriers::prepare(int threads, int row_shares, int unit_shares) {
  all_.reset();
  groups_ = unit_shares > 1 && unit_shares < threads ? row_shares : 0;
  of_rows_ = groups_ > 0 ? std::make_unique<Barrier[]>(size_t(groups_)) : nullptr;
}

void Barriers::cancel(int row_index) {
  all_.cancel();
  if (row_index < groups_) of_rows(row_index).cancel();
}

void Progress::unpark() {
  news_.fetch_add(1);
  unpark_from(news_);
}

void Progress::wait_long(int64_t steps) const {
  const auto over = [&] { return steps_.load() >= steps || cancelled_.load(); };
  if (!spin_until(over)) {
    parked_.fetch_add(1);
    for (;;) {
      const uint32_t news = news_.load();
      if (over()) break;
      park_on(news_, news);
    }
    parked_.fetch_sub(1);
  }
  if (steps_.load() < steps) throw Cancelled{};
}

void Failure::take() {
  const std::lock_guard lock(mutex_);
  if (!first_) first_ = std::current_exception();
}

void Failure::rethrow() const {
  if (first_) std::rethrow_exception(first_);
}

}  // namespace rnnfast::cpu
