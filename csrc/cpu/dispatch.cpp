// Chooses the instruction set: the best that the machine has, or the one named by the environment
// variable RNNFAST_CPU_CAPABILITY.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <list>
#include <mutex>
#include <stdexcept>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/engine.h"
#include "cpu/targets.h"

// RNNFAST_PORTABLE_ONLY (see setup.py) omits all other instruction sets, for a faster build.
#if defined(__x86_64__) && !defined(RNNFAST_PORTABLE_ONLY)
#define RNNFAST_X86_TARGETS
#endif

namespace rnnfast::cpu {
namespace {

struct Capability {
  std::string name;
  const Engine& engine;
  const Target* target;  // null if the engine does not use micro-kernels
};

// The engine is never freed: references to it live as long as the process.
Capability make_capability(const std::string& name, const Target& target) {
  const CpuEngine& engine = *new CpuEngine(target);
  return {name, engine, &engine.target()};
}

#if defined(RNNFAST_X86_TARGETS)
// Linux lets a process use AMX's registers only after it has asked for permission.
bool may_use_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Target with_int8(Target target, const Int8Kernels& kernels) {
  set_int8(target, kernels);
  return target;
}
Target with_bf16(Target target) {
  target.kernels[int(Dtype::kBFloat16)] = kAvx512Bf16Kernels;
  return target;
}
Target with_amx(Target target) {
  static WeightFormat pairs;
  add_amx(target, pairs);
  return target;
}
#endif

// The capabilities of this machine and build, worst first.
const std::list<Capability>& usable() {
  static const std::list<Capability> list = [] {
    std::list<Capability> found;
    const auto add = [&](const char* name, const Target& target) {
      found.push_back(make_capability(name, target));
    };
    add("portable", kPortable);
#if defined(RNNFAST_X86_TARGETS)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
      return found;
    add("avx2", kAvx2);
    if (__builtin_cpu_supports("avxvnni")) add("avx2_vnni", with_int8(kAvx2, kAvx2Vnni));
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
      return found;
    add("avx512", kAvx512);
    if (!__builtin_cpu_supports("avx512vnni")) return found;
    const Target vnni = with_int8(kAvx512, kAvx512Vnni);
    add("avx512_vnni", vnni);
    if (!__builtin_cpu_supports("avx512bf16")) return found;
    add("avx512_bf16", with_bf16(vnni));
    if (!__builtin_cpu_supports("amx-bf16") || !may_use_amx()) return found;
    add("avx512_amx", with_amx(with_bf16(vnni)));
#endif
    return found;
  }();
  return list;
}

// The capabilities that tests have added.
std::list<Capability>& added() {
  static std::list<Capability> list;
  return list;
}
std::mutex added_mutex;

const Capability* find(const std::string& name) {
  for (const Capability& one : usable())
    if (name == one.name) return &one;
  const std::lock_guard lock(added_mutex);
  for (const Capability& one : added())
    if (name == one.name) return &one;
  std::string names;
  for (const Capability& one : usable()) names += (names.empty() ? "" : ", ") + one.name;
  throw std::invalid_argument("rnnfast: CPU capability '" + name +
                              "' is not available here; available: " + names);
}

std::atomic<const Capability*>& current() {
  static std::atomic<const Capability*> chosen{[] {
    const char* name = std::getenv("RNNFAST_CPU_CAPABILITY");
    return name && *name ? find(name) : &usable().back();
  }()};
  return chosen;
}

}  // namespace

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Capability& one : usable()) names.push_back(one.name);
  return names;
}

std::string capability() { return current().load()->name; }

void set_capability(const std::string& name) { current().store(find(name)); }

const Engine& engine() { return current().load(std::memory_order_relaxed)->engine; }

const Target& target_of(const std::string& name) {
  const Target* target = find(name)->target;
  if (!target) throw std::invalid_argument("rnnfast: '" + name + "' has no micro-kernels");
  return *target;
}

void add_engine(const std::string& name, const Engine& engine) {
  const std::lock_guard lock(added_mutex);
  added().push_back({name, engine, nullptr});
}

void add_target(const std::string& name, const std::string& base, void (*change)(Target&)) {
  Target target = target_of(base);
  change(target);
  const std::lock_guard lock(added_mutex);
  added().push_back(make_capability(name, target));
}

}  // namespace rnnfast::cpu
