#include "torch/user_cells.h"

#include <torch/csrc/utils/pybind.h>

#include <deque>
#include <mutex>

#include "cpu/layer.h"
#include "cpu/user_cells.h"

namespace rnnfast {
namespace {

namespace py = pybind11;

struct UserCell {
  const std::string name;
  CellInfo info;
};

std::mutex mutex;
// A deque does not move its elements when it grows.
std::deque<UserCell>& cells() {
  static std::deque<UserCell> all;
  return all;
}

// The function of Python that compiles: builder(name, dtype) returns None, or why it cannot. Never
// freed, since Python may have ended by then.
py::object& builder() {
  static py::object& function = *new py::object();
  return function;
}

int add_cell(const std::string& name, int gates, int saved, int states, int parameters,
             double norm_eps, bool recurrent) {
  UserCell* cell;
  {
    const std::lock_guard lock(mutex);
    cell = &cells().emplace_back(name);
    cell->info = {.name = cell->name.c_str(),
                  .kind = cpu::add_user_cell(name, norm_eps, recurrent),
                  .gates = gates,
                  .saved = saved,
                  .cells = states - 1,
                  .parameters = parameters,
                  .recurrent = recurrent,
                  .recomputes = norm_eps == 0};
  }
  add_ops(cell->info);
  return int(cell->info.kind);
}

// The namespace that kernels for tensors of a dtype are compiled in, for the instruction set in
// use. None if the engine in use has no kernels for users' cells.
std::optional<std::string> cell_target(int dtype) {
  const cpu::MicroKernels* kernels = cpu::engine().kernels(Dtype(dtype));
  return kernels ? std::optional<std::string>(kernels->target) : std::nullopt;
}

bool has_cell(int kind, int dtype) {
  const cpu::MicroKernels* kernels = cpu::engine().kernels(Dtype(dtype));
  return kernels && cpu::has_cell_functions(CellKind(kind), *kernels);
}

void set_cell_functions(int kind, const std::string& target, int dtype, uintptr_t functions) {
  cpu::set_cell_functions(CellKind(kind), target, Dtype(dtype),
                          *reinterpret_cast<const cpu::CellFunctions*>(functions));
}

}  // namespace

const CellInfo& user_cell_info(CellKind kind) {
  const std::lock_guard lock(mutex);
  const size_t place = size_t(int(kind) - kCellKinds);
  TORCH_CHECK(place < cells().size(), "rnnfast: there is no cell ", int(kind));
  return cells()[place].info;
}

std::string prepare_kernels(const CellInfo& cell, Dtype dtype) {
  if (!cell.is_user_cell()) return "";
  const cpu::MicroKernels* kernels = cpu::engine().kernels(dtype);
  if (kernels && cpu::has_cell_functions(cell.kind, *kernels)) return "";
  const py::gil_scoped_acquire gil;
  return builder()(cell.name, int(dtype)).cast<std::optional<std::string>>().value_or("");
}

void bind_user_cells(py::module_& m) {
  m.def("add_cell", &add_cell, py::arg("name"), py::arg("gates"), py::arg("saved"),
        py::arg("states"), py::arg("parameters"), py::arg("norm_eps") = 0.0,
        py::arg("recurrent") = true);
  m.def("cell_target", &cell_target, py::arg("dtype"));
  m.def("has_cell", &has_cell, py::arg("kind"), py::arg("dtype"));
  m.def("set_cell_functions", &set_cell_functions, py::arg("kind"), py::arg("target"),
        py::arg("dtype"), py::arg("functions"));
  m.def(
      "set_cell_builder", [](py::object function) { builder() = std::move(function); },
      py::arg("function"));
}

}  // namespace rnnfast
