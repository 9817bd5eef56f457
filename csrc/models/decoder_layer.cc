#include "models/decoder_layer.h"

#include <utility>

#include "models/weight_names.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

// Reads the tensors of one layer.
class LayerReader {
 public:
  LayerReader(int index, WeightStore& weights) : index_(index), weights_(weights) {}

  StatusOr<TensorView> Matrix(const char* name, const std::vector<int64_t>& shape) {
    return weights_.Take(names::OfLayer(index_, name), shape);
  }
  StatusOr<std::vector<float>> Vector(const char* name, int64_t size) {
    return weights_.TakeFloats(names::OfLayer(index_, name), size);
  }
  StatusOr<Norm> ReadNorm(const char* name, int64_t size, float eps) {
    GL_ASSIGN_OR_RETURN(std::vector<float> weight, Vector(name, size));
    return Norm(std::move(weight), eps);
  }

 private:
  int index_;
  WeightStore& weights_;
};

StatusOr<AttentionWeights> ReadAttention(const TextConfig& config, const LayerSpec& spec,
                                         LayerReader& reader) {
  const int64_t hidden = config.hidden_size;
  const int64_t q_rows = spec.num_heads * spec.head_dim;
  const int64_t kv_rows = spec.num_kv_heads * spec.head_dim;
  AttentionWeights weights;
  GL_ASSIGN_OR_RETURN(weights.q_proj, reader.Matrix(names::kQProj, {q_rows, hidden}));
  GL_ASSIGN_OR_RETURN(weights.o_proj, reader.Matrix(names::kOProj, {hidden, q_rows}));
  GL_ASSIGN_OR_RETURN(weights.q_norm, reader.Vector(names::kQNorm, spec.head_dim));
  if (spec.shares_kv) return weights;
  GL_ASSIGN_OR_RETURN(weights.k_proj, reader.Matrix(names::kKProj, {kv_rows, hidden}));
  GL_ASSIGN_OR_RETURN(weights.k_norm, reader.Vector(names::kKNorm, spec.head_dim));
  if (!spec.values_are_keys) {
    GL_ASSIGN_OR_RETURN(weights.v_proj, reader.Matrix(names::kVProj, {kv_rows, hidden}));
  }
  return weights;
}

StatusOr<MlpWeights> ReadMlp(int64_t hidden, int64_t width, LayerReader& reader) {
  MlpWeights weights;
  GL_ASSIGN_OR_RETURN(weights.gate_proj, reader.Matrix(names::kGateProj, {width, hidden}));
  GL_ASSIGN_OR_RETURN(weights.up_proj, reader.Matrix(names::kUpProj, {width, hidden}));
  GL_ASSIGN_OR_RETURN(weights.down_proj, reader.Matrix(names::kDownProj, {hidden, width}));
  return weights;
}

StatusOr<ExpertsWeights> ReadExperts(int index, int64_t experts, int64_t width, int64_t hidden,
                                     const std::shared_ptr<ExpertCache>& cache,
                                     WeightStore& weights) {
  const std::string gate_up = names::OfLayer(index, names::kExpertsGateUpProj);
  const std::string down = names::OfLayer(index, names::kExpertsDownProj);
  ExpertsWeights read;
  read.cache = cache;
  if (cache == nullptr) {
    GL_ASSIGN_OR_RETURN(read.gate_up_proj, weights.Take(gate_up, {experts, 2 * width, hidden}));
    GL_ASSIGN_OR_RETURN(read.down_proj, weights.Take(down, {experts, hidden, width}));
    return read;
  }
  GL_ASSIGN_OR_RETURN(const WeightStore::FilePart first,
                      weights.TakeInFile(gate_up, {experts, 2 * width, hidden}));
  GL_ASSIGN_OR_RETURN(const WeightStore::FilePart second,
                      weights.TakeInFile(down, {experts, hidden, width}));
  read.gate_up_proj = first.view;
  read.down_proj = second.view;
  GL_ASSIGN_OR_RETURN(read.cache_layer,
                      cache->AddLayer(first.view, first.file, second.view, second.file));
  return read;
}

}  // namespace

