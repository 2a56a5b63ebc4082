// Runs the ops on the CPU: plans the work, allocates workspaces and calls the engine.
#include <c10/util/SmallVector.h>
#include <unistd.h>

#include <vector>

#include "cpu/cache.h"
#include "cpu/columns.h"
#include "cpu/layer.h"
#include "torch/layer.h"
#include "torch/memory.h"
#include "torch/threads.h"
#include "torch/user_cells.h"

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

// Replaces the tokens of a call by their places among those that occur, and returns these, rising.
std::vector<int64_t> renumber_tokens(LayerInputs& in) {
  const at::Tensor& x = in.x;
  const int64_t steps = in.packed() ? 1 : x.size(0), step_stride = in.packed() ? 0 : x.stride(0);
  const int64_t batch = x.size(-2), stride = x.stride(-2);
  const auto for_tokens = [&](auto&& f) {
    const int64_t* tokens = x.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t b = 0; b < batch; ++b) f(tokens[t * step_stride + b * stride]);
  };
  cpu::DistinctNumbers distinct(in.w_ih.size(0));
  for_tokens([&](int64_t token) { distinct.add(token); });
  std::vector<int64_t> numbers = distinct.list();
  at::Tensor places = new_on_cpu(x.sizes(), at::kLong);
  int64_t* place = places.mutable_data_ptr<int64_t>();
  for_tokens([&](int64_t token) { *place++ = distinct.place(token); });
  in.x = places;
  return numbers;
}

cpu::Columns columns_of(const at::Tensor& transposed, const std::vector<int64_t>& numbers) {
  return {transposed.size(1), transposed.size(0), numbers, size_t(transposed.element_size())};
}

// The rows of these numbers of a table that lies transposed.
at::Tensor gather_rows(const at::Tensor& transposed, const std::vector<int64_t>& numbers) {
  at::Tensor rows =
      new_on_cpu({int64_t(numbers.size()), transposed.size(1)}, transposed.scalar_type());
  cpu::gather_columns(columns_of(transposed, numbers), transposed.const_data_ptr(),
                      rows.mutable_data_ptr(), usable_threads());
  return rows;
}

// Plans layers of one kind on this machine. Making a plan takes as long as a step of a small layer,
// and plans depend on a few numbers alone, so they are cached.
class Planner {
 public:
  Planner(const CellInfo& cell, const LayerInputs& in)
      : engine(cpu::engine()),
        kind{cell.kind, dtype_of(in.h0), frozen_type(in.w_hh)},
        machine(this_machine()),
        barriers(machine.barrier_cycles.key()) {}

  struct Planned {
    cpu::Plan plan;
    size_t workspace;  // bytes
  };
  Planned forward(const ForwardArgs& args, int threads, int64_t max_steps) const {
    thread_local cpu::Cache<Planned, 11> cache;
    const int64_t options = (args.tokens ? 1 : 0) + (args.w_hr ? 2 : 0) + (args.reset ? 4 : 0);
    return cache.get(key(args, threads, max_steps, options), [&]() -> Planned {
      const cpu::Plan plan = engine.plan_forward(kind, args.size, machine.with(threads), max_steps);
      return {plan, engine.forward_workspace(kind, args, plan)};
    });
  }
  Planned backward(const BackwardArgs& args, int threads) const {
    thread_local cpu::Cache<Planned, 11> cache;
    const int64_t options = (args.tokens ? 1 : 0) + (args.w_hr ? 2 : 0) + (args.reset ? 4 : 0) +
                            (args.gates ? 8 : 0) + (args.grad_x ? 16 : 0) +
                            (args.grad_w_hr ? 32 : 0);
    return cache.get(key(args, threads, 0, options), [&]() -> Planned {
      const cpu::Plan plan = engine.plan_backward(kind, args.size, machine.with(threads));
      return {plan, engine.backward_workspace(kind, args, plan)};
    });
  }

  // How many of `layers` layers run side by side. In a stack each waits for the one before.
  int side_by_side(size_t layers, const Sizes& size, bool backward, bool stacked) const {
    const int max_count = std::min(int(layers), machine.threads);
    if (max_count == 1) return 1;
    thread_local cpu::Cache<int, 11> cache;
    const auto [T, B, I, H] = size;
    return cache.get({engine_number(), kind_number(), T, B, I, H, machine.threads, int64_t(layers),
                      backward, stacked, barriers},
                     [&] {
                       std::vector<double> cycles;
                       for (int n = 1; n <= max_count; ++n) {
                         const cpu::Machine part = machine.with(machine.threads / n);
                         cycles.push_back((backward ? engine.plan_backward(kind, size, part)
                                                    : engine.plan_forward(kind, size, part, size.T))
                                              .cycles);
                       }
                       return cpu::side_by_side(int(layers), machine.threads, stacked ? T : 0,
                                                cycles);
                     });
  }

  const cpu::Engine& engine;
  const cpu::LayerKind kind;
  const cpu::Machine machine;
  const int64_t barriers;  // key of machine.barrier_cycles

