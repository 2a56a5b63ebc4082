// How csrc/torch has layers run on the CPU.
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
  Barriers barriers;

  // Where a single thread is to do what was planned for several.
  void give_to_one_thread() {
    if (arrangement.lengths.empty()) return;
    arrangement.give_to_one_thread();
    args.ragged = arrangement.view();
  }
};
using ForwardJob = Job<ForwardArgs>;
using BackwardJob = Job<BackwardArgs>;

struct LayerKind {
  CellKind cell;
  Dtype dtype;
};

// What runs layers: the drivers with the micro-kernels of an instruction set, or what a test puts
// in their place. Jobs of one call run side by side; one that waits for another comes after it.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual Plan plan_forward(LayerKind, const Sizes&, const Machine&, int64_t max_steps) const = 0;
  virtual Plan plan_backward(LayerKind, const Sizes&, const Machine&) const = 0;
  virtual size_t forward_workspace(LayerKind, const ForwardArgs&, const Plan&) const = 0;
  virtual size_t backward_workspace(LayerKind, const BackwardArgs&, const Plan&) const = 0;
  virtual void forward(LayerKind, std::span<ForwardJob>) const = 0;
  virtual void backward(LayerKind, std::span<BackwardJob>) const = 0;
  // Whether x and grad_y may have any strides of T and B.
  virtual bool takes_strides() const { return true; }
  // Whether there are lengths, packed data, resets, tokens, a backward without gates, and
  // generation.
  virtual bool is_complete() const { return true; }
  virtual size_t generate_workspace(LayerKind, const GenerateArgs&) const { return 0; }
  virtual void start_generating(LayerKind, GenerateJob&) const {}
  virtual void generate(LayerKind, GenerateJob&) const {}
};

// Instruction sets usable on this machine, worst first; the last is the default.
std::vector<std::string> capabilities();
std::string capability();
// Throws std::invalid_argument for one that this machine or build lacks.
void set_capability(const std::string& name);
const Engine& engine();

// ---- for tests ----

struct Target;
// The micro-kernels of an instruction set.
const Target& target_of(const std::string& name);
// Add what set_capability takes, though capabilities() does not name it: another engine; and the
// drivers with the micro-kernels of instruction set `base`, which `change` may replace.
void add_engine(const std::string& name, const Engine& engine);
void add_target(const std::string& name, const std::string& base, void (*change)(Target&));

}  // namespace rnnfast::cpu