StatusOr<DecoderLayer> DecoderLayer::Load(const TextConfig& config, const LayerSpec& spec,
                                          int index,
                                          const std::shared_ptr<ExpertCache>& expert_cache,
                                          WeightStore& weights) {
  LayerReader reader(index, weights);
  const auto eps = static_cast<float>(config.rms_norm_eps);
  const int64_t hidden = config.hidden_size;
  DecoderLayer layer;
  GL_ASSIGN_OR_RETURN(layer.input_norm_, reader.ReadNorm(names::kInputNorm, hidden, eps));
  GL_ASSIGN_OR_RETURN(layer.post_attention_norm_,
                      reader.ReadNorm(names::kPostAttentionNorm, hidden, eps));
  GL_ASSIGN_OR_RETURN(layer.pre_feedforward_norm_,
                      reader.ReadNorm(names::kPreFeedforwardNorm, hidden, eps));
  GL_ASSIGN_OR_RETURN(layer.post_feedforward_norm_,
                      reader.ReadNorm(names::kPostFeedforwardNorm, hidden, eps));
  GL_ASSIGN_OR_RETURN(const std::vector<float> layer_scalar, reader.Vector(names::kLayerScalar, 1));
  layer.layer_scalar_ = layer_scalar[0];
  GL_ASSIGN_OR_RETURN(AttentionWeights attention, ReadAttention(config, spec, reader));
  layer.attention_.emplace(spec, std::move(attention), eps);
  GL_ASSIGN_OR_RETURN(MlpWeights mlp, ReadMlp(hidden, spec.intermediate_size, reader));
  layer.mlp_.emplace(std::move(mlp));
  if (spec.has_experts) {
    const int64_t experts = config.num_experts;
    const int64_t width = config.moe_intermediate_size;
    RouterWeights router;
    GL_ASSIGN_OR_RETURN(router.proj, reader.Matrix(names::kRouterProj, {experts, hidden}));
    GL_ASSIGN_OR_RETURN(router.scale, reader.Vector(names::kRouterScale, hidden));
    GL_ASSIGN_OR_RETURN(router.per_expert_scale,
                        reader.Vector(names::kRouterPerExpertScale, experts));
    layer.router_.emplace(std::move(router), config.top_k_experts, eps);
    GL_ASSIGN_OR_RETURN(ExpertsWeights expert_weights,
                        ReadExperts(index, experts, width, hidden, expert_cache, weights));
    layer.experts_.emplace(std::move(expert_weights));
    GL_ASSIGN_OR_RETURN(layer.post_mlp_norm_, reader.ReadNorm(names::kPostMlpNorm, hidden, eps));
    GL_ASSIGN_OR_RETURN(layer.pre_experts_norm_,
                        reader.ReadNorm(names::kPreExpertsNorm, hidden, eps));
    GL_ASSIGN_OR_RETURN(layer.post_experts_norm_,
                        reader.ReadNorm(names::kPostExpertsNorm, hidden, eps));
  }
  if (config.hidden_size_per_layer_input > 0) {
    const int64_t width = config.hidden_size_per_layer_input;
    PerLayerInputWeights input;
    GL_ASSIGN_OR_RETURN(input.gate, reader.Matrix(names::kPerLayerInputGate, {width, hidden}));
    GL_ASSIGN_OR_RETURN(input.projection,
                        reader.Matrix(names::kPerLayerProjection, {hidden, width}));
    GL_ASSIGN_OR_RETURN(input.post_norm, reader.Vector(names::kPostPerLayerInputNorm, hidden));
    layer.per_layer_input_.emplace(std::move(input), eps);
  }
  return layer;
}

