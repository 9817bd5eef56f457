#include "models/text_model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/thread_pool.h"
#include "models/weight_names.h"
#include "ops/dispatch.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

// Scratch that a model keeps between passes: what a chunk of the default size takes, so that the next
// one finds its pages; a longer prefill's goes back to the system.
constexpr size_t kKeptScratch = size_t{256} << 20;

float SqrtScale(int64_t size, bool round_to_bfloat16) {
  const auto scale = static_cast<float>(std::sqrt(static_cast<double>(size)));
  return round_to_bfloat16 ? Bfloat16ToFloat(FloatToBfloat16(scale)) : scale;
}

Status CheckIds(const TextConfig& config, const std::vector<int32_t>& ids) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= config.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(
          "token id ", id, " is outside the vocabulary (0 to ", config.vocab_size - 1, ")"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<TextModel>> TextModel::Load(const TextConfig& config, WeightStore weights,
                                                     const TextModelOptions& options,
                                                     const ProgressFn& progress) {
  GL_RETURN_IF_ERROR(InitDispatch());
  GL_RETURN_IF_ERROR(CheckConfig(config));
  static std::atomic<uint64_t> models{0};
  std::unique_ptr<TextModel> model(new TextModel());
  model->id_ = ++models;
  model->config_ = config;
  model->options_ = options;
  model->weights_ = std::move(weights);
  model->kv_layers_ = MakeKvLayerSpecs(config);
  model->first_sharing_layer_ = FirstSharingLayer(config);
  for (const RopeSpec& rope : DistinctRopes(config)) {
    model->inv_freqs_.push_back(InverseFrequencies(rope));
    for (const float frequency : model->inv_freqs_.back()) {
      if (!std::isfinite(frequency)) {
        return absl::InvalidArgumentError(absl::StrCat("config: rope_theta ", rope.theta,
                                                       " with factor ", rope.factor,
                                                       " gives no finite frequencies"));
      }
    }
  }
  model->embed_scale_ = SqrtScale(config.hidden_size, options.round_embed_scale);
  model->per_layer_scale_ =
      SqrtScale(config.hidden_size_per_layer_input, options.round_embed_scale);

  const ThreadPool::Pass pass(model->threads());  // converting weights uses every thread
  WeightStore& store = model->weights_;
  const auto eps = static_cast<float>(config.rms_norm_eps);
  store.SetProgress(progress);
  GL_ASSIGN_OR_RETURN(model->embed_tokens_,
                      store.Take(names::kEmbedTokens, {config.vocab_size, config.hidden_size}));
  GL_ASSIGN_OR_RETURN(std::vector<float> norm,
                      store.TakeFloats(names::kFinalNorm, config.hidden_size));
  model->final_norm_ = Norm(std::move(norm), eps);
  if (const int64_t width = config.hidden_size_per_layer_input; width > 0) {
    const int64_t all = config.num_hidden_layers * width;
    GL_ASSIGN_OR_RETURN(
        model->embed_tokens_per_layer_,
        store.TakeTable(names::kEmbedTokensPerLayer, {config.vocab_size_per_layer_input, all}));
    GL_ASSIGN_OR_RETURN(model->per_layer_model_projection_,
                        store.Take(names::kPerLayerModelProjection, {all, config.hidden_size}));
    GL_ASSIGN_OR_RETURN(std::vector<float> projection_norm,
                        store.TakeFloats(names::kPerLayerProjectionNorm, width));
    model->per_layer_projection_norm_ = Norm(std::move(projection_norm), eps);
  }
  if (options.expert_memory > 0) {
    model->experts_ = std::make_shared<ExpertCache>(options.expert_memory);
  }
  const std::vector<LayerSpec> specs = MakeLayerSpecs(config);
  for (int i = 0; i < static_cast<int>(specs.size()); ++i) {
    GL_ASSIGN_OR_RETURN(
        DecoderLayer layer,
        DecoderLayer::Load(config, specs[static_cast<size_t>(i)], i, model->experts_, store));
    model->kv_layers_[static_cast<size_t>(i)].key_weight = layer.key_weight();
    model->layers_.push_back(std::move(layer));
  }
  if (progress) progress(1.0);
  store.SetProgress(nullptr);
  return model;
}

int TextModel::threads() const { return options_.threads > 0 ? options_.threads : AvailableCpus(); }

Status TextModel::Forward(const PassRequest& request, std::vector<float>& logits) {
  GL_RETURN_IF_ERROR(CheckIds(config_, request.batch.ids));
  const ThreadPool::Pass pass(threads());
  for (const Segment& segment : request.batch.segments) segment.cache->Reserve(segment.rows);
  Status status;
  {
    const Arena::Scope scope(arena_);
    PassContext ctx;
    ctx.arena = &arena_;
    ctx.captures = request.captures;
    ctx.path = {.row_exact = request.row_exact || options_.invariant,
                .bfloat16 = options_.bfloat16_matmul,
                .float32_activations = options_.float32_activations};
    status = RunLayers(request, ctx, logits);
  }
  arena_.ShrinkTo(kKeptScratch);
  if (!status.ok()) return status;
  for (const Segment& segment : request.batch.segments) {
    segment.cache->Advance(request.batch.ids.data() + segment.row, segment.rows);
  }
  return status;
}

void TextModel::SetBatch(const Batch& batch, PassContext& ctx) const {
  ctx.batch = &batch;
  ctx.angles.clear();
  for (const std::vector<float>& inv_freq : inv_freqs_) {
    ctx.angles.push_back(ComputeRopeAngles(inv_freq, batch.positions, *ctx.arena));
  }
}

Status TextModel::RunLayers(const PassRequest& request, PassContext& ctx,
                            std::vector<float>& logits) {
  const auto num_layers = static_cast<int>(layers_.size());
  const int last_captured =
      request.captures == nullptr ? -1 : request.captures->LastLayer(num_layers);
  const bool wants_head = !request.logits_rows.empty() || last_captured == num_layers;
  // Without logits the pass ends after the last layer that stores keys or shows something.
  const int end = wants_head ? num_layers : std::max(first_sharing_layer_, last_captured + 1);
  // From the last layer that stores keys and values on, only the rows whose logits are wanted are
  // needed: when these are the last of their sequences, the other rows only leave their keys and
  // values in that layer.
  const int last_storing = first_sharing_layer_ - 1;
  const Batch last_rows = request.batch.LastRows();
  const bool only_last =
      last_captured < last_storing && last_rows.rows() < request.batch.rows() &&
      (!wants_head ||
       (request.logits_rows.size() == last_rows.segments.size() &&
        std::equal(request.logits_rows.begin(), request.logits_rows.end(),
                   request.batch.segments.begin(), [](int64_t row, const Segment& segment) {
                     return row == segment.row + segment.rows - 1;
                   })));
  const int switch_layer = only_last ? last_storing : end;

  SetBatch(request.batch, ctx);
  Matrix resid = arena_.NewMatrix(ctx.rows(), config_.hidden_size);
  GatherRows(embed_tokens_, request.batch.ids.data(), 0, embed_scale_, resid);
  ctx.Visit(HookPoint::kEmbed, resid);
  Matrix per_layer_inputs;
  if (config_.hidden_size_per_layer_input > 0) {
    GL_ASSIGN_OR_RETURN(per_layer_inputs, PerLayerInputs(resid, 0, switch_layer, ctx));
    if (switch_layer == num_layers) ctx.Visit(HookPoint::kPerLayerInputs, per_layer_inputs);
  }
  const bool reduces = switch_layer < end && wants_head;
  Matrix kept_embed = arena_.NewMatrix(reduces ? last_rows.rows() : 0, resid.cols);
  for (int64_t i = 0; i < kept_embed.rows; ++i) {
    const int64_t row = request.logits_rows[static_cast<size_t>(i)];
    CopyRows(resid.RowRange(row, 1), kept_embed.RowRange(i, 1));
  }
  std::vector<int64_t> logits_rows = request.logits_rows;
  int first_input_layer = 0;
  for (int i = 0; i < end; ++i) {
    if (request.stopped && request.stopped()) return absl::CancelledError("interrupted");
    ctx.layer = i;
    ctx.kv_stored = i == switch_layer;
    if (i == switch_layer) {
      GL_RETURN_IF_ERROR(layers_[static_cast<size_t>(i)].StoreKeysAndValues(resid, ctx));
      if (!wants_head) break;
      const Matrix kept = arena_.NewMatrix(last_rows.rows(), resid.cols);
      for (size_t row = 0; row < logits_rows.size(); ++row) {
        const auto at = static_cast<int64_t>(row);
        CopyRows(resid.RowRange(logits_rows[row], 1), kept.RowRange(at, 1));
        logits_rows[row] = at;
      }
      resid = kept;
      SetBatch(last_rows, ctx);
      if (config_.hidden_size_per_layer_input > 0) {
        GL_ASSIGN_OR_RETURN(per_layer_inputs, PerLayerInputs(kept_embed, i, end, ctx));
        first_input_layer = i;
      }
    }
    const int64_t width = config_.hidden_size_per_layer_input;
    const ConstMatrix input(per_layer_inputs.data + (i - first_input_layer) * width,
                            per_layer_inputs.rows, width, per_layer_inputs.stride);
    GL_RETURN_IF_ERROR(layers_[static_cast<size_t>(i)].Forward(resid, input, ctx));
  }
  ctx.layer = -1;
  ctx.kv_stored = false;
  if (!wants_head) {
    logits.clear();
    return absl::OkStatus();
  }
  return Head(resid, logits_rows, request.softcap, ctx, logits);
}

// (norm(projection(embed) / √D) + √P · table[ids]) / √2 for layers [begin, end): [T, (end − begin) P].
StatusOr<Matrix> TextModel::PerLayerInputs(ConstMatrix embed, int begin, int end,
                                           PassContext& ctx) const {
  const int64_t width = config_.hidden_size_per_layer_input;
  const int64_t cols = (end - begin) * width;
  const Matrix context = ctx.arena->NewMatrix(embed.rows, cols);
  const Arena::Scope scope(*ctx.arena);
  const Matrix token = ctx.arena->NewMatrix(embed.rows, cols);
  GL_RETURN_IF_ERROR(Linear(embed, {{&per_layer_model_projection_, context, begin * width}},
                            ctx.path, *ctx.arena));
  const auto root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config_.hidden_size)));
  Scale(context, root, context);
  per_layer_projection_norm_.Forward(context, context);
  GL_RETURN_IF_ERROR(embed_tokens_per_layer_.Gather(ctx.batch->ids.data(), begin * width,
                                                    per_layer_scale_, token));
  Add(context, token, context);
  Scale(context, static_cast<float>(1.0 / std::sqrt(2.0)), context);
  return context;
}

