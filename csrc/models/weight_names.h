#ifndef GEMLOUPE_MODELS_WEIGHT_NAMES_H_
#define GEMLOUPE_MODELS_WEIGHT_NAMES_H_

#include <string>

#include "absl/strings/str_cat.h"

// The names of tensors in a checkpoint: those of the text decoder without the prefix of the
// checkpoint's class ("model.language_model." or "model."). The engine spells them nowhere else.
namespace gemloupe::names {

inline constexpr char kEmbedTokens[] = "embed_tokens.weight";                    // [V, D]
inline constexpr char kEmbedTokensPerLayer[] = "embed_tokens_per_layer.weight";  // [V, L·P]
inline constexpr char kPerLayerModelProjection[] = "per_layer_model_projection.weight";  // [L·P, D]
inline constexpr char kPerLayerProjectionNorm[] = "per_layer_projection_norm.weight";    // [P]
inline constexpr char kFinalNorm[] = "norm.weight";                                      // [D]

// Of drafters, beside kEmbedTokens, kFinalNorm and the names of layers:
inline constexpr char kDrafterPreProjection[] = "pre_projection.weight";          // [h, 2 B]
inline constexpr char kDrafterPostProjection[] = "post_projection.weight";        // [B, h]
inline constexpr char kDrafterCentroids[] = "masked_embedding.centroids.weight";  // [clusters, h]

// Of layer i:
inline constexpr char kInputNorm[] = "input_layernorm.weight";
inline constexpr char kPostAttentionNorm[] = "post_attention_layernorm.weight";
inline constexpr char kPreFeedforwardNorm[] = "pre_feedforward_layernorm.weight";
inline constexpr char kPostFeedforwardNorm[] = "post_feedforward_layernorm.weight";
inline constexpr char kLayerScalar[] = "layer_scalar";
inline constexpr char kQProj[] = "self_attn.q_proj.weight";
inline constexpr char kKProj[] = "self_attn.k_proj.weight";
inline constexpr char kVProj[] = "self_attn.v_proj.weight";
inline constexpr char kOProj[] = "self_attn.o_proj.weight";
inline constexpr char kQNorm[] = "self_attn.q_norm.weight";
inline constexpr char kKNorm[] = "self_attn.k_norm.weight";
inline constexpr char kGateProj[] = "mlp.gate_proj.weight";
inline constexpr char kUpProj[] = "mlp.up_proj.weight";
inline constexpr char kDownProj[] = "mlp.down_proj.weight";
inline constexpr char kPerLayerInputGate[] = "per_layer_input_gate.weight";
inline constexpr char kPerLayerProjection[] = "per_layer_projection.weight";
inline constexpr char kPostPerLayerInputNorm[] = "post_per_layer_input_norm.weight";
inline constexpr char kRouterProj[] = "router.proj.weight";
inline constexpr char kRouterScale[] = "router.scale";
inline constexpr char kRouterPerExpertScale[] = "router.per_expert_scale";
inline constexpr char kExpertsGateUpProj[] = "experts.gate_up_proj";
inline constexpr char kExpertsDownProj[] = "experts.down_proj";
inline constexpr char kPostMlpNorm[] = "post_feedforward_layernorm_1.weight";
inline constexpr char kPreExpertsNorm[] = "pre_feedforward_layernorm_2.weight";
inline constexpr char kPostExpertsNorm[] = "post_feedforward_layernorm_2.weight";

inline std::string OfLayer(int index, const char* name) {
  return absl::StrCat("layers.", index, ".", name);
}

// Of the vision encoder, after the optional "model.": matrices have bounds beside them where they clip.
namespace vision {

inline constexpr char kInputProj[] = "vision_tower.patch_embedder.input_proj.weight";  // [h, 3·p²]
inline constexpr char kPositions[] =
    "vision_tower.patch_embedder.position_embedding_table";    // [2, positions, h]: x, then y
inline constexpr char kStdBias[] = "vision_tower.std_bias";    // [h]
inline constexpr char kStdScale[] = "vision_tower.std_scale";  // [h]
inline constexpr char kProjection[] = "embed_vision.embedding_projection.weight";  // [D, h]

// Of the encoder-free embedder:
inline constexpr char kPatchNorm[] = "vision_embedder.patch_ln1";  // .weight, .bias [3·p²]
inline constexpr char kPatchDense[] =
    "vision_embedder.patch_dense";                                 // .weight [h, 3·p²], .bias [h]
inline constexpr char kDenseNorm[] = "vision_embedder.patch_ln2";  // .weight, .bias [h]
inline constexpr char kPatchPositions[] = "vision_embedder.pos_embedding";  // [positions, 2, h]
inline constexpr char kPositionNorm[] = "vision_embedder.pos_norm";         // .weight, .bias [h]

// A layer's tensor by the decoder's name for it; the encoder's matrices stand in a `linear`.
inline std::string OfLayer(int index, const char* name) {
  return absl::StrCat("vision_tower.encoder.layers.", index, ".", name);
}

}  // namespace vision

// Of the audio tower, after the optional "model.".
namespace audio {

inline constexpr char kPrefix[] = "audio_tower.";                                 // before all but:
inline constexpr char kProjection[] = "embed_audio.embedding_projection.weight";  // [D, O]

inline constexpr char kSubsampleConv0[] = "subsample_conv_projection.layer0.conv.weight";
inline constexpr char kSubsampleNorm0[] = "subsample_conv_projection.layer0.norm.weight";
inline constexpr char kSubsampleConv1[] = "subsample_conv_projection.layer1.conv.weight";
inline constexpr char kSubsampleNorm1[] = "subsample_conv_projection.layer1.norm.weight";
inline constexpr char kInputProj[] = "subsample_conv_projection.input_proj_linear.weight";
inline constexpr char kOutputProj[] = "output_proj.weight";
inline constexpr char kOutputProjBias[] = "output_proj.bias";

// Of layer i; clipped linears by names that OfClipped takes.
inline constexpr char kFeedForward1[] = "feed_forward1.";  // before the next four
inline constexpr char kFeedForward2[] = "feed_forward2.";
inline constexpr char kPreNorm[] = "pre_layer_norm.weight";
inline constexpr char kUp[] = "ffw_layer_1.weight";
inline constexpr char kDown[] = "ffw_layer_2.weight";
inline constexpr char kPostNorm[] = "post_layer_norm.weight";
inline constexpr char kAttnNorm[] = "norm_pre_attn.weight";
inline constexpr char kAttnPost[] = "self_attn.post.weight";
inline constexpr char kAttnPostNorm[] = "norm_post_attn.weight";
inline constexpr char kRelativeKProj[] = "self_attn.relative_k_proj.weight";
inline constexpr char kPerDimScale[] = "self_attn.per_dim_scale";
inline constexpr char kConvPreNorm[] = "lconv1d.pre_layer_norm.weight";
inline constexpr char kConvStart[] = "lconv1d.linear_start.weight";
inline constexpr char kConvDepthwise[] = "lconv1d.depthwise_conv1d.weight";
inline constexpr char kConvNorm[] = "lconv1d.conv_norm.weight";
inline constexpr char kConvEnd[] = "lconv1d.linear_end.weight";
inline constexpr char kNormOut[] = "norm_out.weight";

}  // namespace audio

// The matrix and the bounds of a clipped linear, by the decoder's name for the matrix ("….weight").
struct Clipped {
  std::string weight, input_min, input_max, output_min, output_max;
};
inline Clipped OfClipped(const std::string& matrix) {
  const std::string stem = matrix.substr(0, matrix.rfind(".weight"));
  return {stem + ".linear.weight", stem + ".input_min", stem + ".input_max", stem + ".output_min",
          stem + ".output_max"};
}

}  // namespace gemloupe::names

#endif  // GEMLOUPE_MODELS_WEIGHT_NAMES_H_
