#include "models/vision_model.h"

#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/thread_pool.h"
#include "models/patch_embedder.h"
#include "models/vision_tower.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

// Scratch that is kept between images: what one of the default budget takes.
constexpr size_t kKeptScratch = size_t{128} << 20;

}  // namespace

StatusOr<std::unique_ptr<VisionModel>> VisionModel::Load(const VisionConfig& config,
                                                         WeightStore weights,
                                                         const VisionOptions& options) {
  GL_RETURN_IF_ERROR(InitDispatch());
  GL_RETURN_IF_ERROR(CheckVisionConfig(config));
  std::unique_ptr<VisionModel> model;
  if (config.has_encoder()) {
    model = std::make_unique<VisionTower>();
  } else {
    model = std::make_unique<PatchEmbedder>();
  }
  model->config_ = config;
  model->options_ = options;
  model->weights_ = std::move(weights);
  const ThreadPool::Pass pass(options.threads > 0 ? options.threads : AvailableCpus());
  GL_RETURN_IF_ERROR(model->LoadWeights(model->weights_));
  return model;
}

Status VisionModel::Check(const PatchGrid& image) const {
  const int64_t rows = image.columns > 0 ? image.patches.rows / image.columns : 0;
  const int64_t cell = config_.has_encoder() ? config_.pooling_kernel_size : 1;
  const int64_t most =
      config_.has_encoder() ? config_.position_embedding_size : config_.mm_posemb_size;
  if (rows < 1 || rows * image.columns != image.patches.rows || rows % cell != 0 ||
      image.columns % cell != 0 || rows > most || image.columns > most) {
    return absl::InvalidArgumentError(absl::StrCat(
        "an image of ", rows, " rows of ", image.columns, " patches (", image.patches.rows,
        " in all), expected rows and columns that are multiples of ", cell, ", at most ", most));
  }
  if (image.patches.cols != config_.patch_values()) {
    return absl::InvalidArgumentError(absl::StrCat("patches have ", image.patches.cols,
                                                   " values, expected ", config_.patch_values()));
  }
  return absl::OkStatus();
}

Status VisionModel::Encode(const Request& request, std::vector<float>& soft_tokens) {
  GL_RETURN_IF_ERROR(Check(request.image));
  const ThreadPool::Pass pass(options_.threads > 0 ? options_.threads : AvailableCpus());
  const int64_t rows = request.image.patches.rows;
  const int64_t cell = config_.has_encoder() ? config_.pooling_kernel_size : 1;
  const int64_t count = rows / (cell * cell);
  soft_tokens.resize(static_cast<size_t>(count * config_.text_hidden_size));

  // The image is a segment without a cache: what hooks see goes through it.
  Batch batch;
  batch.positions.resize(static_cast<size_t>(rows));
  std::iota(batch.positions.begin(), batch.positions.end(), request.first_row);
  batch.segments.push_back({nullptr, 0, rows, request.first_row, request.first_row + rows});
  const std::vector<AdapterMix> adapters = {request.adapters};
  PassHooks hooks;
  hooks.of_segment = {request.hooks};
  const bool hooked = request.hooks != nullptr && !request.hooks->empty();
  if (hooked) request.hooks->BeginPass(false);
  Status status;
  {
    const Arena::Scope scope(arena_);
    PassContext ctx;
    ctx.batch = &batch;
    ctx.arena = &arena_;
    ctx.hooks = hooked ? &hooks : nullptr;
    ctx.adapters = request.adapters.empty() ? nullptr : &adapters;
    ctx.path = {.row_exact = options_.invariant, .bfloat16 = options_.bfloat16_matmul};
    status = Run(request, ctx, Matrix(soft_tokens.data(), count, config_.text_hidden_size));
    status.Update(hooks.status);
  }
  arena_.ShrinkTo(kKeptScratch);
  if (hooked) request.hooks->EndPass(status.ok());
  return status;
}

}  // namespace gemloupe
