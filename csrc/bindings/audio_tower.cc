#include "models/audio_tower.h"

#include "bindings/bindings.h"
#include "bindings/weights.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

std::shared_ptr<AudioTower> Load(const AudioConfig& config, Weights& weights,
                                 const AudioTowerOptions& options,
                                 const std::function<void(double)>& progress) {
  WeightStore store = ValueOrThrow(weights.Release());
  InterruptibleProgress report(progress);
  return ValueOrThrow(WithoutGil([&] {
    return AudioTower::Load(config, std::move(store), options, [&](double x) { return report(x); });
  }));
}

// Soft tokens [n, D].
py::array_t<float> Encode(AudioTower& tower, const Floats& features, AudioState& state, bool last,
                          const std::shared_ptr<Hooks>& hooks, const PyAdapterMix& adapters) {
  if (features.ndim() != 2 || features.shape(1) != tower.config().feature_size) {
    throw py::value_error("encode: features are not [F, feature_size]");
  }
  SignalCheck stopped;
  AudioTower::Request request;
  request.features = ConstMatrix(features.data(), features.shape(0), features.shape(1));
  request.last = last;
  request.hooks = hooks.get();
  request.adapters = UseAdapters(adapters);
  request.stopped = [&] { return stopped(); };
  std::vector<float> soft_tokens;
  ThrowIfError(WithoutGil([&] { return tower.Encode(request, state, soft_tokens); }));
  const int64_t width = tower.config().text_hidden_size;
  const auto rows = static_cast<py::ssize_t>(soft_tokens.size()) / width;
  return ToArray(std::move(soft_tokens), {rows, width});
}

}  // namespace

void BindAudioTower(py::module_& module) {
  py::class_<AudioConfig>(module, "AudioConfig", "The audio part of a checkpoint's config.json.")
      .def(py::init<>())
      .def_readwrite("text_hidden_size", &AudioConfig::text_hidden_size)
      .def_readwrite("rms_norm_eps", &AudioConfig::rms_norm_eps)
      .def_readwrite("feature_size", &AudioConfig::feature_size)
      .def_readwrite("hidden_size", &AudioConfig::hidden_size)
      .def_readwrite("num_hidden_layers", &AudioConfig::num_hidden_layers)
      .def_readwrite("num_attention_heads", &AudioConfig::num_attention_heads)
      .def_readwrite("subsampling_conv_channels", &AudioConfig::subsampling_conv_channels)
      .def_readwrite("conv_kernel_size", &AudioConfig::conv_kernel_size)
      .def_readwrite("residual_weight", &AudioConfig::residual_weight)
      .def_readwrite("attention_context_left", &AudioConfig::attention_context_left)
      .def_readwrite("attention_logit_cap", &AudioConfig::attention_logit_cap)
      .def_readwrite("gradient_clipping", &AudioConfig::gradient_clipping)
      .def_readwrite("use_clipped_linears", &AudioConfig::use_clipped_linears)
      .def_readwrite("output_proj_dims", &AudioConfig::output_proj_dims);

  py::class_<AudioTowerOptions>(module, "AudioTowerOptions")
      .def(py::init<>())
      .def_readwrite("bfloat16_matmul", &AudioTowerOptions::bfloat16_matmul)
      .def_readwrite("invariant", &AudioTowerOptions::invariant)
      .def_readwrite("threads", &AudioTowerOptions::threads);

  py::class_<AudioState, std::shared_ptr<AudioState>>(
      module, "AudioState", "What one sound's later features need of the earlier ones.")
      .def(py::init<>())
      .def_property_readonly("tokens", [](const AudioState& state) { return state.num_tokens; })
      .def_property_readonly("ended", [](const AudioState& state) { return state.ended; });

  py::class_<AudioTower, std::shared_ptr<AudioTower>>(module, "AudioTower",
                                                      "The audio encoder with its weights.")
      .def(py::init(&Load), py::arg("config"), py::arg("weights"), py::arg("options"),
           py::arg("progress") = nullptr,
           "Builds the tower on the weights; they are taken out of `weights`.")
      .def_property_readonly("copied_bytes", &AudioTower::copied_bytes)
      .def_property_readonly("mapped_bytes", &AudioTower::mapped_bytes)
      .def("encode", &Encode, py::arg("features"), py::arg("state"), py::arg("last"),
           py::arg("hooks") = nullptr, py::arg("adapters") = PyAdapterMix(),
           "Soft tokens [n, D] that a sound's next features [F, feature_size] complete.");
}

}  // namespace gemloupe
