#include "models/config.h"

#include "bindings/bindings.h"
#include "formats/safetensors.h"

namespace py = pybind11;

namespace gemloupe {

void BindConfig(py::module_& module) {
  py::class_<LayerConfig>(module, "LayerConfig", "One decoder layer of a TextConfig.")
      .def(py::init<>())
      .def_readwrite("kind", &LayerConfig::kind)
      .def_readwrite("window", &LayerConfig::window)
      .def_readwrite("head_dim", &LayerConfig::head_dim)
      .def_readwrite("num_kv_heads", &LayerConfig::num_kv_heads)
      .def_readwrite("intermediate_size", &LayerConfig::intermediate_size)
      .def_readwrite("kv_source", &LayerConfig::kv_source)
      .def_readwrite("values_are_keys", &LayerConfig::values_are_keys)
      .def_readwrite("has_experts", &LayerConfig::has_experts)
      .def_readwrite("rope_theta", &LayerConfig::rope_theta)
      .def_readwrite("rotary_pairs", &LayerConfig::rotary_pairs)
      .def_readwrite("rope_factor", &LayerConfig::rope_factor);

  py::class_<TextConfig>(module, "TextConfig",
                         "The text decoder's config, as config.json names it.")
      .def(py::init<>())
      .def_readwrite("vocab_size", &TextConfig::vocab_size)
      .def_readwrite("hidden_size", &TextConfig::hidden_size)
      .def_readwrite("num_hidden_layers", &TextConfig::num_hidden_layers)
      .def_readwrite("num_attention_heads", &TextConfig::num_attention_heads)
      .def_readwrite("rms_norm_eps", &TextConfig::rms_norm_eps)
      .def_readwrite("max_position_embeddings", &TextConfig::max_position_embeddings)
      .def_readwrite("final_logit_softcapping", &TextConfig::final_logit_softcapping)
      .def_readwrite("hidden_size_per_layer_input", &TextConfig::hidden_size_per_layer_input)
      .def_readwrite("vocab_size_per_layer_input", &TextConfig::vocab_size_per_layer_input)
      .def_readwrite("num_experts", &TextConfig::num_experts)
      .def_readwrite("top_k_experts", &TextConfig::top_k_experts)
      .def_readwrite("moe_intermediate_size", &TextConfig::moe_intermediate_size)
      .def_readwrite("bidirectional", &TextConfig::bidirectional)
      .def_readwrite("layers", &TextConfig::layers);

  py::class_<TensorEntry>(module, "TensorEntry",
                          "A tensor of a safetensors file; offsets from the start of the file.")
      .def(py::init([](std::string name, std::string dtype, std::vector<int64_t> shape,
                       uint64_t begin, uint64_t end) {
             return TensorEntry{std::move(name), std::move(dtype), std::move(shape), begin, end};
           }),
           py::arg("name"), py::arg("dtype"), py::arg("shape"), py::arg("begin"), py::arg("end"))
      .def_readonly("name", &TensorEntry::name)
      .def_readonly("dtype", &TensorEntry::dtype)
      .def_readonly("shape", &TensorEntry::shape)
      .def_readonly("begin", &TensorEntry::begin)
      .def_readonly("end", &TensorEntry::end);
}

}  // namespace gemloupe