 private:
  int64_t engine_number() const { return int64_t(reinterpret_cast<uintptr_t>(&engine)); }
  int64_t kind_number() const {
    const int weights = kind.frozen ? 1 + int(*kind.frozen) : 0;
    return (int(kind.cell) * kDtypes + int(kind.dtype)) * (1 + cpu::kWeightTypes) + weights;
  }
  template <class Args>
  std::array<int64_t, 11> key(const Args& args, int threads, int64_t max_steps,
                              int64_t options) const {
    const auto [T, B, I, H] = args.size;
    return {engine_number(), kind_number(), T,         B,       I,       H,
            args.h_size,     threads,       max_steps, options, barriers};
  }
};

void require_kernels(const CellInfo& cell, const at::Tensor& like) {
  const std::string problem = prepare_kernels(cell, dtype_of(like));
  TORCH_CHECK(problem.empty(), "rnnfast::", cell.name, ": ", problem);
}

}  // namespace

bool CpuDevice::complete() { return cpu::engine().is_complete(); }

void CpuDevice::forward(const CellInfo& cell, std::span<LayerForward> layers, bool stacked) {
  require_kernels(cell, layers[0].in.h0);
  const Planner planner(cell, layers[0].in);
  const Sizes size = layers[0].in.sizes();
  const int count = planner.side_by_side(layers.size(), size, false, stacked);

  for (size_t begin = 0; begin < layers.size(); begin += size_t(count)) {
    const auto group = layers.subspan(begin, std::min(size_t(count), layers.size() - begin));
    const int threads = planner.machine.threads / int(group.size());
    const bool waiting = stacked && group.size() > 1;
    const int64_t max_steps = waiting ? ceil_div(size.T, cpu::kStackBlocks) : size.T;
    std::vector<cpu::ForwardJob> jobs(group.size());
    c10::SmallVector<c10::DataPtr, 2> memory;
    for (size_t i = 0; i < group.size(); ++i) {
      auto& [in, out] = group[i];
      if (!planner.engine.takes_strides()) in.x = in.x.contiguous();
      cpu::ForwardJob& job = jobs[i];
      job.args = forward_args(in, out);
      const auto planned = planner.forward(job.args, threads, max_steps);
      job.plan = planned.plan;
      job.args.ragged = arrange(in, job.plan, job.arrangement);
      memory.push_back(new_workspace(planned.workspace));
      job.workspace = memory.back().get();
      if (waiting && i > 0) job.upstream = &jobs[i - 1].progress;
    }
    planner.engine.forward(planner.kind, jobs);
  }
}

void CpuDevice::backward(const CellInfo& cell, std::span<LayerBackward> layers) {
  require_kernels(cell, layers[0].in.h0);
  const Planner planner(cell, layers[0].in);
  const int count = planner.side_by_side(layers.size(), layers[0].in.sizes(), true, false);
  for (size_t begin = 0; begin < layers.size(); begin += size_t(count)) {
    const auto group = layers.subspan(begin, std::min(size_t(count), layers.size() - begin));
    const int threads = planner.machine.threads / int(group.size());
    std::vector<cpu::BackwardJob> jobs(group.size());
    c10::SmallVector<c10::DataPtr, 2> memory;
    for (size_t i = 0; i < group.size(); ++i) {
      auto& [grad_out, in, out, grads] = group[i];
      check_gates(cell, out, planner.engine.is_complete());
      if (!planner.engine.takes_strides()) {
        in.x = in.x.contiguous();
        if (grad_out.y.defined()) grad_out.y = grad_out.y.contiguous();
      }
      cpu::BackwardJob& job = jobs[i];
      job.args = backward_args(grad_out, in, out, grads);
      const auto planned = planner.backward(job.args, threads);
      job.plan = planned.plan;
      job.args.ragged = arrange(in, job.plan, job.arrangement);
      memory.push_back(new_workspace(planned.workspace));
      job.workspace = memory.back().get();
    }
    planner.engine.backward(planner.kind, jobs);
  }
}

void CpuDevice::forward(const CellInfo& cell, LayerInputs in, LayerOutputs& out) {
  if (in.has_transposed_table()) in.w_ih = gather_rows(in.w_ih, renumber_tokens(in));
  LayerForward one{std::move(in), out};
  forward(cell, {&one, 1}, false);
}

void CpuDevice::backward(const CellInfo& cell, LayerGradOutputs grad_out, LayerInputs in,
                         const LayerOutputs& out, LayerGrads& grads) {
  LayerBackward one{std::move(grad_out), std::move(in), out, grads};
  if (!one.in.has_transposed_table()) return backward(cell, {&one, 1});
  const std::vector<int64_t> numbers = renumber_tokens(one.in);
  const at::Tensor table = one.in.w_ih;
  // only a backward that computes the gates again reads it
  const bool reads = cell.saved > 0 && out.gates.numel() == 0;
  one.in.w_ih = reads ? gather_rows(table, numbers) : new_on_cpu({0}, table.scalar_type());
  at::Tensor& rows = one.grads.w_ih;
  if (rows.defined())
    rows = new_on_cpu({int64_t(numbers.size()), table.size(1)}, rows.scalar_type()).zero_();
  backward(cell, {&one, 1});
  if (rows.defined())
    cpu::scatter_columns(columns_of(grads.w_ih, numbers), rows.const_data_ptr(),
                         grads.w_ih.mutable_data_ptr(), usable_threads());
}

}  // namespace rnnfast
