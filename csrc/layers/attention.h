#ifndef GEMLOUPE_LAYERS_ATTENTION_H_
#define GEMLOUPE_LAYERS_ATTENTION_H_

#include <memory>
#include <vector>

#include "base/status.h"
#include "layers/layer_spec.h"
#include "layers/norm.h"
#include "layers/pass_context.h"

namespace gemloupe {

struct AttentionWeights {
  TensorView q_proj;          // [N · H, D]
  TensorView k_proj;          // [K · H, D]; empty in a sharing layer
  TensorView v_proj;          // [K · H, D]; empty where values are keys, and in a sharing layer
  TensorView o_proj;          // [D, N · H]
  std::vector<float> q_norm;  // [H]
  std::vector<float> k_norm;  // [H]; empty in a sharing layer
};

// Grouped-query attention with q/k/v norms, RoPE and scaling 1, reading and writing the KV cache.
class AttentionLayer {
 public:
  AttentionLayer(const LayerSpec& spec, AttentionWeights weights, float eps);

  // out [T, D] = o_proj(z) for x [T, D], the output of the layer's input norm.
  Status Forward(ConstMatrix x, const PassContext& ctx, Matrix out) const;
  // Only stores the keys and values of these rows: the rest is done for the rows that go on, by
  // Forward with ctx.kv_stored.
  Status Store(ConstMatrix x, const PassContext& ctx) const;

  // Weight [H] of the key norm where values are keys, else null: caches derive keys with it.
  std::shared_ptr<const std::vector<float>> key_weight() const;

 private:
  // q without columns: only keys and values; k without columns: only queries.
  Status Project(ConstMatrix x, const PassContext& ctx, Matrix q, Matrix k, Matrix v) const;
  void StoreKeysAndValues(Matrix k, Matrix v, const PassContext& ctx) const;
  Status Attend(ConstMatrix q, const PassContext& ctx, Matrix z) const;
  Status ShowSteps(size_t segment, ConstMatrix q, const std::vector<KeyRange>& ranges,
                   const PassContext& ctx, Matrix z) const;
  Status Output(ConstMatrix z, const PassContext& ctx, Matrix out) const;

  LayerSpec spec_;
  AttentionWeights weights_;
  Norm q_norm_;
  Norm k_norm_;
  Norm v_norm_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_ATTENTION_H_
