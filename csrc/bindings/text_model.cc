#include "models/text_model.h"

#include "bindings/bindings.h"
#include "runtime/run.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

using FileEntries = std::pair<std::string, std::vector<TensorEntry>>;

std::shared_ptr<TextModel> Load(const TextConfig& config, const std::vector<FileEntries>& files,
                                const TextModelOptions& options,
                                const std::function<void(double)>& progress) {
  SignalCheck stopped;
  const ProgressFn report = [&](double fraction) {
    if (progress) {
      const py::gil_scoped_acquire gil;
      progress(fraction);
    }
    return !stopped();
  };
  StatusOr<std::unique_ptr<TextModel>> model = [&]() -> StatusOr<std::unique_ptr<TextModel>> {
    const GilRelease no_gil;
    WeightStore weights;
    for (const auto& [path, entries] : files) {
      GL_RETURN_IF_ERROR(weights.AddFile(path, entries));
    }
    return TextModel::Load(config, std::move(weights), options, report);
  }();
  return ValueOrThrow(std::move(model));
}

// (logits [rows, V] or None, {name: float32 [T, cols]}).
py::tuple RunModel(TextModel& model, std::vector<int32_t> ids, std::shared_ptr<KvCache> cache,
                   int64_t logits_begin, int64_t logits_end,
                   const std::vector<std::pair<int, int>>& capture, std::optional<float> softcap,
                   int64_t chunk) {
  Captures captures;
  for (const auto& [point, layer] : capture) {
    captures.Want(HookPoints().at(static_cast<size_t>(point)).point, layer);
  }
  SignalCheck stopped;
  RunRequest request;
  request.ids = std::move(ids);
  request.cache = std::move(cache);
  request.logits_begin = logits_begin;
  request.logits_end = logits_end;
  request.captures = capture.empty() ? nullptr : &captures;
  request.softcap = softcap;
  request.chunk = chunk;
  request.stopped = [&] { return stopped(); };
  std::vector<float> logits;
  ThrowIfError(WithoutGil([&] { return Run(model, request, logits); }));
  py::object rows = py::none();
  if (logits_end > logits_begin) {
    rows = ToArray(std::move(logits), {logits_end - logits_begin, model.config().vocab_size});
  }
  py::dict captured;
  for (Captures::Entry& entry : captures.entries()) {
    captured[py::str(HookName(entry.point, entry.layer))] =
        ToArray(std::move(entry.values), {entry.rows, entry.cols});
  }
  return py::make_tuple(rows, captured);
}

}  // namespace

void BindTextModel(py::module_& module) {
  py::class_<TextModelOptions>(module, "TextModelOptions")
      .def(py::init<>())
      .def_readwrite("round_to_bfloat16", &TextModelOptions::round_to_bfloat16)
      .def_readwrite("bfloat16_matmul", &TextModelOptions::bfloat16_matmul)
      .def_readwrite("round_embed_scale", &TextModelOptions::round_embed_scale)
      .def_readwrite("invariant", &TextModelOptions::invariant)
      .def_readwrite("threads", &TextModelOptions::threads)
      .def_property(
          "kv_dtype", [](const TextModelOptions& options) { return DTypeName(options.kv_dtype); },
          [](TextModelOptions& options, const std::string& name) {
            options.kv_dtype = ValueOrThrow(ParseDType(name));
          });

  py::class_<TextModel, std::shared_ptr<TextModel>>(module, "TextModel",
                                                    "The text decoder with its weights.")
      .def(py::init(&Load), py::arg("config"), py::arg("files"), py::arg("options"),
           py::arg("progress") = nullptr,
           "Maps the files, [(path, [TensorEntry])], and builds the model on their tensors.")
      .def_property_readonly("threads", &TextModel::threads)
      .def_property_readonly("copied_bytes",
                             [](const TextModel& model) { return model.weights().copied_bytes(); })
      .def_property_readonly("mapped_bytes",
                             [](const TextModel& model) { return model.weights().mapped_bytes(); })
      .def("run", &RunModel, py::arg("ids"), py::arg("cache"), py::arg("logits_begin"),
           py::arg("logits_end"), py::arg("capture"), py::arg("softcap"), py::arg("chunk"),
           "One sequence through the model; its tokens are appended to the cache.");

  module.def(
      "hook_points",
      [] {
        py::list points;
        for (const HookPointInfo& info : HookPoints()) {
          points.append(py::make_tuple(info.name, info.per_layer, info.shape));
        }
        return points;
      },
      "(name, of every layer?, shape) of each hook point, in model order.");
  module.attr("DEFAULT_CHUNK") = kDefaultChunk;
}

}  // namespace gemloupe
