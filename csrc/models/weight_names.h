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

// Of the towers, behind "model.":
inline constexpr char kEmbedAudio[] = "embed_audio.embedding_projection.weight";  // [D, O]

// Of the audio tower, behind "audio_tower.":
inline constexpr char kSubsampleConv0[] = "subsample_conv_projection.layer0.conv.weight";
inline constexpr char kSubsampleNorm0[] = "subsample_conv_projection.layer0.norm.weight";
inline constexpr char kSubsampleConv1[] = "subsample_conv_projection.layer1.conv.weight";
inline constexpr char kSubsampleNorm1[] = "subsample_conv_projection.layer1.norm.weight";
inline constexpr char kSubsampleProjection[] = "subsample_conv_projection.input_proj_linear.weight";
inline constexpr char kOutputProj[] = "output_proj.weight";
inline constexpr char kOutputProjBias[] = "output_proj.bias";
// Of its layer i. Clipped linears have kLinearWeight and their bounds behind the module's name.
inline constexpr char kFeedForward1[] = "feed_forward1.";
inline constexpr char kFeedForward2[] = "feed_forward2.";
inline constexpr char kFfwLayer1[] = "ffw_layer_1.";
inline constexpr char kFfwLayer2[] = "ffw_layer_2.";
inline constexpr char kPreLayerNorm[] = "pre_layer_norm.weight";
inline constexpr char kPostLayerNorm[] = "post_layer_norm.weight";
inline constexpr char kAudioQProj[] = "self_attn.q_proj.";
inline constexpr char kAudioKProj[] = "self_attn.k_proj.";
inline constexpr char kAudioVProj[] = "self_attn.v_proj.";
inline constexpr char kAudioPost[] = "self_attn.post.";
inline constexpr char kRelativeKProj[] = "self_attn.relative_k_proj.weight";
inline constexpr char kPerDimScale[] = "self_attn.per_dim_scale";
inline constexpr char kNormPreAttn[] = "norm_pre_attn.weight";
inline constexpr char kNormPostAttn[] = "norm_post_attn.weight";
inline constexpr char kConvStart[] = "lconv1d.linear_start.";
inline constexpr char kConvEnd[] = "lconv1d.linear_end.";
inline constexpr char kConvDepthwise[] = "lconv1d.depthwise_conv1d.weight";
inline constexpr char kConvPreNorm[] = "lconv1d.pre_layer_norm.weight";
inline constexpr char kConvNorm[] = "lconv1d.conv_norm.weight";
inline constexpr char kNormOut[] = "norm_out.weight";
inline constexpr char kLinearWeight[] = "linear.weight";
inline constexpr char kInputMin[] = "input_min";
inline constexpr char kInputMax[] = "input_max";
inline constexpr char kOutputMin[] = "output_min";
inline constexpr char kOutputMax[] = "output_max";

inline std::string OfLayer(int index, const char* name) {
  return absl::StrCat("layers.", index, ".", name);
}

}  // namespace gemloupe::names

#endif  // GEMLOUPE_MODELS_WEIGHT_NAMES_H_
