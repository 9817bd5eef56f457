#ifndef GEMLOUPE_LAYERS_ROUTER_H_
#define GEMLOUPE_LAYERS_ROUTER_H_

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "layers/norm.h"

namespace gemloupe {

struct RouterWeights {
  TensorView proj;                      // [E, D]
  std::vector<float> scale;             // [D]
  std::vector<float> per_expert_scale;  // [E]
};

// The chosen experts of every row, by descending probability (ties: the lower index first).
struct Routing {
  int64_t top_k = 0;
  std::vector<int32_t> experts;  // [T, k]
  std::vector<float> weights;    // [T, k], renormalised, then times per_expert_scale
};

// Chooses k of E experts for each token from the residual stream before the feed-forward norms.
class Router {
 public:
  Router(RouterWeights weights, int64_t top_k, float eps);

  // InvalidArgument if an edit chooses an expert that is none, or one twice for a token.
  Status Forward(ConstMatrix resid, const PassContext& ctx, Routing& routing) const;

 private:
  Status TakeExperts(ConstMatrix experts, Routing& routing) const;

  RouterWeights weights_;
  int64_t top_k_;
  Norm norm_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_ROUTER_H_
