#include "torch/plain.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/gil_safe_call_once.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

namespace rnnfast {
namespace {

namespace py = pybind11;

// Whether a torch-function mode is active that must see the call. DeviceContext, the mode of
// torch.set_default_device and `with torch.device(...)`, need not see it: it only chooses the
// device of new tensors without an explicit one, and tensors made here have one.
bool function_mode_watches() {
  using Modes = at::impl::PythonTorchFunctionTLS;
  if (!at::impl::torch_function_mode_enabled()) return false;
  if (Modes::stack_len() > 1) return true;  // at most one mode is a DeviceContext
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> device_mode;
  const py::object& type = device_mode
                               .call_once_and_store_result([] {
                                 return py::module_::import("torch.utils._device")
                                     .attr("DeviceContext")
                                     .cast<py::object>();
                               })
                               .get_stored();
  const PyObject* mode = Modes::get_stack_at(0)->ptr(getPyInterpreter());
  return reinterpret_cast<const PyObject*>(Py_TYPE(mode)) != type.ptr();
}

}  // namespace

bool is_plain(const at::Tensor& t) {
  static const uint64_t ordinary = [] {
    const c10::InferenceMode off(false);
    return at::empty({0}, at::TensorOptions().dtype(at::kFloat)).key_set().raw_repr();
  }();
  return (t.key_set().raw_repr() & ~ordinary) == 0 && t.device().is_cpu();
}

// Tracing and autocast are found through their dispatch keys, since the headers of torch's own
// functions for them include all operators.
bool is_plain_context() {
  return !c10::impl::dispatch_mode_enabled() && !function_mode_watches() &&
         !at::tracer::impl::is_dispatch_enabled() &&
         c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutocastCPU);
}

bool unpack(py::handle object, at::Tensor& tensor) {
  if (!THPVariable_CheckExact(object.ptr())) return false;
  tensor = THPVariable_Unpack(object.ptr());
  return is_plain(tensor);
}

}  // namespace rnnfast
