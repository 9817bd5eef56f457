#include "bindings/weights.h"

#include "base/thread_pool.h"
#include "bindings/bindings.h"
#include "formats/packed_file.h"
#include "formats/packed_writer.h"
#include "ops/dispatch.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

WeightStore& StoreOf(Weights& weights) { return *ValueOrThrow(weights.Get()); }

// (name, dtype, shape, begin, end) and metadata.
py::tuple ReadPacked(const std::string& path) {
  const PackedIndex index = ValueOrThrow(WithoutGil([&] { return ReadPackedIndex(path); }));
  py::list entries;
  for (const PackedTensor& tensor : index.tensors) {
    entries.append(
        TensorEntry{tensor.name, DTypeName(tensor.dtype), tensor.shape, tensor.begin, tensor.end});
  }
  return py::make_tuple(entries, py::bytes(index.metadata));
}

void WritePacked(Weights& weights, const std::string& path,
                 const std::vector<std::pair<std::string, bool>>& tensors,
                 const std::string& metadata, int threads,
                 const std::function<void(double)>& progress) {
  WeightStore& store = StoreOf(weights);
  InterruptibleProgress report(progress);
  PackedIndex index;
  index.metadata = metadata;
  for (const auto& [name, rows_only] : tensors) {
    PackedTensor tensor;
    tensor.name = name;
    tensor.rows_only = rows_only;
    index.tensors.push_back(std::move(tensor));
  }
  ThrowIfError(WithoutGil([&] {
    GL_RETURN_IF_ERROR(InitDispatch());
    const ThreadPool::Pass pass(threads > 0 ? threads : AvailableCpus());
    store.SetProgress([&](double fraction) { return report(fraction); });
    const Status status = WritePackedFile(store, std::move(index), path);
    store.SetProgress(nullptr);
    return status;
  }));
}

std::vector<std::string> VerifyPacked(const std::string& path,
                                      const std::function<void(double)>& progress) {
  InterruptibleProgress report(progress);
  return ValueOrThrow(WithoutGil([&] {
    return DamagedPackedTensors(path, [&](double fraction) { return report(fraction); });
  }));
}

}  // namespace

void BindWeights(py::module_& module) {
  py::class_<Weights>(module, "Weights", "Named tensors of files, and the dtypes they are to have.")
      .def(py::init<>())
      .def(
          "add_file",
          [](Weights& weights, const std::string& path, const std::vector<TensorEntry>& entries) {
            ThrowIfError(StoreOf(weights).AddFile(path, entries));
          },
          py::arg("path"), py::arg("entries"), "Maps a file and adds tensors of it.")
      .def(
          "add_pack_quantized",
          [](Weights& weights, const std::string& name, const std::vector<int64_t>& shape,
             const std::string& packed_path, const TensorEntry& packed,
             const std::string& scales_path, const TensorEntry& scales) {
            ThrowIfError(StoreOf(weights).AddPackQuantized(name, shape, packed_path, packed,
                                                           scales_path, scales));
          },
          py::arg("name"), py::arg("shape"), py::arg("packed_path"), py::arg("packed"),
          py::arg("scales_path"), py::arg("scales"),
          "Adds a matrix of compressed-tensors' pack-quantized format (4 bit, groups of 32).")
      .def(
          "add_values",
          [](Weights& weights, const std::string& name, const Floats& values) {
            const std::vector<int64_t> shape(values.shape(), values.shape() + values.ndim());
            ThrowIfError(StoreOf(weights).AddValues(name, shape, values.data()));
          },
          py::arg("name"), py::arg("values"), "Adds a float32 array, which is copied.")
      .def(
          "set_target",
          [](Weights& weights, const std::string& name, const std::string& dtype) {
            ThrowIfError(StoreOf(weights).SetTarget(name, ValueOrThrow(ParseDType(dtype))));
          },
          py::arg("name"), py::arg("dtype"), "The dtype in which the model is to hold a tensor.")
      .def(
          "set_resident",
          [](Weights& weights, bool resident) { StoreOf(weights).SetResident(resident); },
          py::arg("resident"), "Copies what need not be converted, too, into private pages.");

  module.def("write_packed", &WritePacked, py::arg("weights"), py::arg("path"), py::arg("tensors"),
             py::arg("metadata"), py::arg("threads"), py::arg("progress") = nullptr,
             "Writes tensors, [(name, are only rows of it read?)], in their targets.");
  module.def("read_packed", &ReadPacked, py::arg("path"),
             "([TensorEntry], metadata) of a packed file; ValueError if it is damaged.");
  module.def("damaged_tensors", &VerifyPacked, py::arg("path"), py::arg("progress") = nullptr,
             "Names of tensors of a packed file whose bytes do not have their CRC.");
  module.def(
      "tensor_bytes",
      [](const std::string& dtype, const std::vector<int64_t>& shape) {
        return ValueOrThrow(CheckedTensorBytes(ValueOrThrow(ParseDType(dtype)), shape));
      },
      py::arg("dtype"), py::arg("shape"), "Bytes of a tensor stored in a dtype.");
  module.attr("PACKED_VERSION") = kPackedVersion;
}

}  // namespace gemloupe
