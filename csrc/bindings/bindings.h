#ifndef GEMLOUPE_BINDINGS_BINDINGS_H_
#define GEMLOUPE_BINDINGS_BINDINGS_H_

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <functional>
#include <utility>
#include <vector>

#include "base/status.h"
#include "layers/lora.h"

namespace gemloupe {

// Raises the Python exception of a failed status.
void ThrowIfError(const Status& status);

template <typename T>
T ValueOrThrow(StatusOr<T> value) {
  ThrowIfError(value.status());
  return std::move(value).value();
}

// A caller's array, converted to contiguous float32 where it is not.
using Floats = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;

// A read-only array that owns `values`; nothing is copied.
pybind11::array_t<float> ToArray(std::vector<float> values, std::vector<pybind11::ssize_t> shape);

// Releases the GIL for a scope. While the interpreter shuts down it never comes back: a thread that
// took the GIL then would be ended by Python in the middle of C++.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;
  // Before 3.14, Python ends a thread that was waiting for the GIL by unwinding its stack.
  ~GilRelease() noexcept(false);

 private:
  PyThreadState* state_;
};

// Calls fn without the GIL.
template <typename Fn>
auto WithoutGil(Fn fn) {
  const GilRelease no_gil;
  return fn();
}

// True, with the Python error set, once a signal's handler has raised (Ctrl-C). Call without the GIL,
// as often as convenient: it looks every 50 ms, and on the main thread only, where handlers run.
class SignalCheck {
 public:
  bool operator()();

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// A progress callback of Python for work without the GIL: its result is false after Ctrl-C, or once
// the callback has raised (ThrowIfError then raises that).
class InterruptibleProgress {
 public:
  explicit InterruptibleProgress(const std::function<void(double)>& callback)
      : callback_(callback) {}
  bool operator()(double fraction);

 private:
  const std::function<void(double)>& callback_;
  SignalCheck stopped_;
};

// [(_core.Adapter, weight)], and what the engine makes of it: from then on they can't be changed.
using PyAdapterMix = std::vector<std::pair<pybind11::object, float>>;
AdapterMix UseAdapters(const PyAdapterMix& adapters);
// What captures compare to know the adapter again.
const void* AdapterIdentity(const pybind11::object& adapter);

void RememberMainThread();
void BindAdapters(pybind11::module_& module);
void BindConfig(pybind11::module_& module);
void BindDrafter(pybind11::module_& module);
void BindHooks(pybind11::module_& module);
void BindGguf(pybind11::module_& module);
void BindKvCache(pybind11::module_& module);
void BindWeights(pybind11::module_& module);
void BindAudioTower(pybind11::module_& module);
void BindTextModel(pybind11::module_& module);
void BindSession(pybind11::module_& module);
void BindVision(pybind11::module_& module);
void BindSystem(pybind11::module_& module);

}  // namespace gemloupe

#endif  // GEMLOUPE_BINDINGS_BINDINGS_H_
