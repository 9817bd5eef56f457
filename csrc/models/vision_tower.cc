#include "models/vision_tower.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "layers/lora.h"
#include "models/weight_names.h"
#include "ops/rope.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

// The soft tokens' rows, of which an image has fewer than patches.
Batch CellsOf(const Batch& patches, int64_t count, int64_t patches_per_cell) {
  Batch cells;
  cells.positions.resize(static_cast<size_t>(count));
  std::iota(cells.positions.begin(), cells.positions.end(),
            patches.positions[0] / patches_per_cell);
  Segment segment;
  segment.rows = count;
  segment.position = cells.positions[0];
  segment.end = segment.position + count;
  cells.segments.push_back(segment);
  return cells;
}

}  // namespace

Status VisionTower::LoadWeights(WeightStore& weights) {
  const int64_t hidden = config_.hidden_size;
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  GL_ASSIGN_OR_RETURN(input_proj_,
                      weights.Take(names::vision::kInputProj, {hidden, config_.patch_values()}));
  GL_ASSIGN_OR_RETURN(positions_, weights.Take(names::vision::kPositions,
                                               {2, config_.position_embedding_size, hidden}));
  GL_ASSIGN_OR_RETURN(projection_,
                      weights.Take(names::vision::kProjection, {config_.text_hidden_size, hidden}));
  if (config_.standardize) {
    GL_ASSIGN_OR_RETURN(std_bias_, weights.TakeFloats(names::vision::kStdBias, hidden));
    GL_ASSIGN_OR_RETURN(std_scale_, weights.TakeFloats(names::vision::kStdScale, hidden));
  }
  for (int i = 0; i < static_cast<int>(config_.num_hidden_layers); ++i) {
    GL_ASSIGN_OR_RETURN(VisionLayer layer, VisionLayer::Load(config_, i, weights));
    layers_.push_back(std::move(layer));
  }
  const int64_t half = config_.head_dim / 2;
  inv_freq_ = InverseFrequencies(
      {.theta = static_cast<float>(config_.rope_theta), .head_dim = half, .pairs = half / 2});
  projection_norm_ = Norm::WithoutWeight(hidden, eps);
  return absl::OkStatus();
}

Status VisionTower::Run(const Request& request, PassContext& ctx, Matrix soft_tokens) {
  const int64_t rows = request.image.patches.rows;
  const int64_t columns = request.image.columns;
  const Matrix resid = ctx.arena->NewMatrix(rows, config_.hidden_size);
  GL_RETURN_IF_ERROR(Embed(request.image, ctx, resid));
  ctx.Visit(HookPoint::kVisionPatches, resid);

  std::vector<int64_t> x(static_cast<size_t>(rows));
  std::vector<int64_t> y(x.size());
  for (int64_t row = 0; row < rows; ++row) {
    x[static_cast<size_t>(row)] = row % columns;
    y[static_cast<size_t>(row)] = row / columns;
  }
  const PatchAngles angles = {ComputeRopeAngles(inv_freq_, x, *ctx.arena),
                              ComputeRopeAngles(inv_freq_, y, *ctx.arena)};
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (request.stopped && request.stopped()) return absl::CancelledError("interrupted");
    if (ctx.hooks != nullptr) GL_RETURN_IF_ERROR(ctx.hooks->status);
    ctx.layer = static_cast<int>(i);
    GL_RETURN_IF_ERROR(layers_[i].Forward(resid, angles, ctx));
  }
  ctx.layer = -1;

  const int64_t cell = config_.pooling_kernel_size;
  const Matrix pooled = ctx.arena->NewMatrix(soft_tokens.rows, resid.cols);
  Pool(resid, columns, pooled);
  const Batch cells = CellsOf(*ctx.batch, pooled.rows, cell * cell);
  ctx.batch = &cells;
  ctx.Visit(HookPoint::kVisionPooled, pooled);
  if (config_.standardize) {
    for (int64_t row = 0; row < pooled.rows; ++row) {
      float* of = pooled.row(row);
      for (int64_t i = 0; i < pooled.cols; ++i) {
        const auto at = static_cast<size_t>(i);
        of[i] = (of[i] - std_bias_[at]) * std_scale_[at];
      }
    }
    ctx.Visit(HookPoint::kVisionStandardized, pooled);
  }
  projection_norm_.Forward(pooled, pooled);
  GL_RETURN_IF_ERROR(
      AdaptedLinear(pooled, {{AdaptedModule::kVisionProjection, &projection_, soft_tokens}}, ctx));
  ctx.Visit(HookPoint::kVisionSoftTokens, soft_tokens);
  return absl::OkStatus();
}

// resid = input_proj · 2(p − ½) + the embeddings of column and row.
Status VisionTower::Embed(const PatchGrid& image, const PassContext& ctx, Matrix resid) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix scaled = ctx.arena->NewMatrix(resid.rows, image.patches.cols);
  for (int64_t row = 0; row < scaled.rows; ++row) {
    for (int64_t i = 0; i < scaled.cols; ++i) {
      scaled.row(row)[i] = 2.0f * (image.patches.row(row)[i] - 0.5f);
    }
  }
  GL_RETURN_IF_ERROR(
      AdaptedLinear(scaled, {{AdaptedModule::kVisionInputProj, &input_proj_, resid}}, ctx));
  const Matrix position = ctx.arena->NewMatrix(resid.rows, resid.cols);
  const Matrix of_row = ctx.arena->NewMatrix(resid.rows, resid.cols);
  std::vector<int32_t> ids(static_cast<size_t>(resid.rows));
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>(static_cast<int64_t>(i) % image.columns);
  }
  GatherRows(positions_.Slice(0), ids.data(), 0, 1.0f, position);
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>(static_cast<int64_t>(i) / image.columns);
  }
  GatherRows(positions_.Slice(1), ids.data(), 0, 1.0f, of_row);
  Add(position, of_row, position);
  Add(resid, position, resid);
  return absl::OkStatus();
}

// The mean of each cell's patches, times √h.
void VisionTower::Pool(ConstMatrix resid, int64_t columns, Matrix pooled) const {
  const int64_t cell = config_.pooling_kernel_size;
  const int64_t cells_in_row = columns / cell;
  const float share = 1.0f / static_cast<float>(cell * cell);
  const auto root = static_cast<float>(std::sqrt(static_cast<double>(config_.hidden_size)));
  for (int64_t at = 0; at < pooled.rows; ++at) {
    float* mean = pooled.row(at);
    std::fill_n(mean, pooled.cols, 0.0f);
    const int64_t first = at / cells_in_row * cell * columns + at % cells_in_row * cell;
    for (int64_t y = 0; y < cell; ++y) {
      for (int64_t x = 0; x < cell; ++x) {
        const float* patch = resid.row(first + y * columns + x);
        for (int64_t i = 0; i < pooled.cols; ++i) mean[i] += patch[i] * share;
      }
    }
    for (int64_t i = 0; i < pooled.cols; ++i) mean[i] *= root;
  }
}

}  // namespace gemloupe
