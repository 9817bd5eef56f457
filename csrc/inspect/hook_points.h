#ifndef GEMLOUPE_INSPECT_HOOK_POINTS_H_
#define GEMLOUPE_INSPECT_HOOK_POINTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace gemloupe {

// Where a pass can be looked into and changed, in model order. The table in hook_points.cc says what
// each is. A norm's divisor (…Scale) comes before its result.
enum class HookPoint : uint8_t {
  kEmbed,
  kPerLayerContextScale,
  kPerLayerContext,
  kPerLayerToken,
  kPerLayerInputs,
  // Of every layer:
  kResidPre,
  kAttnNormScale,
  kAttnNorm,
  kAttnQProj,
  kAttnKProj,
  kAttnVProj,
  kAttnKScale,
  kAttnK,
  kAttnVScale,
  kAttnV,
  kAttnRotK,
  kAttnQScale,
  kAttnQ,
  kAttnRotQ,
  kAttnKeys,
  kAttnValues,
  kAttnScores,
  kAttnPattern,
  kAttnZ,
  kAttnResult,
  kAttnOut,
  kAttnPostScale,
  kAttnPost,
  kResidMid,
  kMlpNormScale,
  kMlpNorm,
  kMlpGate,
  kMlpUp,
  kMlpHidden,
  kMlpOut,
  kMlpPostScale,
  kMlpPost,
  kRouterNormScale,
  kRouterNorm,
  kRouterLogits,
  kRouterProbs,
  kRouterExperts,
  kRouterWeightsNorm,
  kRouterWeights,
  kExpertsNormScale,
  kExpertsNorm,
  kExpertsHidden,
  kExpertsEach,
  kExpertsOut,
  kExpertsPostScale,
  kExpertsPost,
  kFfnOut,
  kFfnPostScale,
  kFfnPost,
  kResidFfn,
  kPerLayerIn,
  kPerLayerGate,
  kPerLayerHidden,
  kPerLayerOut,
  kPerLayerPostScale,
  kPerLayerPost,
  kResidUnscaled,
  kResidPost,
  // After the last layer:
  kFinalNormScale,
  kFinalNorm,
  kLogitsRaw,
  kLogits,
  // Of the vision tower, whose layers have points of the decoder's layers too:
  kVisionPatches,
  kVisionPooled,
  kVisionStandardized,
  kVisionSoftTokens,
  // Of the audio tower, which runs by itself before the text model:
  kAudioMel,
  kAudioSubsampled,
  // Of every layer of it:
  kAudioResidPre,
  kAudioFfn1Norm,
  kAudioFfn1Hidden,
  kAudioFfn1Out,
  kAudioFfn1Post,
  kAudioResidFfn1,
  kAudioAttnNorm,
  kAudioAttnQProj,
  kAudioAttnKProj,
  kAudioAttnQ,
  kAudioAttnK,
  kAudioAttnV,
  kAudioAttnScores,
  kAudioAttnPattern,
  kAudioAttnZ,
  kAudioAttnOut,
  kAudioAttnPost,
  kAudioResidMid,
  kAudioConvNorm,
  kAudioConvGated,
  kAudioConvHidden,
  kAudioConvOut,
  kAudioResidConv,
  kAudioFfn2Norm,
  kAudioFfn2Hidden,
  kAudioFfn2Out,
  kAudioFfn2Post,
  kAudioResidFfn2,
  kAudioResidPost,
  // After its last layer:
  kAudioEncoded,
  kAudioSoftTokens,
};

struct HookPointInfo {
  HookPoint point;
  const char* name;  // without the "layers.{i}." of points that every layer has
  bool per_layer;
  const char*
      shape;  // in the dimensions of the design: T rows, S positions, D hidden, N heads, ...
  bool editable;
  // The same value in transformers: the path of a module from the text model (its output), or of its
  // ".input" or ".output.n"; "" where no module has it. {i} is the layer.
  const char* transformers;
  // The same value's name in TransformerLens; "" where it has none.
  const char* transformer_lens;
  // Whether the layers of the vision tower have it too: as "vision.layers.{i}." and its name, and in
  // transformers as "vision_tower.encoder." and the path. Points of the tower alone have full names.
  bool in_vision = false;
  // "audio" of the audio tower, whose name comes before all others; "" of the text model. Paths of
  // transformers begin at its multimodal model.
  const char* tower = "";
};

// One row a point, in the order of the enum.
const std::vector<HookPointInfo>& HookPoints();

// Whether a point is of the vision tower alone.
inline bool IsVisionOnly(HookPoint point) {
  return point >= HookPoint::kVisionPatches && point <= HookPoint::kVisionSoftTokens;
}
// Whether the rows are positions of the cache, not rows of the pass.
inline bool IsCached(HookPoint point) {
  return point == HookPoint::kAttnKeys || point == HookPoint::kAttnValues;
}
// Whether there is a row for each head and row of the pass: [N, T, S].
inline bool IsByHead(HookPoint point) {
  return point == HookPoint::kAttnScores || point == HookPoint::kAttnPattern ||
         point == HookPoint::kAudioAttnScores || point == HookPoint::kAudioAttnPattern;
}

// "layers.3.resid_post", "embed" or "audio.layers.0.ffn1.out".
std::string HookName(HookPoint point, int layer);

}  // namespace gemloupe

#endif  // GEMLOUPE_INSPECT_HOOK_POINTS_H_
