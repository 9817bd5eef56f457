#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/weights.h"
#include "models/vision_model.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

std::shared_ptr<VisionModel> Load(const VisionConfig& config, Weights& weights,
                                  const VisionOptions& options) {
  WeightStore store = ValueOrThrow(weights.Release());
  return ValueOrThrow(
      WithoutGil([&] { return VisionModel::Load(config, std::move(store), options); }));
}

py::array_t<float> Encode(VisionModel& model, const Floats& patches, int64_t columns,
                          const std::shared_ptr<Hooks>& hooks, int64_t first_row,
                          const PyAdapterMix& adapters) {
  if (patches.ndim() != 2) throw py::value_error("encode: patches are not [rows, values]");
  SignalCheck stopped;
  VisionModel::Request request;
  request.image.patches = ConstMatrix(patches.data(), patches.shape(0), patches.shape(1));
  request.image.columns = columns;
  request.hooks = hooks.get();
  request.first_row = first_row;
  request.adapters = UseAdapters(adapters);
  request.stopped = [&] { return stopped(); };
  std::vector<float> soft_tokens;
  ThrowIfError(WithoutGil([&] { return model.Encode(request, soft_tokens); }));
  const int64_t width = model.config().text_hidden_size;
  const auto rows = static_cast<int64_t>(soft_tokens.size()) / width;
  return ToArray(std::move(soft_tokens), {rows, width});
}

}  // namespace

void BindVision(py::module_& module) {
  py::class_<VisionConfig>(module, "VisionConfig")
      .def(py::init<>())
      .def_readwrite("hidden_size", &VisionConfig::hidden_size)
      .def_readwrite("intermediate_size", &VisionConfig::intermediate_size)
      .def_readwrite("num_hidden_layers", &VisionConfig::num_hidden_layers)
      .def_readwrite("num_attention_heads", &VisionConfig::num_attention_heads)
      .def_readwrite("num_key_value_heads", &VisionConfig::num_key_value_heads)
      .def_readwrite("head_dim", &VisionConfig::head_dim)
      .def_readwrite("patch_size", &VisionConfig::patch_size)
      .def_readwrite("pooling_kernel_size", &VisionConfig::pooling_kernel_size)
      .def_readwrite("position_embedding_size", &VisionConfig::position_embedding_size)
      .def_readwrite("rms_norm_eps", &VisionConfig::rms_norm_eps)
      .def_readwrite("rope_theta", &VisionConfig::rope_theta)
      .def_readwrite("use_clipped_linears", &VisionConfig::use_clipped_linears)
      .def_readwrite("standardize", &VisionConfig::standardize)
      .def_readwrite("mm_embed_dim", &VisionConfig::mm_embed_dim)
      .def_readwrite("mm_posemb_size", &VisionConfig::mm_posemb_size)
      .def_readwrite("text_hidden_size", &VisionConfig::text_hidden_size);

  py::class_<VisionOptions>(module, "VisionOptions")
      .def(py::init<>())
      .def_readwrite("bfloat16_matmul", &VisionOptions::bfloat16_matmul)
      .def_readwrite("invariant", &VisionOptions::invariant)
      .def_readwrite("threads", &VisionOptions::threads);

  py::class_<VisionModel, std::shared_ptr<VisionModel>>(module, "VisionModel",
                                                        "What turns images into soft tokens.")
      .def(py::init(&Load), py::arg("config"), py::arg("weights"), py::arg("options"))
      .def("encode", &Encode, py::arg("patches"), py::arg("columns"), py::arg("hooks") = nullptr,
           py::arg("first_row") = 0, py::arg("adapters") = PyAdapterMix(),
           "Soft tokens [n, D] of one image's patches [rows · columns, values] in [0, 1].");
}

}  // namespace gemloupe
