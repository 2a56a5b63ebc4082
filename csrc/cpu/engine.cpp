#include "cpu/engine.h"

#include "cpu/drivers/backward.h"
#include "cpu/drivers/forward.h"
#include "cpu/drivers/generate.h"
#include "cpu/drivers/tabulate.h"

namespace rnnfast::cpu {
namespace {

// Brackets a thread's products with the target's enter and leave, which AMX needs to manage its
// registers.
class InProducts {
 public:
  explicit InProducts(const Target& target) : target_(target) {
    if (target.enter) target.enter();
  }
  ~InProducts() {
    if (target_.leave) target_.leave();
  }
  InProducts(const InProducts&) = delete;
  InProducts& operator=(const InProducts&) = delete;

 private:
  const Target& target_;
};

}  // namespace

class CpuEngine::Call {
 public:
  Call(const Target& target, LayerKind kind)
      : target_(target), context_{target.kernels[int(kind.dtype)], kind.cell} {}

  const Context& context() const { return context_; }

  // Runs f(job, team) in all threads of all jobs.
  template <class Job, class F>
  void run(std::span<Job> jobs, F&& f) const {
    parallel(jobs, [&](Job& job, const Team& team) {
      const InProducts products(target_);
      f(job, team);
    });
  }
  // Runs f(driver, job, team), with a driver whose memory is the job's workspace.
  template <class Driver, class Job, class F>
  void run_driver(std::span<Job> jobs, F&& f) const {
    run(jobs, [&](Job& job, const Team& team) {
      Arena arena(job.workspace);
      Driver driver(context_, job.args, job.plan, arena);
      f(driver, job, team);
    });
  }
  // Returns false if a number could not be represented in a weight format.
  bool run_forward(std::span<ForwardJob> jobs) const {
    std::atomic<bool> all_good{true};
    run_driver<Forward>(jobs, [&](Forward& driver, ForwardJob& job, const Team& team) {
      if (!driver.run(team, job.upstream, job.progress)) all_good = false;
    });
    return all_good;
  }
  template <class Driver, class... Args>
  size_t workspace(const Args&... args) const {
    Arena arena(nullptr);
    Driver(context_, args..., arena);
    return arena.used();
  }

 private:
  const Target& target_;
  const Context context_;
};

Plan CpuEngine::plan_forward(LayerKind kind, const Sizes& size, const Machine& machine,
                             int64_t max_steps) const {
  const Call call(target_, kind);
  const Context& context = call.context();
  if (kind.frozen) {
    const WeightFormat& format = *context.kernels.frozen[int(*kind.frozen)];
    const StepShape step = Forward::step_shape(context, size, format);
    Plan plan = cpu::plan_forward(size, step, true, machine, max_steps);
    plan.input = plan.hidden = Packing::kFrozen;
    plan.frozen = *kind.frozen;
    return plan;
  }
  const ForwardFormats formats = choose_forward_formats(context, size);
  const StepShape step = Forward::step_shape(context, size, context.format(formats.h_split));
  Plan plan = cpu::plan_forward(size, step, formats.pack, machine, max_steps);
  plan.step_split_precision = formats.h_split;
  plan.block_split_precision = formats.x_split;
  return plan;
}

Plan CpuEngine::plan_backward(LayerKind kind, const Sizes& size, const Machine& machine) const {
  const Call call(target_, kind);
  const BackwardFormats formats = choose_backward_formats(call.context(), size);
  const StepShape step = Backward::step_shape(call.context(), size, formats.step_split);
  Plan plan = cpu::plan_backward(size, step, machine);
  plan.step_split_precision = formats.step_split;
  plan.block_split_precision = formats.block_split;
  return plan;
}

size_t CpuEngine::forward_workspace(LayerKind kind, const ForwardArgs& args,
                                    const Plan& plan) const {
  const Call call(target_, kind);
  const size_t bytes = call.workspace<Forward>(args, plan);
  // Room also for the second run without split precision, which follows if a number could not be
  // represented.
  const bool split = plan.step_split_precision || plan.block_split_precision;
  return split ? std::max(bytes, call.workspace<Forward>(args, plan.without_split_precision()))
               : bytes;
}

size_t CpuEngine::backward_workspace(LayerKind kind, const BackwardArgs& args,
                                     const Plan& plan) const {
  return Call(target_, kind).workspace<Backward>(args, plan);
}

void CpuEngine::forward(LayerKind kind, std::span<ForwardJob> jobs) const {
  const Call call(target_, kind);
  if (call.run_forward(jobs)) return;
  for (ForwardJob& job : jobs) {
    job.plan = job.plan.without_split_precision();
    job.progress.reach(0);
  }
  call.run_forward(jobs);
}

void CpuEngine::backward(LayerKind kind, std::span<BackwardJob> jobs) const {
  Call(target_, kind)
      .run_driver<Backward>(
          jobs, [](Backward& driver, BackwardJob&, const Team& team) { driver.run(team); });
}

size_t CpuEngine::generate_workspace(LayerKind kind, const GenerateArgs& args,
                                     const Plan& plan) const {
  return Call(target_, kind).workspace<Generate>(args, plan);
}

void CpuEngine::start_generating(LayerKind kind, GenerateJob& job) const {
  Call(target_, kind)
      .run_driver<Generate>(std::span(&job, 1), [](Generate& driver, GenerateJob&,
                                                   const Team& team) { driver.start(team); });
}

void CpuEngine::generate(LayerKind kind, GenerateJob& job) const {
  Call(target_, kind)
      .run_driver<Generate>(std::span(&job, 1),
                            [](Generate& driver, GenerateJob& one, const Team& team) {
                              driver.run(one.steps, one.samplers.data(), team);
                            });
}

size_t CpuEngine::tabulate_workspace(LayerKind kind, const TabulateArgs& args,
                                     const Plan& plan) const {
  return Call(target_, kind).workspace<Tabulate>(args, plan);
}

void CpuEngine::tabulate(LayerKind kind, TabulateJob& job) const {
  Call(target_, kind)
      .run_driver<Tabulate>(std::span(&job, 1), [](Tabulate& driver, TabulateJob&,
                                                   const Team& team) { driver.run(team); });
}

}  // namespace rnnfast::cpu
