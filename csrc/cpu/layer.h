// The interface through which csrc/torch runs layers on the CPU.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/generation.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/tabulation.h"

namespace rnnfast::cpu {

// One layer in one direction, to be run on plan.threads threads.
template <class Args>
struct Job {
  Args args;
  Plan plan;
  Arrangement arrangement;  // owns what args.ragged points to
  void* workspace = nullptr;  // size from forward_workspace or backward_workspace, aligned to
                              // Arena::kAlignment; undefined contents before and after
  const Progress* upstream = nullptr;  // progress of the job whose y is this job's x; null if x is
                                       // complete
  Progress progress;
  Barriers barriers;

  // Prepares the job for a single thread, though it was planned for several.
  void use_one_thread() {
    if (arrangement.lengths.empty()) return;
    arrangement.use_one_thread();
    args.ragged = arrangement.view();
  }
};
using ForwardJob = Job<ForwardArgs>;
using BackwardJob = Job<BackwardArgs>;

struct LayerKind {
  CellKind cell;
  Dtype dtype;
  std::optional<WeightType> frozen = {};  // if weights are frozen
};

// What runs layers: the drivers with the micro-kernels of one instruction set, or a test's
// replacement. The jobs of one call run side by side. A job comes after the job that it waits for
// (`upstream`).
class Engine {
 public:
  virtual ~Engine() = default;
  virtual Plan plan_forward(LayerKind, const Sizes&, const Machine&, int64_t max_steps) const = 0;
  virtual Plan plan_backward(LayerKind, const Sizes&, const Machine&) const = 0;
  virtual size_t forward_workspace(LayerKind, const ForwardArgs&, const Plan&) const = 0;
  virtual size_t backward_workspace(LayerKind, const BackwardArgs&, const Plan&) const = 0;
  virtual void forward(LayerKind, std::span<ForwardJob>) const = 0;
  virtual void backward(LayerKind, std::span<BackwardJob>) const = 0;
  // Whether x and grad_y may have any strides over T and B; else they must be contiguous.
  virtual bool takes_strides() const { return true; }
  // Whether the engine supports lengths, packed data, resets, tokens, frozen weights, a backward
  // without saved gates, and generation.
  virtual bool is_complete() const { return true; }
  // The micro-kernels for tensors of a dtype; null if the engine uses none.
  virtual const MicroKernels* kernels(Dtype) const { return nullptr; }
  virtual size_t generate_workspace(LayerKind, const GenerateArgs&, const Plan&) const { return 0; }
  virtual void start_generating(LayerKind, GenerateJob&) const {}
  virtual void generate(LayerKind, GenerateJob&) const {}
  virtual size_t tabulate_workspace(LayerKind, const TabulateArgs&, const Plan&) const { return 0; }
  virtual void tabulate(LayerKind, TabulateJob&) const {}
};

// The instruction sets usable on this machine, worst first; the last is the default.
std::vector<std::string> capabilities();
// The instruction set in use.
std::string capability();
// Throws std::invalid_argument if this machine or build lacks it.
void set_capability(const std::string& name);
// The engine of the instruction set in use.
const Engine& engine();

// ---- for tests ----

struct Target;
// The micro-kernels of an instruction set.
const Target& target_of(const std::string& name);
// These register another name for set_capability; capabilities() does not list it. add_engine
// registers a whole engine, add_target the drivers with the micro-kernels of instruction set `base`
// as modified by `change`.
void add_engine(const std::string& name, const Engine& engine);
void add_target(const std::string& name, const std::string& base, void (*change)(Target&));

}  // namespace rnnfast::cpu
