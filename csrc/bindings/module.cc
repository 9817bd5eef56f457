#include <string>
#include <thread>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace gemloupe {

void ThrowIfError(const Status& status) {
  if (status.ok()) return;
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();  // a signal stopped the work
  const std::string message(status.message().data(), status.message().size());
  PyObject* type = PyExc_RuntimeError;
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kAlreadyExists: type = PyExc_ValueError; break;
    case absl::StatusCode::kNotFound: type = PyExc_FileNotFoundError; break;
    case absl::StatusCode::kPermissionDenied: type = PyExc_PermissionError; break;
    case absl::StatusCode::kResourceExhausted: type = PyExc_MemoryError; break;
    case absl::StatusCode::kDataLoss: type = PyExc_OSError; break;
    case absl::StatusCode::kCancelled: type = PyExc_KeyboardInterrupt; break;
    default: break;
  }
  py::set_error(type, message.c_str());
  throw py::error_already_set();
}

py::array_t<float> ToArray(std::vector<float> values, std::vector<py::ssize_t> shape) {
  auto* owner = new std::vector<float>(std::move(values));
  const py::capsule free(owner, [](void* data) { delete static_cast<std::vector<float>*>(data); });
  py::array_t<float> array(std::move(shape), owner->data(), free);
  array.attr("flags").attr("writeable") = false;
  return array;
}

namespace {

unsigned long main_thread = 0;  // NOLINT(google-runtime-int): the type of Python's function

bool PythonIsFinalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

}  // namespace

GilRelease::~GilRelease() noexcept(false) {
  while (PythonIsFinalizing()) std::this_thread::sleep_for(std::chrono::hours(1));
  PyEval_RestoreThread(state_);
}

void RememberMainThread() {
  main_thread =
      py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
}

bool InterruptibleProgress::operator()(double fraction) {
  if (callback_) {
    const py::gil_scoped_acquire gil;
    try {
      callback_(fraction);
    } catch (py::error_already_set& error) {
      error.restore();
      return false;
    }
  }
  return !stopped_();
}

bool SignalCheck::operator()() {
  if (PyThread_get_thread_ident() != main_thread) return false;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_ < std::chrono::milliseconds(50)) return false;
  last_ = now;
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

}  // namespace gemloupe

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ engine of gemloupe. Use it through the package's public functions.";
  module.attr("__version__") = GEMLOUPE_VERSION;
  gemloupe::RememberMainThread();
  gemloupe::BindConfig(module);
  gemloupe::BindGguf(module);
  gemloupe::BindKvCache(module);
  gemloupe::BindWeights(module);
  gemloupe::BindAdapters(module);
  gemloupe::BindDrafter(module);
  gemloupe::BindHooks(module);
  gemloupe::BindTextModel(module);
  gemloupe::BindAudioTower(module);
  gemloupe::BindSession(module);
  gemloupe::BindVision(module);
  gemloupe::BindSystem(module);
}
