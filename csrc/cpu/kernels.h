// The CPU kernels of every cell and dtype, and the choice of instruction set among them.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/generation.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace rnnfast::cpu {

// One layer in one direction, to be run on plan.threads threads.
template <class Args>
struct Job {
  Args args;
  Plan plan;
  Arrangement arrangement;  // what args.ragged points into
  void* workspace = nullptr;  // as large as forward_workspace or backward_workspace say, aligned to
                              // Arena::kAlignment, contents undefined before and after
  const Progress* upstream = nullptr;  // of the job whose y is this one's x; null if x is complete
  Progress progress;
  Barrier barrier;

  // Where a single thread is to do what was planned for several.
  void give_to_one_thread() {
    if (arrangement.lengths.empty()) return;
    arrangement.give_to_one_thread();
    args.ragged = arrangement.view();
  }
};
using ForwardJob = Job<ForwardArgs>;
using BackwardJob = Job<BackwardArgs>;

// The kernels of one cell and one dtype. Jobs of one call run side by side; one that waits for
// another comes after it.
struct Kernels {
  Plan (*plan_forward)(const Sizes&, const Machine&, int64_t most_steps);
  Plan (*plan_backward)(const Sizes&, const Machine&);
  size_t (*forward_workspace)(const ForwardArgs&, const Plan&);
  void (*forward)(std::span<ForwardJob>);
  size_t (*backward_workspace)(const BackwardArgs&, const Plan&);
  void (*backward)(std::span<BackwardJob>);
  size_t (*generate_workspace)(const GenerateArgs&);
  void (*start_generating)(GenerateJob&);
  void (*generate)(GenerateJob&);
};

struct KernelTable {
  Kernels kernels[kCells][kDtypes];
  bool strided;  // whether x and grad_y may have any strides of T and B
  bool complete;  // whether there are lengths, packed data, resets, tokens, a backward without
                  // gates, and generation
};

// Instruction sets usable on this machine, worst first; the last is the default.
std::vector<std::string> capabilities();
std::string capability();
// Throws std::invalid_argument for one that this machine or build lacks.
// "cuda_emulation", never chosen by default, runs the CUDA driver with its kernels on the host.
void set_capability(const std::string& name);

const KernelTable& kernel_table();

}  // namespace rnnfast::cpu
