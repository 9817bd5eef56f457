#include "inspect/hook_points.h"

#include "absl/strings/str_cat.h"

namespace gemloupe {

const std::vector<HookPointInfo>& HookPoints() {
  static const std::vector<HookPointInfo> points = {
      {HookPoint::kEmbed, "embed", false, "[T, D]"},
      {HookPoint::kPerLayerInputs, "per_layer_inputs", false, "[T, L, P]"},
      {HookPoint::kResidPre, "resid_pre", true, "[T, D]"},
      {HookPoint::kAttnNorm, "attn.norm", true, "[T, D]"},
      {HookPoint::kAttnQProj, "attn.q_proj", true, "[T, N, H]"},
      {HookPoint::kAttnKProj, "attn.k_proj", true, "[T, K, H]"},
      {HookPoint::kAttnVProj, "attn.v_proj", true, "[T, K, H]"},
      {HookPoint::kAttnQ, "attn.q", true, "[T, N, H]"},
      {HookPoint::kAttnK, "attn.k", true, "[T, K, H]"},
      {HookPoint::kAttnV, "attn.v", true, "[T, K, H]"},
      {HookPoint::kAttnRotQ, "attn.rot_q", true, "[T, N, H]"},
      {HookPoint::kAttnRotK, "attn.rot_k", true, "[T, K, H]"},
      {HookPoint::kAttnZ, "attn.z", true, "[T, N, H]"},
      {HookPoint::kAttnOut, "attn.out", true, "[T, D]"},
      {HookPoint::kAttnPost, "attn.post", true, "[T, D]"},
      {HookPoint::kResidMid, "resid_mid", true, "[T, D]"},
      {HookPoint::kMlpNorm, "mlp.norm", true, "[T, D]"},
      {HookPoint::kMlpGate, "mlp.gate", true, "[T, F]"},
      {HookPoint::kMlpUp, "mlp.up", true, "[T, F]"},
      {HookPoint::kMlpHidden, "mlp.hidden", true, "[T, F]"},
      {HookPoint::kMlpOut, "mlp.out", true, "[T, D]"},
      {HookPoint::kMlpPost, "mlp.post", true, "[T, D]"},
      {HookPoint::kRouterNorm, "router.norm", true, "[T, D]"},
      {HookPoint::kRouterLogits, "router.logits", true, "[T, E]"},
      {HookPoint::kRouterProbs, "router.probs", true, "[T, E]"},
      {HookPoint::kRouterExperts, "router.experts", true, "[T, k]"},
      {HookPoint::kRouterWeightsNorm, "router.weights_norm", true, "[T, k]"},
      {HookPoint::kRouterWeights, "router.weights", true, "[T, k]"},
      {HookPoint::kExpertsNorm, "experts.norm", true, "[T, D]"},
      {HookPoint::kExpertsOut, "experts.out", true, "[T, D]"},
      {HookPoint::kExpertsPost, "experts.post", true, "[T, D]"},
      {HookPoint::kFfnOut, "ffn.out", true, "[T, D]"},
      {HookPoint::kFfnPost, "ffn.post", true, "[T, D]"},
      {HookPoint::kResidFfn, "resid_ffn", true, "[T, D]"},
      {HookPoint::kPerLayerIn, "per_layer.in", true, "[T, P]"},
      {HookPoint::kPerLayerGate, "per_layer.gate", true, "[T, P]"},
      {HookPoint::kPerLayerHidden, "per_layer.hidden", true, "[T, P]"},
      {HookPoint::kPerLayerOut, "per_layer.out", true, "[T, D]"},
      {HookPoint::kPerLayerPost, "per_layer.post", true, "[T, D]"},
      {HookPoint::kResidUnscaled, "resid_unscaled", true, "[T, D]"},
      {HookPoint::kResidPost, "resid_post", true, "[T, D]"},
      {HookPoint::kFinalNorm, "final_norm", false, "[T, D]"},
      {HookPoint::kLogitsRaw, "logits_raw", false, "[T, V]"},
      {HookPoint::kLogits, "logits", false, "[T, V]"},
  };
  return points;
}

std::string HookName(HookPoint point, int layer) {
  const HookPointInfo& info = HookPoints()[static_cast<size_t>(point)];
  return info.per_layer ? absl::StrCat("layers.", layer, ".", info.name) : std::string(info.name);
}

}  // namespace gemloupe
