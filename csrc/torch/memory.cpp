#include "torch/memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

namespace rnnfast {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kLeast = 64 << 10;  // smaller tensors come from torch's allocator
constexpr size_t kMostIdle = 256 << 20;
constexpr size_t kPage = 4096, kLine = 64;

// Keeps the blocks in use and the idle blocks. A request reuses an idle block that is at most a
// quarter too large; workspaces take any block that is large enough. If there is none, a block is
// allocated. If the pool would then exceed 1.25 times the peak of bytes in use, idle blocks are
// freed first, from the one that has been idle for longest.
class Pool {
 public:
  // `for_short`: the block is a workspace, which is soon given back.
  void* take(size_t bytes, bool for_short) {
    const size_t granule = bytes < kHugePage ? kLeast : kHugePage;
    const size_t size = (bytes + granule - 1) / granule * granule;
    const std::lock_guard lock(mutex_);
    auto fit = idle_.lower_bound(size);
    if (fit != idle_.end() && !for_short && fit->first > size + size / 4) fit = idle_.end();
    if (fit != idle_.end()) {
      const Block block = fit->second;
      forget(fit);
      return use(block, bytes);
    }
    most_used_ = std::max(most_used_, used_bytes_ + size);
    const size_t total = used_bytes_ + size + idle_bytes_, most = most_used_ + most_used_ / 4;
    if (total > most) release_idle(total - most);
    Block block{std::aligned_alloc(granule, size), size};
    if (!block.base && release_idle(idle_bytes_)) block.base = std::aligned_alloc(granule, size);
    TORCH_CHECK_WITH(OutOfMemoryError, block.base, "rnnfast: could not allocate ", size, " bytes");
#ifdef MADV_HUGEPAGE
    if (granule == kHugePage) madvise(block.base, size, MADV_HUGEPAGE);  // a hint: may be refused
#endif
    return use(block, bytes);
  }

  void give_back(void* data) {
    const std::lock_guard lock(mutex_);
    const auto used = in_use_.find(data);
    Block block = used->second;
    in_use_.erase(used);
    used_bytes_ -= block.size;
    block.idle_since = ++returns_;
    by_age_.emplace(block.idle_since, idle_.emplace(block.size, block));
    idle_bytes_ += block.size;
    if (idle_bytes_ > kMostIdle) release_idle(idle_bytes_ - kMostIdle);
  }

  size_t release() {
    const std::lock_guard lock(mutex_);
    most_used_ = used_bytes_;
    return release_idle(idle_bytes_);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Block {
    void* base;
    size_t size;
    uint64_t idle_since = 0;  // the value of returns_ when it became idle
  };
  using Idle = std::multimap<size_t, Block>;  // by size

  // Places the data at a different cache line of the page in each block, if the block has room. If
  // all tensors began at the start of a page, they would compete for the same sets of L1.
  void* use(const Block& block, size_t bytes) {
    lines_ += 5;
    const size_t room = (block.size - bytes) / kLine * kLine;
    void* data = static_cast<char*>(block.base) + std::min(room, lines_ * kLine % kPage);
    in_use_.emplace(data, block);
    used_bytes_ += block.size;
    return data;
  }

  // Frees blocks, the longest idle first, until `bytes` bytes are freed or none is left.
  size_t release_idle(size_t bytes) {
    size_t released = 0;
    while (released < bytes && !by_age_.empty()) {
      const auto oldest = by_age_.begin()->second;
      released += oldest->first;
      std::free(oldest->second.base);
      forget(oldest);
    }
    return released;
  }
  void forget(Idle::iterator idle) {
    idle_bytes_ -= idle->first;
    by_age_.erase(idle->second.idle_since);
    idle_.erase(idle);
  }

  std::mutex mutex_;
  Idle idle_;
  std::map<uint64_t, Idle::iterator> by_age_;
  std::unordered_map<void*, Block> in_use_;  // by the address of their data
  size_t idle_bytes_ = 0, used_bytes_ = 0, most_used_ = 0, lines_ = 0;
  uint64_t returns_ = 0;
};

// The pool is never destroyed, so that it outlives every tensor. Its lock is held during a fork, so
// that the child's copy is consistent.
Pool& pool() {
  static Pool& one = []() -> Pool& {
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); },
                   [] { pool().mutex().unlock(); });
    return *new Pool();
  }();
  return one;
}

template <bool kWorkspace>
class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = pool().take(std::max<size_t>(bytes, 1), kWorkspace);
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &give_back, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void give_back(void* block) {
    c10::profiledCPUMemoryReporter().Delete(block);
    pool().give_back(block);
  }
};

template <bool kWorkspace>
PoolAllocator<kWorkspace>& allocator() {
  static auto& one = *new PoolAllocator<kWorkspace>();
  return one;
}

// Whether the user wants new memory to be filled, see
// torch.utils.deterministic.fill_uninitialized_memory.
bool fills_new_memory() {
  const at::Context& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

at::Tensor pooled(at::IntArrayRef shape, at::ScalarType type) {
  at::Tensor result = at::detail::empty_generic(
      shape, &allocator<false>(), c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt);
  if (fills_new_memory()) at::isFloatingType(type) ? result.fill_(NAN) : result.fill_(255);
  return result;
}

// Memory for the small workspaces of a thread. Allocating it afresh would take a tenth of the time
// of a small step.
class SmallWorkspace {
 public:
  ~SmallWorkspace() { std::free(data_); }
  // Returns null if it is in use.
  void* take() {
    if (in_use_) return nullptr;
    if (!data_) data_ = std::aligned_alloc(kLine, kLeast);
    in_use_ = data_ != nullptr;
    return data_;
  }
  void give_back() { in_use_ = false; }

 private:
  void* data_ = nullptr;
  bool in_use_ = false;
};

bool is_large(at::IntArrayRef shape, at::ScalarType type) {
  return at::detail::computeStorageNbytesContiguous(shape, c10::elementSize(type)) >= kLeast;
}

}  // namespace

at::Tensor new_on_cpu(at::IntArrayRef shape, at::ScalarType type) {
  return is_large(shape, type) ? pooled(shape, type) : at::detail::empty_cpu(shape, type);
}

at::Tensor new_tensor(at::IntArrayRef shape, const at::TensorOptions& options) {
  const auto type = c10::typeMetaToScalarType(options.dtype());
  return options.device().is_cpu() && is_large(shape, type) ? pooled(shape, type)
                                                            : at::empty(shape, options);
}

c10::DataPtr new_workspace(size_t bytes) {
  thread_local SmallWorkspace small;
  void* data = bytes < kLeast ? small.take() : nullptr;
  c10::DataPtr workspace =
      data ? c10::DataPtr(
                 data, &small, [](void* one) { static_cast<SmallWorkspace*>(one)->give_back(); },
                 c10::Device(c10::kCPU))
           : allocator<true>().allocate(bytes);
  if (fills_new_memory()) std::memset(workspace.get(), 255, bytes);
  return workspace;
}

size_t release_memory() { return pool().release(); }

}  // namespace rnnfast
