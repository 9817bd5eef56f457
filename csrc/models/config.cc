#include "models/config.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

RopeSpec MakeRope(const LayerConfig& layer) {
  RopeSpec rope;
  rope.theta = static_cast<float>(layer.rope_theta);
  rope.factor = static_cast<float>(layer.rope_factor);
  rope.head_dim = layer.head_dim;
  rope.pairs = layer.rotary_pairs;
  return rope;
}

Status Positive(const char* field, int64_t value) {
  // Far above any model, far below where a product of two could overflow.
  constexpr int64_t kLargest = int64_t{1} << 30;
  if (value >= 1 && value <= kLargest) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("config: ", field, " is ", value, ", expected 1 to ", kLargest));
}

Status CheckLayer(const TextConfig& config, int index) {
  const LayerConfig& layer = config.layers[static_cast<size_t>(index)];
  const auto fail = [index](const auto&... parts) {
    return absl::InvalidArgumentError(absl::StrCat("config: layer ", index, ": ", parts...));
  };
  if (layer.kind != "full" && layer.kind != "sliding") {
    return fail("kind is \"", layer.kind, "\", expected full or sliding");
  }
  if ((layer.kind == "sliding") != (layer.window > 0)) {
    return fail("window is ", layer.window, " in a ", layer.kind, " layer");
  }
  GL_RETURN_IF_ERROR(Positive("head_dim", layer.head_dim));
  GL_RETURN_IF_ERROR(Positive("num_kv_heads", layer.num_kv_heads));
  GL_RETURN_IF_ERROR(Positive("intermediate_size", layer.intermediate_size));
  if (layer.head_dim % 2 != 0)
    return fail("head_dim is ", layer.head_dim, ", expected an even one");
  if (config.num_attention_heads % layer.num_kv_heads != 0) {
    return fail("num_kv_heads is ", layer.num_kv_heads, ", expected a divisor of ",
                config.num_attention_heads, " (num_attention_heads)");
  }
  if (layer.rotary_pairs < 0 || layer.rotary_pairs > layer.head_dim / 2) {
    return fail("rotary_pairs is ", layer.rotary_pairs, ", expected 0 to ", layer.head_dim / 2);
  }
  if (layer.rope_theta <= 0 || layer.rope_factor <= 0)
    return fail("RoPE theta or factor is not > 0");
  if (layer.kv_source < 0 || layer.kv_source > index) {
    return fail("kv_source is ", layer.kv_source, ", expected 0 to ", index);
  }
  const LayerConfig& source = config.layers[static_cast<size_t>(layer.kv_source)];
  if (source.kv_source != layer.kv_source || source.kind != layer.kind ||
      source.head_dim != layer.head_dim || source.num_kv_heads != layer.num_kv_heads ||
      source.window != layer.window) {
    return fail("kv_source ", layer.kv_source,
                " is not a storing layer of the same kind and sizes");
  }
  return absl::OkStatus();
}

}  // namespace

Status CheckConfig(const TextConfig& config) {
  GL_RETURN_IF_ERROR(Positive("vocab_size", config.vocab_size));
  GL_RETURN_IF_ERROR(Positive("hidden_size", config.hidden_size));
  GL_RETURN_IF_ERROR(Positive("num_attention_heads", config.num_attention_heads));
  GL_RETURN_IF_ERROR(Positive("max_position_embeddings", config.max_position_embeddings));
  GL_RETURN_IF_ERROR(Positive("num_hidden_layers", config.num_hidden_layers));
  if (config.num_hidden_layers != static_cast<int64_t>(config.layers.size())) {
    return absl::InvalidArgumentError(absl::StrCat("config: num_hidden_layers is ",
                                                   config.num_hidden_layers, ", but ",
                                                   config.layers.size(), " layers are described"));
  }
  if (!(config.rms_norm_eps > 0))
    return absl::InvalidArgumentError("config: rms_norm_eps is not > 0");
  if (config.hidden_size_per_layer_input > 0) {
    GL_RETURN_IF_ERROR(Positive("vocab_size_per_layer_input", config.vocab_size_per_layer_input));
    if (config.vocab_size_per_layer_input < config.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("config: vocab_size_per_layer_input is ", config.vocab_size_per_layer_input,
                       ", expected at least vocab_size, ", config.vocab_size));
    }
  }
  const bool has_experts = std::any_of(config.layers.begin(), config.layers.end(),
                                       [](const LayerConfig& layer) { return layer.has_experts; });
  if (has_experts) {
    GL_RETURN_IF_ERROR(Positive("num_experts", config.num_experts));
    GL_RETURN_IF_ERROR(Positive("moe_intermediate_size", config.moe_intermediate_size));
    if (config.top_k_experts < 1 || config.top_k_experts > config.num_experts) {
      return absl::InvalidArgumentError(absl::StrCat("config: top_k_experts is ",
                                                     config.top_k_experts, ", expected 1 to ",
                                                     config.num_experts, " (num_experts)"));
    }
  }
  for (int i = 0; i < static_cast<int>(config.layers.size()); ++i) {
    GL_RETURN_IF_ERROR(CheckLayer(config, i));
  }
  return absl::OkStatus();
}

std::vector<RopeSpec> DistinctRopes(const TextConfig& config) {
  std::vector<RopeSpec> ropes;
  for (const LayerConfig& layer : config.layers) {
    const RopeSpec rope = MakeRope(layer);
    if (std::find(ropes.begin(), ropes.end(), rope) == ropes.end()) ropes.push_back(rope);
  }
  return ropes;
}

std::vector<LayerSpec> MakeLayerSpecs(const TextConfig& config) {
  const std::vector<RopeSpec> ropes = DistinctRopes(config);
  std::vector<LayerSpec> specs;
  for (const LayerConfig& layer : config.layers) {
    LayerSpec spec;
    spec.window = layer.window;
    spec.num_heads = config.num_attention_heads;
    spec.num_kv_heads = layer.num_kv_heads;
    spec.head_dim = layer.head_dim;
    spec.intermediate_size = layer.intermediate_size;
    spec.kv_source = layer.kv_source;
    spec.shares_kv = layer.kv_source != static_cast<int>(specs.size());
    spec.values_are_keys = layer.values_are_keys;
    spec.has_experts = layer.has_experts;
    spec.bidirectional = config.bidirectional == "all";
    spec.rope = MakeRope(layer);
    spec.rope_index =
        static_cast<int>(std::find(ropes.begin(), ropes.end(), spec.rope) - ropes.begin());
    specs.push_back(spec);
  }
  return specs;
}

std::vector<KvLayerSpec> MakeKvLayerSpecs(const TextConfig& config) {
  std::vector<KvLayerSpec> specs;
  // Attention that looks both ways reaches one position further back.
  const int64_t further = config.bidirectional == "all" ? 1 : 0;
  for (const LayerConfig& layer : config.layers) {
    const int64_t window = layer.window == 0 ? 0 : layer.window + further;
    specs.push_back({.window = window,
                     .num_heads = layer.num_kv_heads,
                     .head_dim = layer.head_dim,
                     .source = layer.kv_source,
                     .values_are_keys = layer.values_are_keys,
                     .rope = MakeRope(layer),
                     .key_weight = nullptr});
  }
  return specs;
}

int FirstSharingLayer(const TextConfig& config) {
  int first = static_cast<int>(config.layers.size());
  while (first > 0 && config.layers[static_cast<size_t>(first - 1)].kv_source != first - 1) --first;
  return first;
}

}  // namespace gemloupe
