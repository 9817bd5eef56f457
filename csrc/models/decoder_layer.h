#ifndef GEMLOUPE_MODELS_DECODER_LAYER_H_
#define GEMLOUPE_MODELS_DECODER_LAYER_H_

#include <memory>
#include <optional>

#include "base/status.h"
#include "formats/weight_store.h"
#include "layers/attention.h"
#include "layers/experts.h"
#include "layers/mlp.h"
#include "layers/norm.h"
#include "layers/pass_context.h"
#include "layers/per_layer_input.h"
#include "layers/router.h"
#include "models/config.h"

namespace gemloupe {

// One layer of the decoder, in the order of its diagram.
class DecoderLayer {
 public:
  // Reads the weights of layer `index`; its experts stay on disk where there is a cache for them.
  static StatusOr<DecoderLayer> Load(const TextConfig& config, const LayerSpec& spec, int index,
                                     const std::shared_ptr<ExpertCache>& expert_cache,
                                     WeightStore& weights);

  // Replaces resid [T, D]. per_layer_input [T, P] (no columns in models that have none).
  Status Forward(Matrix resid, Matrix per_layer_input, const PassContext& ctx) const;

  // Only stores the keys and values of rows that go no further than this layer.
  Status StoreKeysAndValues(ConstMatrix resid, const PassContext& ctx) const;

  // Weight [H] of the key norm where values are keys, else null.
  std::shared_ptr<const std::vector<float>> key_weight() const { return attention_->key_weight(); }

 private:
  DecoderLayer() = default;
  Status Attend(Matrix resid, const PassContext& ctx) const;
  Status FeedForward(Matrix resid, const PassContext& ctx) const;
  Status AddExperts(ConstMatrix resid, const PassContext& ctx, Matrix dense) const;

  Norm input_norm_;
  Norm post_attention_norm_;
  Norm pre_feedforward_norm_;
  Norm post_feedforward_norm_;
  float layer_scalar_ = 1.0f;
  std::optional<AttentionLayer> attention_;
  std::optional<Mlp> mlp_;
  // Mixture of experts beside the dense MLP:
  std::optional<Router> router_;
  std::optional<Experts> experts_;
  Norm post_mlp_norm_;      // post_feedforward_layernorm_1
  Norm pre_experts_norm_;   // pre_feedforward_layernorm_2
  Norm post_experts_norm_;  // post_feedforward_layernorm_2
  std::optional<PerLayerInput> per_layer_input_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_DECODER_LAYER_H_
