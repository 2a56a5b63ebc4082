// The Python module rnnfast._C: loading it registers the ops; its functions tell and set what runs.
#include <torch/extension.h>

#include "cpu/kernels.h"
#include "torch/layer.h"
#include "torch/memory.h"

namespace rnnfast {

namespace py = pybind11;

cpu::Machine this_machine();
// of call.cpp
py::object run_layers(int cell, py::handle input, py::handle hx, const py::list& weights,
                      int64_t layers, bool biases, int64_t proj_size, double dropout,
                      bool batch_first, bool bidirectional, bool recompute, py::handle lengths,
                      py::handle reset);
py::object run_step(int cell, py::handle input, py::handle hx, const py::list& weights,
                    bool biases);
void set_python_backward(py::object function);
int64_t find_freed(const std::vector<std::optional<at::Tensor>>& tensors);
void bind_generation(py::module_& m);  // of generation.cpp

namespace {

py::dict cell_kinds() {
  py::dict kinds;
  for (int kind = 0; kind < kCells; ++kind) kinds[cell_info(CellKind(kind)).name] = kind;
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

// A machine with so much L2 a core, or as much as this one has where l2_bytes is 0.
cpu::Machine assumed_machine(int threads, int64_t l2_bytes,
                             double barrier_cycles = cpu::kTypicalBarrier,
                             double l3_line_cycles = cpu::kTypicalL3Line) {
  return {threads, l2_bytes > 0 ? l2_bytes : this_machine().l2_bytes,
          [=](int) { return barrier_cycles; }, [=](int64_t) { return l3_line_cycles; }};
}

py::dict plan(const std::string& cell, int64_t T, int64_t B, int64_t I, int64_t H,
              const std::string& dtype, int threads, bool backward, int64_t l2_bytes,
              double barrier_cycles, double l3_line_cycles) {
  if (T < 1 || B < 1 || I < 0 || H < 1 || threads < 1)
    throw py::value_error("expected positive sizes and threads");
  const int row = int(cell_info(cell).kind), column = int(dtype_named(dtype));
  const cpu::Kernels& kernels = cpu::kernel_table().kernels[row][column];
  const Sizes size{T, B, I, H};
  const cpu::Machine machine = assumed_machine(threads, l2_bytes, barrier_cycles, l3_line_cycles);
  const cpu::Plan plan =
      backward ? kernels.plan_backward(size, machine) : kernels.plan_forward(size, machine, T);
  const char* splits[] = {"none", "rows", "units"};
  const char* packings[] = {"none", "once", "panelwise"};
  py::dict facts;
  facts["threads"] = plan.threads;
  facts["split"] = splits[int(plan.split)];
  facts["input_packing"] = packings[int(plan.input)];
  facts["hidden_packing"] = packings[int(plan.hidden)];
  facts["block_steps"] = plan.block_steps;
  facts["block_in_parts"] = plan.block_in_parts;
  facts["step_in_parts"] = plan.step_in_parts;
  ForwardArgs forward_args{};
  BackwardArgs backward_args{};
  forward_args.size = backward_args.size = size;
  forward_args.h_size = backward_args.h_size = H;
  backward_args.gates = &size;  // there, so not to be computed again
  facts["workspace_bytes"] = backward ? kernels.backward_workspace(backward_args, plan)
                                      : kernels.forward_workspace(forward_args, plan);
  return facts;
}

// How many of `count` layers of a module run at once, each on its part of the threads.
int layers_at_once(const std::string& cell, int64_t T, int64_t B, int64_t I, int64_t H, int count,
                   bool stacked, int threads, bool backward, int64_t l2_bytes) {
  const cpu::Kernels& kernels =
      cpu::kernel_table().kernels[int(cell_info(cell).kind)][int(Dtype::kFloat32)];
  const Sizes size{T, B, I, H};
  const cpu::Machine machine = assumed_machine(threads, l2_bytes);
  return cpu::side_by_side(count, threads, stacked ? T : 0, [&](int n) {
    return backward ? kernels.plan_backward(size, machine.with(n)).cycles
                    : kernels.plan_forward(size, machine.with(n), T).cycles;
  });
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
  m.def("set_python_backward", &set_python_backward);
  m.def("find_freed", &find_freed, py::arg("tensors"));
  bind_generation(m);
  m.def("layers_at_once", &layers_at_once, py::arg("cell"), py::arg("T"), py::arg("B"),
        py::arg("I"), py::arg("H"), py::arg("count"), py::arg("stacked"), py::arg("threads"),
        py::arg("backward") = false, py::arg("l2_bytes") = 0);
  m.def("plan", &plan, py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("dtype") = "float32", py::arg("threads") = 1, py::arg("backward") = false,
        py::arg("l2_bytes") = 0, py::arg("barrier_cycles") = cpu::kTypicalBarrier,
        py::arg("l3_line_cycles") = cpu::kTypicalL3Line);
}

}  // namespace rnnfast
