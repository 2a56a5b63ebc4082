// Chooses the instruction set: the best the machine has, or what RNNFAST_CPU_CAPABILITY names.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

// RNNFAST_PORTABLE_ONLY (setup.py) leaves the other instruction sets out, for a build in less time.
#if defined(__x86_64__) && !defined(RNNFAST_PORTABLE_ONLY)
#define RNNFAST_X86_TARGETS
#endif

namespace rnnfast {

namespace cuda_emulation {
const cpu::KernelTable& kernel_table();
}

namespace cpu {
namespace portable {
const KernelTable& kernel_table();
}
#if defined(RNNFAST_X86_TARGETS)
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}
namespace avx512_bf16 {
const KernelTable& kernel_table();
}
namespace avx512_amx {
const KernelTable& kernel_table();
}
#endif

namespace {

struct Capability {
  const char* name;
  const KernelTable& table;
};

#if defined(RNNFAST_X86_TARGETS)
// Linux lends the matrix unit's registers to processes that ask for them.
bool may_use_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<Capability>& usable() {
  static const std::vector<Capability> list = [] {
    std::vector<Capability> found{{"portable", portable::kernel_table()}};
#if defined(RNNFAST_X86_TARGETS)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.push_back({"avx2", avx2::kernel_table()});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.push_back({"avx512", avx512::kernel_table()});
    if (found.back().name == std::string("avx512") && __builtin_cpu_supports("avx512bf16"))
      found.push_back({"avx512_bf16", avx512_bf16::kernel_table()});
    if (found.back().name == std::string("avx512_bf16") && __builtin_cpu_supports("amx-bf16") &&
        may_use_amx())
      found.push_back({"avx512_amx", avx512_amx::kernel_table()});
#endif
    return found;
  }();
  return list;
}

const Capability* find(const std::string& name) {
  for (const Capability& one : usable())
    if (name == one.name) return &one;
  static const Capability emulation{"cuda_emulation", cuda_emulation::kernel_table()};
  if (name == emulation.name) return &emulation;
  std::string names;
  for (const Capability& one : usable()) names += std::string(names.empty() ? "" : ", ") + one.name;
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
  for (const Capability& one : usable()) names.emplace_back(one.name);
  return names;
}

std::string capability() { return current().load()->name; }

void set_capability(const std::string& name) { current().store(find(name)); }

const KernelTable& kernel_table() { return current().load(std::memory_order_relaxed)->table; }

}  // namespace cpu
}  // namespace rnnfast
