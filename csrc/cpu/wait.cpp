// The slow paths of waiting: parking, waking and cancelling.
#include "cpu/wait.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <thread>

#include "cpu/tuning.h"

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

// Decides whether this thread spins before it parks. When other processes leave two threads a
// single core, spinning is useless: the spinning thread holds the core that the other one needs. So
// after kEnough useless spins in a row, only one wait in kOneOf spins, to see whether it helps
// again.
class Patience {
 public:
  bool spins() { return in_vain_ < kEnough || ++skipped_ % kOneOf == 0; }
  void note(bool helped) { in_vain_ = helped ? 0 : std::min(in_vain_ + 1, kEnough); }

 private:
  static constexpr int kEnough = 3, kOneOf = 16;
  int in_vain_ = 0, skipped_ = 0;
};
constinit thread_local Patience patience;

// See nanoseconds_parked().
constinit thread_local int64_t parked_nanoseconds = 0;

// Adds the time from construction until the wake-up to parked_nanoseconds.
class Parked {
 public:
  explicit Parked(const std::atomic<int64_t>& woken_at) : woken_at_(woken_at) {}
  Parked(const Parked&) = delete;
  ~Parked() { parked_nanoseconds += std::max<int64_t>(0, woken_at_.load() - start_); }

 private:
  const std::atomic<int64_t>& woken_at_;
  const int64_t start_ = nanoseconds_now();
};

// Spins until the condition is true, for kSpinNanoseconds at most. Returns whether it is true.
template <class Condition>
bool spin_until(Condition&& condition) {
  constexpr int kSpinsPerLook = 64;  // reading the clock takes longer than a spin
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

// Spins if that is likely to help, else checks once. Returns whether the condition is true.
template <class Condition>
bool may_spin_until(Condition&& condition) {
  if (!patience.spins()) return condition();
  const bool helped = spin_until(condition);
  patience.note(helped);
  return helped;
}

// Parks this thread while `word` has this value. May return early.
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

int64_t nanoseconds_parked() { return parked_nanoseconds; }

void Barrier::cancel() {
  round_.fetch_or(kCancelled);
  unpark_from(round_);
}

void Barrier::end_with_parked(uint32_t round) {
  woken_at_.store(nanoseconds_now());
  round_.store(round + kRound);
  unpark_from(round_);
}

void Barrier::wait_for_end(uint32_t round, int threads) {
  const auto over = [&] { return round_.load(std::memory_order_acquire) != round; };
  if (!may_spin_until(over)) {
    const Parked parked(woken_at_);
    while (!over()) {
      // The last thread to arrive sees the mark kParked and wakes the others. If it has already
      // arrived, it is about to end the round and may have reset the count: then do not park.
      const uint32_t arrived = arrived_.fetch_or(kParked, std::memory_order_acq_rel) & ~kParked;
      if (arrived == 0 || arrived == uint32_t(threads))
        std::this_thread::yield();
      else
        park_on(round_, round);
    }
  }
  if (round_.load(std::memory_order_relaxed) & kCancelled) throw Cancelled{};
}

void Progress::unpark() {
  woken_at_.store(nanoseconds_now());
  news_.fetch_add(1);
  unpark_from(news_);
}

void Progress::wait_long(int64_t steps) const {
  const auto over = [&] { return steps_.load() >= steps || cancelled_.load(); };
  if (!may_spin_until(over)) {
    const Parked parked(woken_at_);
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

}  // namespace rnnfast::cpu
