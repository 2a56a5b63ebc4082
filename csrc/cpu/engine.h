// The engine that runs layers on the CPU: the drivers with the micro-kernels of one instruction
// set.
#pragma once

#include "cpu/layer.h"
#include "cpu/microkernels.h"

namespace rnnfast::cpu {

class CpuEngine final : public Engine {
 public:
  explicit CpuEngine(const Target& target) : target_(target) {}
  const Target& target() const { return target_; }

  Plan plan_forward(LayerKind, const Sizes&, const Machine&, int64_t max_steps) const override;
  Plan plan_backward(LayerKind, const Sizes&, const Machine&) const override;
  size_t forward_workspace(LayerKind, const ForwardArgs&, const Plan&) const override;
  size_t backward_workspace(LayerKind, const BackwardArgs&, const Plan&) const override;
  void forward(LayerKind, std::span<ForwardJob>) const override;
  void backward(LayerKind, std::span<BackwardJob>) const override;
  size_t generate_workspace(LayerKind, const GenerateArgs&, const Plan&) const override;
  void start_generating(LayerKind, GenerateJob&) const override;
  void generate(LayerKind, GenerateJob&) const override;
  size_t tabulate_workspace(LayerKind, const TabulateArgs&, const Plan&) const override;
  void tabulate(LayerKind, TabulateJob&) const override;
  const MicroKernels* kernels(Dtype dtype) const override { return &target_.kernels[int(dtype)]; }

 private:
  class Call;
  const Target target_;
};

}  // namespace rnnfast::cpu
