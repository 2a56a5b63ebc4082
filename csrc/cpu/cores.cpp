// Counts usable cores from the affinity of threads and the quota of the process's control groups.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <mutex>
#include <sstream>
#include <string>

#include "cpu/cores.h"

#include "cpu/tuning.h"

namespace rnnfast::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr double kNoLimit = std::numeric_limits<double>::infinity();

std::string read(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

bool has_word(std::string words, const std::string& word) {
  return ("," + words + ",").find("," + word + ",") != std::string::npos;
}

// The quota set in one folder of a control group hierarchy, version 2 or 1.
double quota_in(const std::string& folder) {
  double quota = 0, period = 0;
  std::istringstream version2(read(folder + "/cpu.max"));  // "max 100000" or "150000 100000"
  if (version2 >> quota >> period) return quota / period;
  std::istringstream quota1(read(folder + "/cpu.cfs_quota_us"));  // -1 if there is none
  std::istringstream period1(read(folder + "/cpu.cfs_period_us"));
  if (quota1 >> quota && period1 >> period && quota > 0 && period > 0) return quota / period;
  return kNoLimit;
}

// A mounted control group hierarchy: its folder `root` appears at the path `point`.
struct Mount {
  std::string root, point;
};

// Parses a line of /proc/self/mountinfo: "36 35 98:0 /root /point options ... - type source super".
// Returns false unless the line mounts a cgroup hierarchy of this version with the CPU controller.
bool parse_mount(const std::string& line, bool version2, Mount& mount) {
  const size_t dash = line.find(" - ");
  if (dash == std::string::npos) return false;
  std::istringstream first(line), second(line.substr(dash + 3));
  std::string skipped, type, source, super;
  first >> skipped >> skipped >> skipped >> mount.root >> mount.point;
  second >> type >> source >> super;
  return version2 ? type == "cgroup2" : type == "cgroup" && has_word(super, "cpu");
}

// The smallest quota of a group and its parents, as far as they are mounted.
double quota_of(const std::string& root, const Mount& mount, std::string group) {
  if (mount.root != "/" && group.starts_with(mount.root)) group.erase(0, mount.root.size());
  double quota = kNoLimit;
  for (;;) {
    quota = std::min(quota, quota_in(root + mount.point + group));
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return quota;
    group.erase(slash);
  }
}

// The affinity of the calling thread. Where OpenMP binds each thread to a core (OMP_PROC_BIND,
// GOMP_CPU_AFFINITY) it is the affinity of the process.
int affinity_cores() { return std::max(1, omp_get_num_procs()); }

std::atomic<int>& assumed() {
  static std::atomic<int> cores{[] {
    const char* number = std::getenv("RNNFAST_ASSUME_CORES");
    return number ? std::max(0, std::atoi(number)) : 0;
  }()};
  return cores;
}

// A cached value that expires.
template <class T>
class Expiring {
 public:
  template <class Find>
  T get(Clock::time_point now, Clock::duration keep, Find&& find) {
    if (now.time_since_epoch().count() >= until_.load(std::memory_order_acquire)) {
      value_.store(find(), std::memory_order_relaxed);
      until_.store((now + keep).time_since_epoch().count(), std::memory_order_release);
    }
    return value_.load(std::memory_order_relaxed);
  }

 private:
  std::atomic<T> value_{};
  std::atomic<Clock::rep> until_{0};
};

// The state of free_cores(): a limit that falls by a quarter when too much time is lost, and rises
// by a quarter when it has been held for some time. The time doubles if the losses soon return.
class FreeCores {
 public:
  int get(int usable) {
    if (limit_.load(std::memory_order_relaxed) >= usable) return usable;
    // In a child process the lock may be held for ever, by a thread that was not forked.
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return std::min(usable, limit_.load());
    if (const double now = seconds_now(); now >= try_at_) {
      tried_ = now;
      try_at_ = now + kMinHoldSeconds;
      limit_ = limit_ + std::max(1, limit_ / 4);
    }
    return std::min(usable, limit_.load());
  }

  void note(int threads, double lost, double elapsed) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    lost_ += lost;
    elapsed_ += elapsed;
    if (elapsed_ < kLookSeconds) return;
    if (lost_ > kTooMuchLost * elapsed_) {
      const double now = seconds_now();
      hold_ = now < tried_ + 3 * kMinHoldSeconds ? std::min(2 * hold_, kMaxHoldSeconds)
                                                 : kMinHoldSeconds;
      try_at_ = now + hold_;
      limit_ = threads - std::max(1, threads / 4);
    }
    lost_ = elapsed_ = 0;
  }

 private:
  static double seconds_now() {
    return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
  }

  std::mutex mutex_;
  std::atomic<int> limit_{std::numeric_limits<int>::max() / 2};
  double lost_ = 0, elapsed_ = 0;  // since the last decision
  double tried_ = 0, hold_ = 0, try_at_ = 0;
};

FreeCores free_now;

}  // namespace

double quota_cores(const std::string& root) {
  const std::string mounts = read(root + "/proc/self/mountinfo");
  std::istringstream groups(read(root + "/proc/self/cgroup"));
  double quota = kNoLimit;
  for (std::string line; std::getline(groups, line);) {  // "0::/group" or "4:cpu,cpuacct:/group"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool version2 = controllers.empty();
    if (!version2 && !has_word(controllers, "cpu")) continue;
    std::istringstream lines(mounts);
    Mount mount;
    for (std::string one; std::getline(lines, one);)
      if (parse_mount(one, version2, mount))
        quota = std::min(quota, quota_of(root, mount, line.substr(second + 1)));
  }
  return quota;
}

int usable_cores() {
  if (const int cores = assumed().load(std::memory_order_relaxed)) return cores;
  // The system call takes 0.3 us, reading the files 50 us.
  constexpr Clock::duration kKeepAffinity = std::chrono::milliseconds(50);
  constexpr Clock::duration kKeepQuota = std::chrono::seconds(2);
  static thread_local Expiring<int> affinity;  // affinity is a property of the thread
  static Expiring<double> quota;
  const Clock::time_point now = Clock::now();
  const int cores = affinity.get(now, kKeepAffinity, affinity_cores);
  const double limit = quota.get(now, kKeepQuota, [] { return quota_cores(""); });
  // Rounded up: under a quota of 1.5 cores two threads can run most of the time.
  return limit < cores ? std::max(1, int(std::ceil(limit))) : cores;
}

int free_cores() {
  if (const int cores = assumed().load(std::memory_order_relaxed)) return cores;
  return free_now.get(usable_cores());
}

void note_losses(int threads, int64_t lost, int64_t elapsed) {
  free_now.note(threads, 1e-9 * double(lost), 1e-9 * double(elapsed));
}

void assume_cores(int cores) { assumed().store(cores); }

}  // namespace rnnfast::cpu