Status TextModel::Head(ConstMatrix resid, const std::vector<int64_t>& rows,
                       std::optional<float> softcap, const PassContext& ctx,
                       std::vector<float>& logits) const {
  if (ctx.captures != nullptr && ctx.captures->Wants(HookPoint::kFinalNorm, -1)) {
    const Arena::Scope scope(*ctx.arena);
    const Matrix normed = ctx.arena->NewMatrix(resid.rows, resid.cols);
    final_norm_.Forward(resid, normed);
    ctx.Visit(HookPoint::kFinalNorm, normed);
  }
  const auto count = static_cast<int64_t>(rows.size());
  logits.resize(static_cast<size_t>(count * config_.vocab_size));
  if (count == 0) return absl::OkStatus();
  const Arena::Scope scope(*ctx.arena);
  const Matrix x = ctx.arena->NewMatrix(count, resid.cols);
  for (int64_t i = 0; i < count; ++i) {
    CopyRows(resid.RowRange(rows[static_cast<size_t>(i)], 1), x.RowRange(i, 1));
  }
  final_norm_.Forward(x, x);
  const Matrix dst(logits.data(), count, config_.vocab_size);
  GL_RETURN_IF_ERROR(Linear(x, {{&embed_tokens_, dst}}, ctx.path, *ctx.arena));
  ctx.Visit(HookPoint::kLogitsRaw, dst);
  const float cap = softcap.value_or(static_cast<float>(config_.final_logit_softcapping));
  if (cap > 0.0f) Softcap(cap, dst);
  ctx.Visit(HookPoint::kLogits, dst);
  return absl::OkStatus();
}

}  // namespace gemloupe