Status DecoderLayer::Forward(Matrix resid, Matrix per_layer_input, const PassContext& ctx) const {
  ctx.Visit(HookPoint::kResidPre, resid);
  GL_RETURN_IF_ERROR(Attend(resid, ctx));
  ctx.Visit(HookPoint::kResidMid, resid);
  GL_RETURN_IF_ERROR(FeedForward(resid, ctx));
  ctx.Visit(HookPoint::kResidFfn, resid);
  if (per_layer_input_.has_value()) {
    const Arena::Scope scope(*ctx.arena);
    const Matrix added = ctx.arena->NewMatrix(resid.rows, resid.cols);
    GL_RETURN_IF_ERROR(per_layer_input_->Forward(resid, per_layer_input, ctx, added));
    Add(resid, added, resid);
  }
  ctx.Visit(HookPoint::kResidUnscaled, resid);
  Scale(resid, layer_scalar_, resid);
  ctx.Visit(HookPoint::kResidPost, resid);
  return absl::OkStatus();
}

Status DecoderLayer::StoreKeysAndValues(ConstMatrix resid, const PassContext& ctx) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix x = ctx.arena->NewMatrix(resid.rows, resid.cols);
  input_norm_.Forward(resid, x);
  return attention_->Store(x, ctx);
}

Status DecoderLayer::Attend(Matrix resid, const PassContext& ctx) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix x = ctx.arena->NewMatrix(resid.rows, resid.cols);
  const Matrix out = ctx.arena->NewMatrix(resid.rows, resid.cols);
  input_norm_.Forward(resid, HookPoint::kAttnNormScale, ctx, x);
  ctx.Visit(HookPoint::kAttnNorm, x);
  GL_RETURN_IF_ERROR(attention_->Forward(x, ctx, out));
  post_attention_norm_.Forward(out, HookPoint::kAttnPostScale, ctx, out);
  ctx.Visit(HookPoint::kAttnPost, out);
  Add(resid, out, resid);
  return absl::OkStatus();
}

Status DecoderLayer::FeedForward(Matrix resid, const PassContext& ctx) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix x = ctx.arena->NewMatrix(resid.rows, resid.cols);
  const Matrix out = ctx.arena->NewMatrix(resid.rows, resid.cols);
  pre_feedforward_norm_.Forward(resid, HookPoint::kMlpNormScale, ctx, x);
  ctx.Visit(HookPoint::kMlpNorm, x);
  GL_RETURN_IF_ERROR(mlp_->Forward(x, ctx, out));
  if (experts_.has_value()) GL_RETURN_IF_ERROR(AddExperts(resid, ctx, out));
  ctx.Visit(HookPoint::kFfnOut, out);
  post_feedforward_norm_.Forward(out, HookPoint::kFfnPostScale, ctx, out);
  ctx.Visit(HookPoint::kFfnPost, out);
  Add(resid, out, resid);
  return absl::OkStatus();
}

Status DecoderLayer::AddExperts(ConstMatrix resid, const PassContext& ctx, Matrix dense) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix x = ctx.arena->NewMatrix(resid.rows, resid.cols);
  const Matrix out = ctx.arena->NewMatrix(resid.rows, resid.cols);
  post_mlp_norm_.Forward(dense, HookPoint::kMlpPostScale, ctx, dense);
  ctx.Visit(HookPoint::kMlpPost, dense);
  Routing routing;
  GL_RETURN_IF_ERROR(router_->Forward(resid, ctx, routing));
  pre_experts_norm_.Forward(resid, HookPoint::kExpertsNormScale, ctx, x);
  ctx.Visit(HookPoint::kExpertsNorm, x);
  GL_RETURN_IF_ERROR(experts_->Forward(x, routing, ctx, out));
  post_experts_norm_.Forward(out, HookPoint::kExpertsPostScale, ctx, out);
  ctx.Visit(HookPoint::kExpertsPost, out);
  Add(dense, out, dense);
  return absl::OkStatus();
}

}  // namespace gemloupe
