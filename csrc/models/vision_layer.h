#ifndef GEMLOUPE_MODELS_VISION_LAYER_H_
#define GEMLOUPE_MODELS_VISION_LAYER_H_

#include "base/status.h"
#include "formats/weight_store.h"
#include "layers/clipped_linear.h"
#include "layers/norm.h"
#include "layers/pass_context.h"
#include "models/vision_config.h"
#include "ops/rope.h"

namespace gemloupe {

// The angles of the patches' columns and rows.
struct PatchAngles {
  RopeAngles columns;
  RopeAngles rows;
};

// One layer of the vision encoder: every patch of an image attends to every other.
class VisionLayer {
 public:
  static StatusOr<VisionLayer> Load(const VisionConfig& config, int index, WeightStore& weights);

  // Replaces resid [T, h].
  Status Forward(Matrix resid, const PatchAngles& angles, const PassContext& ctx) const;

 private:
  VisionLayer() = default;
  Status Attend(ConstMatrix x, const PatchAngles& angles, const PassContext& ctx, Matrix out) const;
  Status ShowSteps(ConstMatrix q, ConstMatrix k, ConstMatrix v, const PassContext& ctx,
                   Matrix z) const;
  Status FeedForward(ConstMatrix x, const PassContext& ctx, Matrix out) const;

  int64_t head_dim_ = 0;
  Norm input_norm_, post_attention_norm_, pre_feedforward_norm_, post_feedforward_norm_;
  Norm q_norm_, k_norm_, v_norm_;
  ClippedLinear q_proj_, k_proj_, v_proj_, o_proj_;
  ClippedLinear gate_proj_, up_proj_, down_proj_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_VISION_LAYER_H_
