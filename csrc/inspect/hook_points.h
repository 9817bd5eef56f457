#ifndef GEMLOUPE_INSPECT_HOOK_POINTS_H_
#define GEMLOUPE_INSPECT_HOOK_POINTS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace gemloupe {

// Where a pass can be looked into, in model order. The table in hook_points.cc gives each its name.
enum class HookPoint : uint8_t {
  kEmbed,
  kPerLayerInputs,
  // Of every layer:
  kResidPre,
  kAttnNorm,
  kAttnQProj,
  kAttnKProj,
  kAttnVProj,
  kAttnQ,
  kAttnK,
  kAttnV,
  kAttnRotQ,
  kAttnRotK,
  kAttnZ,
  kAttnOut,
  kAttnPost,
  kResidMid,
  kMlpNorm,
  kMlpGate,
  kMlpUp,
  kMlpHidden,
  kMlpOut,
  kMlpPost,
  kRouterNorm,
  kRouterLogits,
  kRouterProbs,
  kRouterExperts,
  kRouterWeightsNorm,
  kRouterWeights,
  kExpertsNorm,
  kExpertsOut,
  kExpertsPost,
  kFfnOut,
  kFfnPost,
  kResidFfn,
  kPerLayerIn,
  kPerLayerGate,
  kPerLayerHidden,
  kPerLayerOut,
  kPerLayerPost,
  kResidUnscaled,
  kResidPost,
  // After the last layer:
  kFinalNorm,
  kLogitsRaw,
  kLogits,
};

struct HookPointInfo {
  HookPoint point;
  const char* name;  // without the "layers.{i}." of points that every layer has
  bool per_layer;
  const char* shape;  // in the dimensions of design: T rows, D hidden, N heads, ...
};

// One row a point, in the order of the enum.
const std::vector<HookPointInfo>& HookPoints();

// "layers.3.resid_post" or "embed".
std::string HookName(HookPoint point, int layer);

}  // namespace gemloupe

#endif  // GEMLOUPE_INSPECT_HOOK_POINTS_H_
