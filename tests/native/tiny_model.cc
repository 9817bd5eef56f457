#include "tiny_model.h"

#include <cstring>
#include <random>
#include <utility>

#include "models/weight_names.h"

namespace gemloupe {
namespace {

LayerConfig Sliding(int kv_source, int64_t intermediate_size) {
  LayerConfig layer;
  layer.kind = "sliding";
  layer.window = 5;
  layer.head_dim = 8;
  layer.num_kv_heads = 2;
  layer.intermediate_size = intermediate_size;
  layer.kv_source = kv_source;
  layer.rope_theta = 1e4;
  layer.rotary_pairs = 4;
  return layer;
}

LayerConfig Full(int kv_source, int64_t intermediate_size) {
  LayerConfig layer;
  layer.kind = "full";
  layer.head_dim = 14;
  layer.num_kv_heads = 1;
  layer.intermediate_size = intermediate_size;
  layer.kv_source = kv_source;
  layer.values_are_keys = true;
  layer.has_experts = true;
  layer.rope_theta = 1e6;
  layer.rotary_pairs = 3;
  return layer;
}

}  // namespace

TinyModel::TinyModel(DType dtype) : dtype_(dtype) {
  config.vocab_size = 37;
  config.hidden_size = 22;
  config.num_hidden_layers = 4;
  config.num_attention_heads = 4;
  config.rms_norm_eps = 1e-6;
  config.max_position_embeddings = 4096;
  config.final_logit_softcapping = 30.0;
  config.hidden_size_per_layer_input = 6;
  config.vocab_size_per_layer_input = 37;
  config.num_experts = 5;
  config.top_k_experts = 2;
  config.moe_intermediate_size = 9;
  config.layers = {Sliding(0, 19), Full(1, 19), Sliding(0, 38), Full(1, 38)};

  const int64_t hidden = config.hidden_size, width = config.hidden_size_per_layer_input;
  const int64_t all = config.num_hidden_layers * width;
  const auto matrix = [&](const std::string& name, const std::vector<int64_t>& shape) {
    Add(name, shape, 0.0f, 0.3f);
  };
  const auto norm = [&](const std::string& name, int64_t size) { Add(name, {size}, 1.0f, 0.2f); };
  matrix(names::kEmbedTokens, {config.vocab_size, hidden});
  matrix(names::kEmbedTokensPerLayer, {config.vocab_size_per_layer_input, all});
  matrix(names::kPerLayerModelProjection, {all, hidden});
  norm(names::kPerLayerProjectionNorm, width);
  norm(names::kFinalNorm, hidden);
  for (int i = 0; i < static_cast<int>(config.layers.size()); ++i) {
    const LayerConfig& layer = config.layers[static_cast<size_t>(i)];
    const auto name = [i](const char* tensor) { return names::OfLayer(i, tensor); };
    const int64_t q_rows = config.num_attention_heads * layer.head_dim;
    const int64_t kv_rows = layer.num_kv_heads * layer.head_dim;
    for (const char* tensor :
         {names::kInputNorm, names::kPostAttentionNorm, names::kPreFeedforwardNorm,
          names::kPostFeedforwardNorm, names::kPostPerLayerInputNorm}) {
      norm(name(tensor), hidden);
    }
    norm(name(names::kLayerScalar), 1);
    matrix(name(names::kQProj), {q_rows, hidden});
    matrix(name(names::kOProj), {hidden, q_rows});
    norm(name(names::kQNorm), layer.head_dim);
    if (layer.kv_source == i) {
      matrix(name(names::kKProj), {kv_rows, hidden});
      norm(name(names::kKNorm), layer.head_dim);
      if (!layer.values_are_keys) matrix(name(names::kVProj), {kv_rows, hidden});
    }
    matrix(name(names::kGateProj), {layer.intermediate_size, hidden});
    matrix(name(names::kUpProj), {layer.intermediate_size, hidden});
    matrix(name(names::kDownProj), {hidden, layer.intermediate_size});
    matrix(name(names::kPerLayerInputGate), {width, hidden});
    matrix(name(names::kPerLayerProjection), {hidden, width});
    if (!layer.has_experts) continue;
    const int64_t experts = config.num_experts, inner = config.moe_intermediate_size;
    matrix(name(names::kRouterProj), {experts, hidden});
    norm(name(names::kRouterScale), hidden);
    norm(name(names::kRouterPerExpertScale), experts);
    matrix(name(names::kExpertsGateUpProj), {experts, 2 * inner, hidden});
    matrix(name(names::kExpertsDownProj), {experts, hidden, inner});
    for (const char* tensor :
         {names::kPostMlpNorm, names::kPreExpertsNorm, names::kPostExpertsNorm}) {
      norm(name(tensor), hidden);
    }
  }
}

void TinyModel::Add(const std::string& name, const std::vector<int64_t>& shape, float mean,
                    float deviation) {
  Tensor& tensor = tensors_.emplace_back();
  tensor.name = name;
  tensor.view.dtype = dtype_;
  tensor.view.shape = shape;
  tensor.bytes.resize(1 + tensor.view.byte_size());
  tensor.view.data = tensor.bytes.data() + 1;
  std::mt19937 generator(++seed_);
  std::normal_distribution<float> normal(mean, deviation);
  for (int64_t i = 0; i < tensor.view.size(); ++i) {
    const float value = normal(generator);
    uint8_t* at = tensor.bytes.data() + 1 + static_cast<size_t>(i) * DTypeSize(dtype_);
    if (dtype_ == DType::kFloat32) {
      std::memcpy(at, &value, sizeof(value));
    } else {
      const uint16_t bits =
          dtype_ == DType::kBfloat16 ? FloatToBfloat16(value) : FloatToFloat16(value);
      std::memcpy(at, &bits, sizeof(bits));
    }
  }
}

void TinyModel::Remove(const std::string& name) {
  for (auto it = tensors_.begin(); it != tensors_.end(); ++it) {
    if (it->name == name) {
      tensors_.erase(it);
      return;
    }
  }
}

WeightStore TinyModel::Weights() const {
  WeightStore store;
  for (const Tensor& tensor : tensors_) store.AddView(tensor.name, tensor.view);
  return store;
}

std::shared_ptr<TextModel> TinyModel::Load(const TextModelOptions& options) const {
  auto model = TextModel::Load(config, Weights(), options, nullptr);
  if (!model.ok()) std::fprintf(stderr, "%s\n", model.status().ToString().c_str());
  GL_CHECK(model.ok());
  return std::shared_ptr<TextModel>(std::move(*model));
}

std::vector<int32_t> RandomIds(const TextConfig& config, int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back(static_cast<int32_t>(generator() % static_cast<uint32_t>(config.vocab_size)));
  }
  return ids;
}

}  // namespace gemloupe
