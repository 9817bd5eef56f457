#ifndef GEMLOUPE_MODELS_VISION_TOWER_H_
#define GEMLOUPE_MODELS_VISION_TOWER_H_

#include <vector>

#include "layers/norm.h"
#include "models/vision_layer.h"
#include "models/vision_model.h"

namespace gemloupe {

// The vision encoder: patches with 2-D positions, layers, 3 × 3 pooling, projection.
class VisionTower : public VisionModel {
 public:
  VisionTower() = default;

 protected:
  Status LoadWeights(WeightStore& weights) override;
  Status Run(const Request& request, PassContext& ctx, Matrix soft_tokens) override;

 private:
  Status Embed(const PatchGrid& image, const PassContext& ctx, Matrix resid) const;
  void Pool(ConstMatrix resid, int64_t columns, Matrix pooled) const;

  TensorView input_proj_;
  TensorView positions_;
  TensorView projection_;
  std::vector<float> std_bias_;
  std::vector<float> std_scale_;
  std::vector<float> inv_freq_;  // of a half of a head
  std::vector<VisionLayer> layers_;
  Norm projection_norm_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_VISION_TOWER_H_
