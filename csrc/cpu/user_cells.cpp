#include "cpu/user_cells.h"

#include <atomic>
#include <deque>
#include <list>
#include <mutex>
#include <stdexcept>
#include <string_view>

namespace rnnfast::cpu {
namespace {

// What was compiled of a cell for one type of tensors and one instruction set. Entries are added at
// the front of a list and never removed, so it is read without a lock.
struct Compiled {
  const std::string target;
  const CellFunctions functions;
  const Compiled* const next;
};

struct UserCell {
  const std::string name;
  const double norm_eps;
  const bool recurrent;
  std::atomic<const Compiled*> compiled[kDtypes] = {};
};

std::mutex mutex;
// A deque does not move its elements when it grows.
std::deque<UserCell>& cells() {
  static std::deque<UserCell> all;
  return all;
}

UserCell& user_cell(CellKind kind) {
  const std::lock_guard lock(mutex);
  return cells().at(size_t(int(kind) - kCellKinds));
}

const CellFunctions* find(const UserCell& cell, const MicroKernels& kernels) {
  for (const Compiled* one = cell.compiled[int(kernels.dtype)].load(std::memory_order_acquire); one;
       one = one->next)
    if (one->target == std::string_view(kernels.target)) return &one->functions;
  return nullptr;
}

}  // namespace

const CellFunctions& cell_functions(const MicroKernels& kernels, CellKind kind) {
  if (int(kind) < kCellKinds) return kernels.cells[int(kind)];
  const UserCell& cell = user_cell(kind);
  const CellFunctions* functions = find(cell, kernels);
  if (!functions)
    throw std::runtime_error("rnnfast: the cell " + cell.name +
                             " has not been compiled for the instruction set " + kernels.target);
  return *functions;
}

CellKind add_user_cell(const std::string& name, double norm_eps, bool recurrent) {
  const std::lock_guard lock(mutex);
  cells().emplace_back(name, norm_eps, recurrent);
  return CellKind(kCellKinds + int(cells().size()) - 1);
}

void set_cell_functions(CellKind kind, const std::string& target, Dtype dtype,
                        const CellFunctions& functions) {
  UserCell& cell = user_cell(kind);
  CellFunctions own = functions;
  own.cell.norm_eps = cell.norm_eps;
  own.cell.recurrent = cell.recurrent;
  const std::lock_guard lock(mutex);
  auto& first = cell.compiled[int(dtype)];
  first.store(new Compiled{target, own, first.load()}, std::memory_order_release);
}

bool has_cell_functions(CellKind kind, const MicroKernels& kernels) {
  return int(kind) < kCellKinds || find(user_cell(kind), kernels);
}

}  // namespace rnnfast::cpu
