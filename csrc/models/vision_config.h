#ifndef GEMLOUPE_MODELS_VISION_CONFIG_H_
#define GEMLOUPE_MODELS_VISION_CONFIG_H_

#include <cstdint>

#include "base/status.h"

namespace gemloupe {

// How a model reads images: vision_config of config.json, with its field names. An encoder
// (num_hidden_layers > 0), or the encoder-free embedder of Gemma 4 Unified, which uses the last three.
struct VisionConfig {
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t patch_size = 0;           // pixels of a patch's side
  int64_t pooling_kernel_size = 0;  // patches of a soft token's side
  int64_t position_embedding_size = 0;
  double rms_norm_eps = 0.0;
  double rope_theta = 0.0;
  bool use_clipped_linears = false;
  bool standardize = false;
  int64_t mm_embed_dim = 0;
  int64_t mm_posemb_size = 0;
  int64_t text_hidden_size = 0;  // D of the text model

  bool has_encoder() const { return num_hidden_layers > 0; }
  // Values of one patch that the model reads: 3 colours of its pixels.
  int64_t patch_values() const {
    const int64_t side = has_encoder() ? patch_size : patch_size * pooling_kernel_size;
    return 3 * side * side;
  }
};

// InvalidArgument, naming the field, for values that no model can have.
Status CheckVisionConfig(const VisionConfig& config);

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_VISION_CONFIG_H_
