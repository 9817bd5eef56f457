#ifndef GEMLOUPE_LAYERS_PER_LAYER_INPUT_H_
#define GEMLOUPE_LAYERS_PER_LAYER_INPUT_H_

#include <utility>

#include "base/status.h"
#include "layers/norm.h"
#include "layers/pass_context.h"

namespace gemloupe {

struct PerLayerInputWeights {
  TensorView gate;               // [P, D]
  TensorView projection;         // [D, P]
  std::vector<float> post_norm;  // [D]
};

// The branch that feeds each token's per-layer embedding into the residual stream.
class PerLayerInput {
 public:
  PerLayerInput(PerLayerInputWeights weights, float eps) : weights_(std::move(weights)) {
    post_norm_ = Norm(weights_.post_norm, eps);
  }

  // out [T, D] = post_norm(projection(gelu_tanh(gate(resid)) · input)) for input [T, P].
  Status Forward(ConstMatrix resid, Matrix input, const PassContext& ctx, Matrix out) const;

 private:
  PerLayerInputWeights weights_;
  Norm post_norm_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_PER_LAYER_INPUT_H_
