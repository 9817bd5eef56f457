#ifndef GEMLOUPE_LAYERS_EXPERTS_H_
#define GEMLOUPE_LAYERS_EXPERTS_H_

#include <cstdint>
#include <utility>

#include "base/status.h"
#include "layers/pass_context.h"
#include "layers/router.h"

namespace gemloupe {

struct ExpertsWeights {
  TensorView gate_up_proj;  // [E, 2 F, D]: F rows of gate, then F rows of up
  TensorView down_proj;     // [E, D, F]
};

// The experts of a mixture-of-experts block.
class Experts {
 public:
  explicit Experts(ExpertsWeights weights) : weights_(std::move(weights)) {}

  // out [T, D] = Σ over the chosen experts, in ascending index, of weight · down(gelu_tanh(gate x) ·
  // up x), for x [T, D].
  Status Forward(ConstMatrix x, const Routing& routing, const PassContext& ctx, Matrix out) const;

 private:
  ExpertsWeights weights_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_EXPERTS_H_
