#ifndef GEMLOUPE_LAYERS_MLP_H_
#define GEMLOUPE_LAYERS_MLP_H_

#include <utility>

#include "base/status.h"
#include "layers/pass_context.h"

namespace gemloupe {

struct MlpWeights {
  TensorView gate_proj;  // [F, D]
  TensorView up_proj;    // [F, D]
  TensorView down_proj;  // [D, F]
};

// The gated feed-forward: down(gelu_tanh(gate(x)) · up(x)).
class Mlp {
 public:
  explicit Mlp(MlpWeights weights) : weights_(std::move(weights)) {}

  // out [T, D] for x [T, D].
  Status Forward(ConstMatrix x, const PassContext& ctx, Matrix out) const;

 private:
  MlpWeights weights_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_MLP_H_
