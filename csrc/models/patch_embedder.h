#ifndef GEMLOUPE_MODELS_PATCH_EMBEDDER_H_
#define GEMLOUPE_MODELS_PATCH_EMBEDDER_H_

#include <vector>

#include "layers/norm.h"
#include "models/vision_model.h"

namespace gemloupe {

// The encoder-free path of Gemma 4 Unified: a patch of 48 pixels a side is one soft token.
class PatchEmbedder : public VisionModel {
 public:
  PatchEmbedder() = default;

 protected:
  Status LoadWeights(WeightStore& weights) override;
  Status Run(const Request& request, PassContext& ctx, Matrix soft_tokens) override;

 private:
  struct Affine {
    std::vector<float> weight;
    std::vector<float> bias;
  };
  static StatusOr<Affine> ReadAffine(const char* name, int64_t size, WeightStore& weights);

  Affine patch_norm_, dense_norm_, position_norm_;
  TensorView dense_;
  std::vector<float> dense_bias_;
  TensorView positions_;  // [positions · 2, h]: of each place its column's row, then its line's
  TensorView projection_;
  Norm projection_norm_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_PATCH_EMBEDDER_H_
