#include "base/cpu.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "bindings/bindings.h"
#include "ops/bandwidth.h"
#include "ops/onednn.h"

namespace py = pybind11;

namespace gemloupe {

void BindSystem(py::module_& module) {
  module.def(
      "isa", [] { return IsaName(ValueOrThrow(SelectedIsa())); },
      "The instruction set in use; ValueError for a bad GEMLOUPE_ISA.");
  module.def("detected_isa", [] { return IsaName(DetectedIsa()); });
  module.def("cpu_model", &CpuModelName);
  module.def("available_cpus", &AvailableCpus);
  module.def("available_memory", &AvailableMemory, "Bytes that this process could still use.");
  module.def("onednn_version", &OnednnVersion);
  module.def(
      "measure_bandwidth",
      [](int threads) {
        return ValueOrThrow(WithoutGil([&] { return MeasureReadBandwidth(threads); })) / 1e9;
      },
      py::arg("threads"), "GB/s that this many threads read from memory.");
}

}  // namespace gemloupe
