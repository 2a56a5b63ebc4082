// The CPU kernels behind the ops.
#include <unistd.h>

#include <vector>

#include "cpu/layer.h"
#include "torch/layer.h"
#include "torch/memory.h"
#include "torch/threads.h"

namespace rnnfast {

cpu::Machine this_machine() {
  static const int64_t l2 = [] {
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return bytes > 0 ? int64_t(bytes) : int64_t(1) << 20;
  }();
  const int threads = usable_threads();
  return {threads, l2, cpu::measured_l3_line(l2), cpu::measured_barriers(threads)};
}

namespace {

Ragged arrange(const LayerInputs& in, const cpu::Plan& plan, cpu::Arrangement& memory) {
  if (!in.lengths.defined()) return {};
  memory = cpu::arrange(in.all_lengths(), in.packed(), in.sizes().T, plan);
  return memory.view();
}

// How many of so many layers run side by side; `cycles` has what one takes on so many threads.
template <class F>
int side_by_side(size_t layers, int threads, int64_t stacked_steps, F&& cycles) {
  const int max_count = std::min(int(layers), threads);
  if (max_count == 1) return 1;
  std::vector<double> of_shares;
  for (int n = 1; n <= max_count; ++n) of_shares.push_back(cycles(threads / n));
  return cpu::side_by_side(int(layers), threads, stacked_steps, of_shares);
}

}  // namespace

bool CpuDevice::complete() { return cpu::engine().is_complete(); }

void CpuDevice::forward(const CellInfo& cell, std::span<LayerForward> layers, bool stacked) {
  const cpu::Engine& engine = cpu::engine();
  const LayerInputs& first = layers[0].in;
  const cpu::LayerKind kind{cell.kind, dtype_of(first.h0)};
  const Sizes size = first.sizes();
  const cpu::Machine machine = this_machine();
  const int count = side_by_side(layers.size(), machine.threads, stacked ? size.T : 0, [&](int n) {
    return engine.plan_forward(kind, size, machine.with(n), size.T).cycles;
  });

  for (size_t begin = 0; begin < layers.size(); begin += size_t(count)) {
    const auto group = layers.subspan(begin, std::min(size_t(count), layers.size() - begin));
    const cpu::Machine part = machine.with(machine.threads / int(group.size()));
    const bool waiting = stacked && group.size() > 1;
    const int64_t max_steps = waiting ? ceil_div(size.T, cpu::kStackBlocks) : size.T;
    std::vector<cpu::ForwardJob> jobs(group.size());
    std::vector<at::Tensor> memory;
    for (size_t i = 0; i < group.size(); ++i) {
      auto& [in, out] = group[i];
      if (!engine.takes_strides()) in.x = in.x.contiguous();
      cpu::ForwardJob& job = jobs[i];
      job.args = forward_args(in, out);
      job.plan = engine.plan_forward(kind, job.args.size, part, max_steps);
      job.args.ragged = arrange(in, job.plan, job.arrangement);
      memory.push_back(new_workspace(engine.forward_workspace(kind, job.args, job.plan)));
      job.workspace = memory.back().data_ptr();
      if (waiting && i > 0) job.upstream = &jobs[i - 1].progress;
    }
    engine.forward(kind, jobs);
  }
}

void CpuDevice::backward(const CellInfo& cell, std::span<LayerBackward> layers) {
  const cpu::Engine& engine = cpu::engine();
  const LayerInputs& first = layers[0].in;
  const cpu::LayerKind kind{cell.kind, dtype_of(first.h0)};
  const Sizes size = first.sizes();
  const cpu::Machine machine = this_machine();
  const int count = side_by_side(layers.size(), machine.threads, 0, [&](int n) {
    return engine.plan_backward(kind, size, machine.with(n)).cycles;
  });
  for (size_t begin = 0; begin < layers.size(); begin += size_t(count)) {
    const auto group = layers.subspan(begin, std::min(size_t(count), layers.size() - begin));
    const cpu::Machine part = machine.with(machine.threads / int(group.size()));
    std::vector<cpu::BackwardJob> jobs(group.size());
    std::vector<at::Tensor> memory;
    for (size_t i = 0; i < group.size(); ++i) {
      auto& [grad_out, in, out, grads] = group[i];
      check_gates(cell, out, engine.is_complete());
      if (!engine.takes_strides()) {
        in.x = in.x.contiguous();
        if (grad_out.y.defined()) grad_out.y = grad_out.y.contiguous();
      }
      cpu::BackwardJob& job = jobs[i];
      job.args = backward_args(grad_out, in, out, grads);
      job.plan = engine.plan_backward(kind, job.args.size, part);
      job.args.ragged = arrange(in, job.plan, job.arrangement);
      memory.push_back(new_workspace(engine.backward_workspace(kind, job.args, job.plan)));
      job.workspace = memory.back().data_ptr();
    }
    engine.backward(kind, jobs);
  }
}

void CpuDevice::forward(const CellInfo& cell, LayerInputs in, LayerOutputs& out) {
  LayerForward one{std::move(in), out};
  forward(cell, {&one, 1}, false);
}

void CpuDevice::backward(const CellInfo& cell, LayerGradOutputs grad_out, LayerInputs in,
                         const LayerOutputs& out, LayerGrads& grads) {
  LayerBackward one{std::move(grad_out), std::move(in), out, grads};
  backward(cell, {&one, 1});
}

}  // namespace rnnfast
