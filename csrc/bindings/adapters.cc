#include "bindings/bindings.h"
#include "layers/lora.h"
#include "models/adapter.h"
#include "models/text_model.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

AdapterValues ValuesOf(const Floats& array) {
  return {array.data(), std::vector<int64_t>(array.shape(), array.shape() + array.ndim())};
}

std::vector<float> VectorOf(const std::optional<Floats>& array) {
  if (!array.has_value()) return {};
  return std::vector<float>(array->data(), array->data() + array->size());
}

// An adapter and what fills it. Once a call has used it, it can't be changed: passes read it without
// a lock.
class OpenAdapter {
 public:
  OpenAdapter(const TextModel& model, const std::string& dtype)
      : builder_(model.config(), ParseHeld(dtype)), adapter_(std::make_shared<Adapter>()) {}

  void Add(int layer, const std::string& module, const Floats& a, const Floats& b, float scale,
           const std::optional<Floats>& gain) {
    AdapterBuilder::LowRank values = {ValuesOf(a), ValuesOf(b), scale, VectorOf(gain)};
    ThrowIfError(
        builder_.AddLowRank(ValueOrThrow(ParseAdaptedModule(module)), layer, values, Filled()));
  }
  void Replace(int layer, const std::string& module, const Floats& weight) {
    ThrowIfError(builder_.Replace(ValueOrThrow(ParseAdaptedModule(module)), layer, ValuesOf(weight),
                                  Filled()));
  }
  void Shift(int layer, const std::string& module, const Floats& shift) {
    ThrowIfError(
        builder_.Shift(ValueOrThrow(ParseAdaptedModule(module)), layer, VectorOf(shift), Filled()));
  }
  void ReplaceRows(const std::string& module, const std::vector<int32_t>& ids, const Floats& rows) {
    ThrowIfError(builder_.ReplaceRows(ValueOrThrow(ParseAdaptedModule(module)), ids, ValuesOf(rows),
                                      Filled()));
  }
  uint64_t nbytes() const { return adapter_->nbytes(); }
  std::shared_ptr<const Adapter> Use() {
    used_ = true;
    return adapter_;
  }

 private:
  static DType ParseHeld(const std::string& name) {
    const DType dtype = ValueOrThrow(ParseDType(name));
    if (!IsPlain(dtype)) {
      throw py::value_error("an adapter's dtype is '" + name +
                            "', expected float32, bfloat16 or float16");
    }
    return dtype;
  }
  Adapter& Filled() {
    if (used_) throw std::runtime_error("this adapter is in use and can't be changed");
    return *adapter_;
  }

  AdapterBuilder builder_;
  std::shared_ptr<Adapter> adapter_;
  bool used_ = false;  // guarded by the GIL
};

py::list Merge(TextModel& model, const PyAdapterMix& adapters, bool requantize,
               const std::function<void(double)>& progress) {
  InterruptibleProgress report(progress);
  const AdapterMix mix = UseAdapters(adapters);
  const TextModel::MergeOptions options = {requantize, [&](double x) { return report(x); }};
  const auto merged = ValueOrThrow(WithoutGil([&] { return model.SetMerged(mix, options); }));
  py::list modules;
  for (const TextModel::MergedModule& one : merged) {
    modules.append(py::make_tuple(one.name, one.error));
  }
  return modules;
}

}  // namespace

AdapterMix UseAdapters(const PyAdapterMix& adapters) {
  AdapterMix mix;
  for (const auto& [adapter, weight] : adapters) {
    mix.push_back({adapter.cast<OpenAdapter&>().Use(), weight});
  }
  return mix;
}

const void* AdapterIdentity(const py::object& adapter) {
  return adapter.cast<OpenAdapter&>().Use().get();
}

void BindAdapters(py::module_& module) {
  py::class_<OpenAdapter, std::shared_ptr<OpenAdapter>>(
      module, "Adapter", "Low-rank and other changes of a model's weights, kept apart from them.")
      .def(py::init<const TextModel&, const std::string&>(), py::arg("model"), py::arg("dtype"),
           "For models of the same sizes as `model`; A and B are held in dtype.")
      .def("add", &OpenAdapter::Add, py::arg("layer"), py::arg("module"), py::arg("a"),
           py::arg("b"), py::arg("scale"), py::arg("gain") = py::none(),
           "y = gain · (W x + scale · B A x), a [r, in], b [out, r]; layer −1 outside the layers.")
      .def(
          "add_experts",
          [](OpenAdapter& adapter, int layer, const std::string& module, const Floats& a,
             const Floats& b,
             float scale) { adapter.Add(layer, module, a, b, scale, std::nullopt); },
          py::arg("layer"), py::arg("module"), py::arg("a"), py::arg("b"), py::arg("scale"),
          "The same for every expert: a [E, r, in], b [E, out, r].")
      .def("replace", &OpenAdapter::Replace, py::arg("layer"), py::arg("module"), py::arg("weight"),
           "A matrix in place of the module's.")
      .def("shift", &OpenAdapter::Shift, py::arg("layer"), py::arg("module"), py::arg("shift"),
           "Adds a vector [out] to a module's outputs, beside its other change or alone.")
      .def("replace_rows", &OpenAdapter::ReplaceRows, py::arg("module"), py::arg("ids"),
           py::arg("rows"), "Rows of embeddings or of the head for some tokens, ascending.")
      .def_property_readonly("nbytes", &OpenAdapter::nbytes);
  module.def("merge_adapters", &Merge, py::arg("model"), py::arg("adapters"),
             py::arg("requantize") = false, py::arg("progress") = nullptr,
             "Folds [(adapter, weight)] into copies of the weights, instead of what was merged "
             "before; none: the model's own again. [(module, relative error)].");
  module.def(
      "adapted_module_shape",
      [](const TextModel& model, int layer, const std::string& name) -> py::object {
        const AdaptedModule of = ValueOrThrow(ParseAdaptedModule(name));
        const auto shape = AdaptedModuleShape(model.config(), of, layer);
        return shape.ok() ? py::cast(*shape) : py::none();
      },
      py::arg("model"), py::arg("layer"), py::arg("module"),
      "[out, in] of a module's matrix ([E, out, in] of experts, [V, cols] of embeddings); None "
      "where the model has none.");
}

}  // namespace gemloupe
