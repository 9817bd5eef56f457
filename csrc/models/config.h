#ifndef GEMLOUPE_MODELS_CONFIG_H_
#define GEMLOUPE_MODELS_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "layers/layer_spec.h"
#include "state/kv_cache.h"

namespace gemloupe {

// One decoder layer as config.json describes it. Python reads the JSON and fills these fields.
struct LayerConfig {
  std::string kind;  // "full" or "sliding"
  int64_t window = 0;
  int64_t head_dim = 0;
  int64_t num_kv_heads = 0;
  int64_t intermediate_size = 0;
  int kv_source = 0;
  bool values_are_keys = false;
  bool has_experts = false;
  double rope_theta = 0.0;
  int64_t rotary_pairs = 0;
  double rope_factor = 1.0;
};

// The text decoder. Fields have the names of config.json; 0 stands for null or absent.
struct TextConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  double rms_norm_eps = 0.0;
  int64_t max_position_embeddings = 0;
  double final_logit_softcapping = 0.0;
  int64_t hidden_size_per_layer_input = 0;
  int64_t vocab_size_per_layer_input = 0;
  int64_t num_experts = 0;
  int64_t top_k_experts = 0;
  int64_t moe_intermediate_size = 0;
  std::string bidirectional = "none";  // "none", "vision" or "all"
  std::vector<LayerConfig> layers;
};

// InvalidArgument, naming the field, for values that no model can have. Python has checked the file;
// this guards the engine's own invariants.
Status CheckConfig(const TextConfig& config);

// What the layers are built from.
std::vector<LayerSpec> MakeLayerSpecs(const TextConfig& config);
std::vector<KvLayerSpec> MakeKvLayerSpecs(const TextConfig& config);
// The distinct RopeSpecs, in the order of LayerSpec::rope_index.
std::vector<RopeSpec> DistinctRopes(const TextConfig& config);
// The first layer from which on no layer stores keys and values; num_hidden_layers if all may.
int FirstSharingLayer(const TextConfig& config);

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_CONFIG_H_
