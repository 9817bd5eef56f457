#include "layers/router.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "ops/linear.h"
#include "ops/rows.h"

namespace gemloupe {

Router::Router(RouterWeights weights, int64_t top_k, float eps)
    : weights_(std::move(weights)), top_k_(top_k), eps_(eps) {}

Status Router::Forward(ConstMatrix resid, const PassContext& ctx, Routing& routing) const {
  const Arena::Scope scope(*ctx.arena);
  const int64_t num_experts = weights_.proj.shape[0];
  const Matrix x = ctx.arena->NewMatrix(resid.rows, resid.cols);
  const Matrix probs = ctx.arena->NewMatrix(resid.rows, num_experts);
  RmsNorm(resid, weights_.scale.data(), resid.cols, eps_, x);
  Scale(x, 1.0f / std::sqrt(static_cast<float>(resid.cols)), x);
  ctx.Visit(HookPoint::kRouterNorm, x);
  GL_RETURN_IF_ERROR(Linear(x, {{&weights_.proj, probs}}, ctx.path, *ctx.arena));
  ctx.Visit(HookPoint::kRouterLogits, probs);
  Softmax(probs, probs);
  ctx.Visit(HookPoint::kRouterProbs, probs);

  const int64_t k = top_k_;
  routing.top_k = k;
  routing.experts.resize(static_cast<size_t>(resid.rows * k));
  routing.weights.resize(static_cast<size_t>(resid.rows * k));
  const Matrix weights_norm = ctx.arena->NewMatrix(resid.rows, k);
  std::vector<int32_t> order(static_cast<size_t>(num_experts));
  for (int64_t row = 0; row < resid.rows; ++row) {
    const float* p = probs.row(row);
    int32_t* experts = routing.experts.data() + row * k;
    float* weights = routing.weights.data() + row * k;
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + k, order.end(),
                      [p](int32_t a, int32_t b) { return p[a] != p[b] ? p[a] > p[b] : a < b; });
    float sum = 0.0f;
    for (int64_t i = 0; i < k; ++i) sum += p[order[static_cast<size_t>(i)]];
    for (int64_t i = 0; i < k; ++i) {
      const int32_t expert = order[static_cast<size_t>(i)];
      experts[i] = expert;
      weights_norm.row(row)[i] = p[expert] / sum;
      weights[i] =
          weights_norm.row(row)[i] * weights_.per_expert_scale[static_cast<size_t>(expert)];
    }
  }
  if (ctx.captures != nullptr) {
    const Matrix experts = ctx.arena->NewMatrix(resid.rows, k);
    std::copy(routing.experts.begin(), routing.experts.end(), experts.data);
    ctx.Visit(HookPoint::kRouterExperts, experts);
  }
  ctx.Visit(HookPoint::kRouterWeightsNorm, weights_norm);
  ctx.Visit(HookPoint::kRouterWeights, ConstMatrix(routing.weights.data(), resid.rows, k));
  return absl::OkStatus();
}

}  // namespace gemloupe
