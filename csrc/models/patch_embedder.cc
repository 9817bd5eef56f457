#include "models/patch_embedder.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "layers/lora.h"
#include "models/weight_names.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

// PyTorch's default, which the reference does not override.
constexpr float kLayerNormEps = 1e-5f;

}  // namespace

StatusOr<PatchEmbedder::Affine> PatchEmbedder::ReadAffine(const char* name, int64_t size,
                                                          WeightStore& weights) {
  Affine affine;
  GL_ASSIGN_OR_RETURN(affine.weight, weights.TakeFloats(absl::StrCat(name, ".weight"), size));
  GL_ASSIGN_OR_RETURN(affine.bias, weights.TakeFloats(absl::StrCat(name, ".bias"), size));
  return affine;
}

Status PatchEmbedder::LoadWeights(WeightStore& weights) {
  const int64_t width = config_.mm_embed_dim;
  const int64_t values = config_.patch_values();
  GL_ASSIGN_OR_RETURN(patch_norm_, ReadAffine(names::vision::kPatchNorm, values, weights));
  GL_ASSIGN_OR_RETURN(dense_norm_, ReadAffine(names::vision::kDenseNorm, width, weights));
  GL_ASSIGN_OR_RETURN(position_norm_, ReadAffine(names::vision::kPositionNorm, width, weights));
  const std::string dense = names::vision::kPatchDense;
  GL_ASSIGN_OR_RETURN(dense_, weights.Take(dense + ".weight", {width, values}));
  GL_ASSIGN_OR_RETURN(dense_bias_, weights.TakeFloats(dense + ".bias", width));
  GL_ASSIGN_OR_RETURN(
      positions_, weights.Take(names::vision::kPatchPositions, {config_.mm_posemb_size, 2, width}));
  positions_.shape = {2 * config_.mm_posemb_size, width};
  GL_ASSIGN_OR_RETURN(projection_,
                      weights.Take(names::vision::kProjection, {config_.text_hidden_size, width}));
  projection_norm_ = Norm::WithoutWeight(width, static_cast<float>(config_.rms_norm_eps));
  return absl::OkStatus();
}

Status PatchEmbedder::Run(const Request& request, PassContext& ctx, Matrix soft_tokens) {
  const ConstMatrix patches = request.image.patches;
  const int64_t columns = request.image.columns;
  const Matrix normed = ctx.arena->NewMatrix(patches.rows, patches.cols);
  const Matrix x = ctx.arena->NewMatrix(patches.rows, config_.mm_embed_dim);
  const Matrix position = ctx.arena->NewMatrix(x.rows, x.cols);
  const auto norm = [](const Affine& affine, ConstMatrix src, Matrix dst) {
    LayerNorm(src, affine.weight.data(), affine.bias.data(), kLayerNormEps, dst);
  };
  norm(patch_norm_, patches, normed);
  GL_RETURN_IF_ERROR(AdaptedLinear(normed, {{AdaptedModule::kVisionPatchDense, &dense_, x}}, ctx));
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t i = 0; i < x.cols; ++i) x.row(row)[i] += dense_bias_[static_cast<size_t>(i)];
  }
  norm(dense_norm_, x, x);
  std::vector<int32_t> ids(static_cast<size_t>(x.rows));
  for (const int axis : {0, 1}) {
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto patch = static_cast<int64_t>(i);
      ids[i] = static_cast<int32_t>(2 * (axis == 0 ? patch % columns : patch / columns) + axis);
    }
    GatherRows(positions_, ids.data(), 0, 1.0f, position);
    Add(x, position, x);
  }
  norm(position_norm_, x, x);
  ctx.Visit(HookPoint::kVisionPatches, x);
  projection_norm_.Forward(x, x);
  GL_RETURN_IF_ERROR(
      AdaptedLinear(x, {{AdaptedModule::kVisionProjection, &projection_, soft_tokens}}, ctx));
  ctx.Visit(HookPoint::kVisionSoftTokens, soft_tokens);
  return absl::OkStatus();
}

}  // namespace gemloupe
