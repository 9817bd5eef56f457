#include "models/vision_config.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace gemloupe {

Status CheckVisionConfig(const VisionConfig& config) {
  const auto fail = [](const char* field, auto got, const char* expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("vision_config: ", field, " is ", got, ", expected ", expected));
  };
  const auto positive = [&](const char* field, int64_t value) {
    return value > 0 ? absl::OkStatus() : fail(field, value, "1 or more");
  };
  GL_RETURN_IF_ERROR(positive("patch_size", config.patch_size));
  GL_RETURN_IF_ERROR(positive("pooling_kernel_size", config.pooling_kernel_size));
  GL_RETURN_IF_ERROR(positive("text_hidden_size", config.text_hidden_size));
  if (!(config.rms_norm_eps > 0.0)) return fail("rms_norm_eps", config.rms_norm_eps, "above 0");
  if (!config.has_encoder()) {
    GL_RETURN_IF_ERROR(positive("mm_embed_dim", config.mm_embed_dim));
    return positive("mm_posemb_size", config.mm_posemb_size);
  }
  for (const auto& [field, value] :
       {std::pair{"hidden_size", config.hidden_size},
        std::pair{"intermediate_size", config.intermediate_size},
        std::pair{"num_attention_heads", config.num_attention_heads},
        std::pair{"num_key_value_heads", config.num_key_value_heads},
        std::pair{"position_embedding_size", config.position_embedding_size}}) {
    GL_RETURN_IF_ERROR(positive(field, value));
  }
  if (config.num_attention_heads % config.num_key_value_heads != 0) {
    return fail("num_key_value_heads", config.num_key_value_heads,
                "a divisor of num_attention_heads");
  }
  if (config.head_dim <= 0 || config.head_dim % 4 != 0) {
    return fail("head_dim", config.head_dim, "a multiple of 4 (two halves of pairs rotate)");
  }
  if (!(config.rope_theta > 0.0)) return fail("rope_theta", config.rope_theta, "above 0");
  return absl::OkStatus();
}

}  // namespace gemloupe
