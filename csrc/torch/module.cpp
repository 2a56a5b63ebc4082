// The Python module rnnfast._C. Importing it registers the ops. Its functions run calls of modules
// (the short path), return plans and choose the instruction set.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <variant>

#include "cpu/layer.h"
#include "torch/layer.h"
#include "torch/memory.h"

namespace rnnfast {

namespace py = pybind11;

cpu::Machine this_machine();  // in cpu.cpp
// In call.cpp.
py::object run_layers(int cell, py::handle input, py::handle hx, const py::list& weights,
                      int64_t layers, bool biases, int64_t proj_size, double dropout,
                      bool batch_first, bool bidirectional, bool recompute, py::handle lengths,
                      py::handle reset);
py::object run_step(int cell, py::handle input, py::handle hx, const py::list& weights,
                    bool biases);
int64_t find_freed(const std::vector<std::optional<at::Tensor>>& tensors);
void bind_generation(py::module_& m);  // in generation.cpp
void bind_stream(py::module_& m);  // in stream.cpp
void bind_threads(py::module_& m);  // in threads.cpp
void bind_user_cells(py::module_& m);  // in user_cells.cpp

namespace {

py::dict cell_kinds() {
  py::dict kinds;
  for (int kind = 0; kind < kCellKinds; ++kind) kinds[cell_info(CellKind(kind)).name] = kind;
  return kinds;
}

py::dict built_with() {
  py::dict facts;
#ifdef RNNFAST_WITH_CUDA
  facts["cuda"] = true;
  facts["cuda_arch"] = py::str(RNNFAST_CUDA_ARCHS).attr("split")(" ");
#else
  facts["cuda"] = false;
  facts["cuda_arch"] = py::list();
#endif
  facts["compiler"] = "gcc " __VERSION__;
  facts["torch"] = TORCH_VERSION;
  return facts;
}

Dtype dtype_named(const std::string& name) {
  const char* names[kDtypes] = {"float64", "float32", "bfloat16", "float16"};
  for (int i = 0; i < kDtypes; ++i)
    if (name == names[i]) return Dtype(i);
  throw py::value_error("expected dtype float64, float32, bfloat16 or float16, got '" + name + "'");
}

// The cycles of a barrier: one number for any number of threads, or a list for 2, 4, 8, ...
// threads, whose last entry is also for more.
using BarrierCosts = std::variant<double, std::vector<double>>;

cpu::BarrierCycles barrier_table(const BarrierCosts& costs) {
  if (const double* one = std::get_if<double>(&costs)) return cpu::BarrierCycles::constant(*one);
  const auto& list = std::get<std::vector<double>>(costs);
  if (list.empty())
    throw py::value_error("expected barrier_cycles for 2, 4, ... threads, got an empty list");
  cpu::BarrierCycles table = cpu::BarrierCycles::constant(list.back());
  for (size_t i = 0; i < list.size() && i + 1 < table.of_doublings.size(); ++i)
    table.of_doublings[i + 1] = list[i];
  return table;
}

// A machine with l2_bytes of L2 per core, or this machine's L2 if that is 0.
cpu::Machine assumed_machine(int threads, int64_t l2_bytes,
                             const BarrierCosts& barrier_cycles = cpu::kTypicalBarrier,
                             double l3_line_cycles = cpu::kTypicalL3Line) {
  return {threads, l2_bytes > 0 ? l2_bytes : this_machine().l2_bytes, l3_line_cycles,
          barrier_table(barrier_cycles)};
}

py::dict plan(const std::string& cell, int64_t T, int64_t B, int64_t I, int64_t H,
              const std::string& dtype, int threads, bool backward, int64_t l2_bytes,
              const BarrierCosts& barrier_cycles, double l3_line_cycles) {
  if (T < 1 || B < 1 || I < 0 || H < 1 || threads < 1)
    throw py::value_error("expected positive sizes and threads");
  const cpu::Engine& engine = cpu::engine();
  const cpu::LayerKind kind{cell_info(cell).kind, dtype_named(dtype)};
  const Sizes size{T, B, I, H};
  const cpu::Machine machine = assumed_machine(threads, l2_bytes, barrier_cycles, l3_line_cycles);
  const cpu::Plan plan = backward ? engine.plan_backward(kind, size, machine)
                                  : engine.plan_forward(kind, size, machine, T);
  const char* packings[] = {"none", "once", "panelwise"};
  py::dict facts;
  facts["threads"] = plan.threads;
  facts["row_shares"] = plan.row_shares;
  facts["unit_shares"] = plan.unit_shares;
  facts["split"] = plan.by_rows()    ? (plan.by_units() ? "rows and units" : "rows")
                   : plan.by_units() ? "units"
                                     : "none";
  facts["input_packing"] = packings[int(plan.input)];
  facts["hidden_packing"] = packings[int(plan.hidden)];
  facts["block_steps"] = plan.block_steps;
  facts["block_split_precision"] = plan.block_split_precision;
  facts["step_split_precision"] = plan.step_split_precision;
  ForwardArgs forward_args{};
  BackwardArgs backward_args{};
  forward_args.size = backward_args.size = size;
  forward_args.h_size = backward_args.h_size = H;
  backward_args.gates = &size;  // not null: gates are saved, so no workspace to recompute them
  facts["workspace_bytes"] = backward ? engine.backward_workspace(kind, backward_args, plan)
                                      : engine.forward_workspace(kind, forward_args, plan);
  return facts;
}

// How many of `count` layers of a module run at once, each on its part of the threads.
int layers_at_once(const std::string& cell, int64_t T, int64_t B, int64_t I, int64_t H, int count,
                   bool stacked, int threads, bool backward, int64_t l2_bytes) {
  const cpu::Engine& engine = cpu::engine();
  const cpu::LayerKind kind{cell_info(cell).kind, Dtype::kFloat32};
  const Sizes size{T, B, I, H};
  const cpu::Machine machine = assumed_machine(threads, l2_bytes);
  std::vector<double> cycles;
  for (int layers = 1; layers <= std::min(count, threads); ++layers) {
    const cpu::Machine part = machine.with(threads / layers);
    cycles.push_back(backward ? engine.plan_backward(kind, size, part).cycles
                              : engine.plan_forward(kind, size, part, T).cycles);
  }
  return cpu::side_by_side(count, threads, stacked ? T : 0, cycles);
}

// For tests: replaces kernels by those that a test has compiled, given by their addresses.
void bind_test_hooks(py::module_& m) {
  m.def(
      "target_address", [](const std::string& name) { return uintptr_t(&cpu::target_of(name)); },
      py::arg("name"));
  m.def(
      "add_engine",
      [](const std::string& name, uintptr_t engine) {
        cpu::add_engine(name, *reinterpret_cast<const cpu::Engine*>(engine));
      },
      py::arg("name"), py::arg("engine"));
  m.def(
      "add_target",
      [](const std::string& name, const std::string& base, uintptr_t change) {
        cpu::add_target(name, base, reinterpret_cast<void (*)(cpu::Target&)>(change));
      },
      py::arg("name"), py::arg("base"), py::arg("change"));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "rnnfast's compiled kernels; importing it registers torch.ops.rnnfast.";
  m.def("built_with", &built_with);
  m.def("cpu_capabilities", &cpu::capabilities);
  m.def("get_cpu_capability", &cpu::capability);
  m.def("set_cpu_capability", &cpu::set_capability, py::arg("name"));
  m.def("cell_kinds", &cell_kinds);
  m.def("release_memory", &release_memory);
  m.def("run_layers", &run_layers);
  m.def("run_step", &run_step);
  m.def("find_freed", &find_freed, py::arg("tensors"));
  bind_generation(m);
  bind_stream(m);
  bind_threads(m);
  bind_user_cells(m);
  bind_test_hooks(m);
  m.def("layers_at_once", &layers_at_once, py::arg("cell"), py::arg("T"), py::arg("B"),
        py::arg("I"), py::arg("H"), py::arg("count"), py::arg("stacked"), py::arg("threads"),
        py::arg("backward") = false, py::arg("l2_bytes") = 0);
  m.def("plan", &plan, py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("dtype") = "float32", py::arg("threads") = 1, py::arg("backward") = false,
        py::arg("l2_bytes") = 0, py::arg("barrier_cycles") = BarrierCosts(cpu::kTypicalBarrier),
        py::arg("l3_line_cycles") = cpu::kTypicalL3Line);
}

}  // namespace rnnfast
