// Instantiates every kernel for one instruction set. A file isa_<name>.cpp selects the target,
// defines
//   RNNFAST_ISA           namespace of this instruction set
//   RNNFAST_VECTOR_BYTES  width of a vector register
//   RNNFAST_REGISTERS     how many there are
//   RNNFAST_BF16_DOT      only where there are dot products of bfloat16 pairs: the namespace of the
//                         instruction set to which they are added, and which serves the other types
//   RNNFAST_AMX           as well, where these products are for the matrix unit, and floats' too
// and includes this file, after isa_prologue.h and the target pragma. Everything that may be
// compiled for a newer machine than the one that runs it lives in the namespace, so the linker
// cannot mix them; the cells' functions are always inlined and leave no symbol.

#include "cells/all.h"

namespace rnnfast::cpu::RNNFAST_ISA {

#include "cpu/simd.h"
//
#include "cpu/gemm.h"
//
#include "cpu/panels.h"
//
#include "cpu/cell_tile.h"
//
#include "cpu/batch.h"
//
#include "cpu/history.h"
//
#include "cpu/block_products.h"
#include "cpu/recompute.h"
//
#include "cpu/backward.h"
#include "cpu/input_projection.h"
//
#include "cpu/forward.h"
#include "cpu/generate.h"

// Runs f(job, team) as parallel() does; products may be computed in it.
template <class Job, class F>
void run(std::span<Job> jobs, F&& f) {
  parallel(jobs, [&](Job& job, const Team& team) {
    [[maybe_unused]] const ProductUnit unit;
    f(job, team);
  });
}

// Whether all that had to be split into parts has parts: else the outputs are wrong.
template <class Cell, class S>
bool run_forward(std::span<ForwardJob> jobs) {
  std::atomic<bool> all_good{true};
  run(jobs, [&](ForwardJob& job, const Team& team) {
    Arena arena(job.workspace);
    if (!Forward<Cell, S>(job.args, job.plan, arena).run(team, job.upstream, job.progress))
      all_good = false;
  });
  return all_good;
}

template <class Cell, class S>
constexpr Kernels make_kernels() {
  return {
      [](const Sizes& size, const Machine& machine, int64_t most_steps) {
        using Panels = GatePanels<Operand<S>, Cell::kGates>;
        const bool pack = Panels::template pays_to_pack<S>(size);
        const bool in_parts = Panels::template h_in_parts<S>(size);
        const StepShape step = Forward<Cell, S>::step_shape(size, in_parts);
        Plan plan = plan_forward(size, step, pack, machine, most_steps);
        plan.step_in_parts = in_parts;
        plan.block_in_parts = Panels::template x_in_parts<S>(size);
        return plan;
      },
      [](const Sizes& size, const Machine& machine) {
        const bool in_parts = Backward<Cell, S>::step_in_parts(size);
        Plan plan = plan_backward(size, Backward<Cell, S>::step_shape(size, in_parts), machine);
        plan.step_in_parts = in_parts;
        plan.block_in_parts = Backward<Cell, S>::block_in_parts(size);
        return plan;
      },
      [](const ForwardArgs& args, const Plan& plan) {
        const auto workspace = [&](const Plan& one) {
          Arena arena(nullptr);
          Forward<Cell, S>(args, one, arena);
          return arena.used();
        };
        return std::max(workspace(plan), workspace(plan.without_parts()));
      },
      [](std::span<ForwardJob> jobs) {
        if (run_forward<Cell, S>(jobs)) return;
        for (ForwardJob& job : jobs) {
          job.plan = job.plan.without_parts();
          job.progress.reach(0);
        }
        run_forward<Cell, S>(jobs);
      },
      [](const BackwardArgs& args, const Plan& plan) {
        Arena arena(nullptr);
        Backward<Cell, S>(args, plan, arena);
        return arena.used();
      },
      [](std::span<BackwardJob> jobs) {
        run(jobs, [](BackwardJob& job, const Team& team) {
          Arena arena(job.workspace);
          Backward<Cell, S>(job.args, job.plan, arena).run(team);
        });
      },
      [](const GenerateArgs& args) {
        Arena arena(nullptr);
        Generate<Cell, S>(args, arena);
        return arena.used();
      },
      [](GenerateJob& only) {
        run(std::span(&only, 1), [](GenerateJob& job, const Team& team) {
          Arena arena(job.workspace);
          Generate<Cell, S>(job.args, arena).start(team);
        });
      },
      [](GenerateJob& only) {
        run(std::span(&only, 1), [](GenerateJob& job, const Team& team) {
          Arena arena(job.workspace);
          Generate<Cell, S>(job.args, arena).run(job.steps, job.samplers.data(), team);
        });
      },
  };
}

// in the order of CellKind and Dtype
#if defined(RNNFAST_BF16_DOT)
const KernelTable& kernel_table() {
  static const KernelTable table = [] {
    KernelTable changed = RNNFAST_BF16_DOT::kernel_table();
    const auto replace = [&]<class Cell>(CellKind kind) {
      Kernels* kernels = changed.kernels[int(kind)];
      kernels[int(Dtype::kBFloat16)] = make_kernels<Cell, bf16>();
      if constexpr (kHasParts<Operand<float>>)
        kernels[int(Dtype::kFloat32)] = make_kernels<Cell, float>();
    };
#define RNNFAST_REPLACE(Cell) replace.template operator()<Cell>(CellKind::k##Cell);
    RNNFAST_FOR_EACH_CELL(RNNFAST_REPLACE)
#undef RNNFAST_REPLACE
    return changed;
  }();
  return table;
}
#else
const KernelTable& kernel_table() {
#define RNNFAST_ROW(Cell)                                                                 \
  {make_kernels<Cell, double>(), make_kernels<Cell, float>(), make_kernels<Cell, bf16>(), \
   make_kernels<Cell, f16>()},
  static constexpr KernelTable table{{RNNFAST_FOR_EACH_CELL(RNNFAST_ROW)}, true, true};
#undef RNNFAST_ROW
  return table;
}
#endif

}  // namespace rnnfast::cpu::RNNFAST_ISA
