#include "layers/router.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "ops/rows.h"

namespace gemloupe {

Router::Router(RouterWeights weights, int64_t top_k, float eps)
    : weights_(std::move(weights)), top_k_(top_k), norm_(weights_.scale, eps) {}

Status Router::Forward(ConstMatrix resid, const PassContext& ctx, Routing& routing) const {
  const Arena::Scope scope(*ctx.arena);
  const int64_t num_experts = weights_.proj.shape[0];
  const Matrix x = ctx.arena->NewMatrix(resid.rows, resid.cols);
  const Matrix probs = ctx.arena->NewMatrix(resid.rows, num_experts);
  norm_.Forward(resid, HookPoint::kRouterNormScale, ctx, x);
  Scale(x, 1.0f / std::sqrt(static_cast<float>(resid.cols)), x);
  ctx.Visit(HookPoint::kRouterNorm, x);
  GL_RETURN_IF_ERROR(AdaptedLinear(x, {{AdaptedModule::kRouterProj, &weights_.proj, probs}}, ctx));
  ctx.Visit(HookPoint::kRouterLogits, probs);
  Softmax(probs, probs);
  ctx.Visit(HookPoint::kRouterProbs, probs);

  const int64_t k = top_k_;
  routing.top_k = k;
  routing.experts.resize(static_cast<size_t>(resid.rows * k));
  routing.weights.resize(static_cast<size_t>(resid.rows * k));
  std::vector<int32_t> order(static_cast<size_t>(num_experts));
  for (int64_t row = 0; row < resid.rows; ++row) {
    const float* p = probs.row(row);
    std::iota(order.begin(), order.end(), 0);
    // NaN, which an edit can bring, sorts last: the order stays a strict one.
    const auto before = [p](int32_t a, int32_t b) {
      const bool known_a = !std::isnan(p[a]), known_b = !std::isnan(p[b]);
      if (!known_a || !known_b) return known_a != known_b ? known_a : a < b;
      return p[a] != p[b] ? p[a] > p[b] : a < b;
    };
    std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
    std::copy_n(order.begin(), k, routing.experts.data() + row * k);
  }
  if (ctx.Wants(HookPoint::kRouterExperts)) {
    const Matrix experts = ctx.arena->NewMatrix(resid.rows, k);
    std::copy(routing.experts.begin(), routing.experts.end(), experts.data);
    ctx.Visit(HookPoint::kRouterExperts, experts);
    GL_RETURN_IF_ERROR(TakeExperts(experts, routing));
  }

  const Matrix weights_norm = ctx.arena->NewMatrix(resid.rows, k);
  for (int64_t row = 0; row < resid.rows; ++row) {
    const int32_t* experts = routing.experts.data() + row * k;
    float sum = 0.0f;
    for (int64_t i = 0; i < k; ++i) sum += probs.row(row)[experts[i]];
    for (int64_t i = 0; i < k; ++i) weights_norm.row(row)[i] = probs.row(row)[experts[i]] / sum;
  }
  ctx.Visit(HookPoint::kRouterWeightsNorm, weights_norm, routing.experts);
  for (int64_t i = 0; i < resid.rows * k; ++i) {
    const auto at = static_cast<size_t>(i);
    routing.weights[at] = weights_norm.row(i / k)[i % k] *
                          weights_.per_expert_scale[static_cast<size_t>(routing.experts[at])];
  }
  ctx.Visit(HookPoint::kRouterWeights, Matrix(routing.weights.data(), resid.rows, k),
            routing.experts);
  return absl::OkStatus();
}

// What an edit may have written: whole numbers of experts, each once a token.
Status Router::TakeExperts(ConstMatrix experts, Routing& routing) const {
  const int64_t num_experts = weights_.proj.shape[0];
  for (int64_t row = 0; row < experts.rows; ++row) {
    int32_t* chosen = routing.experts.data() + row * experts.cols;
    for (int64_t i = 0; i < experts.cols; ++i) {
      const float expert = experts.row(row)[i];
      const bool known = expert >= 0.0f && expert < static_cast<float>(num_experts) &&
                         expert == std::floor(expert);
      const bool twice =
          known && std::find(chosen, chosen + i, static_cast<int32_t>(expert)) != chosen + i;
      if (!known || twice) {
        return absl::InvalidArgumentError(absl::StrCat(
            "edit of router.experts: got expert ", expert, twice ? " twice" : "", " for row ", row,
            ", expected ", experts.cols, " different experts from 0 to ", num_experts - 1));
      }
      chosen[i] = static_cast<int32_t>(expert);
    }
  }
  return absl::OkStatus();
}

}  // namespace gemloupe
