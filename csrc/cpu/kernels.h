// The CPU kernels of every cell and dtype, and the choice of instruction set among them.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/plan.h"

namespace rnnfast::cpu {

// The kernels of one cell and one dtype. The workspace is the caller's: workspace(size, plan)
// bytes, aligned to Arena::kAlignment, contents undefined before and after.
struct Kernels {
  Plan (*plan_forward)(const Sizes&, const Machine&);
  Plan (*plan_backward)(const Sizes&, const Machine&);
  size_t (*forward_workspace)(const Sizes&, const Plan&);
  void (*forward)(const ForwardArgs&, const Plan&, void* workspace);
  size_t (*backward_workspace)(const Sizes&, const Plan&);
  void (*backward)(const BackwardArgs&, const Plan&, void* workspace);
};

struct KernelTable {
  Kernels kernels[kCells][kDtypes];
  bool strided;  // whether x and grad_y may have any strides of T and B
};

// Instruction sets usable on this machine, worst first; the last is the default.
std::vector<std::string> capabilities();
std::string capability();
// Throws std::invalid_argument for one that this machine or build lacks.
// "cuda_emulation", never chosen by default, runs the CUDA driver with its kernels on the host.
void set_capability(const std::string& name);

const KernelTable& kernel_table();

}  // namespace rnnfast::cpu
