#include "models/vision_layer.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "models/clipped_reader.h"
#include "models/weight_names.h"
#include "ops/attention_steps.h"
#include "ops/dense_attention.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

// Rows of the feed-forward that are computed at once: 1,120 soft tokens' 10,080 patches would need
// 350 MB for their gates.
constexpr int64_t kFeedForwardRows = 2560;

}  // namespace

StatusOr<VisionLayer> VisionLayer::Load(const VisionConfig& config, int index,
                                        WeightStore& weights) {
  const auto eps = static_cast<float>(config.rms_norm_eps);
  const int64_t hidden = config.hidden_size;
  const int64_t q_rows = config.num_attention_heads * config.head_dim;
  const int64_t kv_rows = config.num_key_value_heads * config.head_dim;
  VisionLayer layer;
  layer.head_dim_ = config.head_dim;
  layer.v_norm_ = Norm::WithoutWeight(config.head_dim, eps);
  for (const auto& [norm, name, size] :
       {std::tuple{&layer.input_norm_, names::kInputNorm, hidden},
        std::tuple{&layer.post_attention_norm_, names::kPostAttentionNorm, hidden},
        std::tuple{&layer.pre_feedforward_norm_, names::kPreFeedforwardNorm, hidden},
        std::tuple{&layer.post_feedforward_norm_, names::kPostFeedforwardNorm, hidden},
        std::tuple{&layer.q_norm_, names::kQNorm, config.head_dim},
        std::tuple{&layer.k_norm_, names::kKNorm, config.head_dim}}) {
    GL_ASSIGN_OR_RETURN(std::vector<float> weight,
                        weights.TakeFloats(names::vision::OfLayer(index, name), size));
    *norm = Norm(std::move(weight), eps);
  }
  for (const auto& [linear, module, name, rows, cols] :
       {std::tuple{&layer.q_proj_, AdaptedModule::kVisionQProj, names::kQProj, q_rows, hidden},
        std::tuple{&layer.k_proj_, AdaptedModule::kVisionKProj, names::kKProj, kv_rows, hidden},
        std::tuple{&layer.v_proj_, AdaptedModule::kVisionVProj, names::kVProj, kv_rows, hidden},
        std::tuple{&layer.o_proj_, AdaptedModule::kVisionOProj, names::kOProj, hidden, q_rows},
        std::tuple{&layer.gate_proj_, AdaptedModule::kVisionGateProj, names::kGateProj,
                   config.intermediate_size, hidden},
        std::tuple{&layer.up_proj_, AdaptedModule::kVisionUpProj, names::kUpProj,
                   config.intermediate_size, hidden},
        std::tuple{&layer.down_proj_, AdaptedModule::kVisionDownProj, names::kDownProj, hidden,
                   config.intermediate_size}}) {
    const ClippedSource source = {module, names::vision::OfLayer(index, name), rows, cols};
    GL_ASSIGN_OR_RETURN(*linear, ReadClipped(source, config.use_clipped_linears, weights));
  }
  return layer;
}

Status VisionLayer::Forward(Matrix resid, const PatchAngles& angles, const PassContext& ctx) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix x = ctx.arena->NewMatrix(resid.rows, resid.cols);
  const Matrix out = ctx.arena->NewMatrix(resid.rows, resid.cols);
  ctx.Visit(HookPoint::kResidPre, resid);
  input_norm_.Forward(resid, HookPoint::kAttnNormScale, ctx, x);
  ctx.Visit(HookPoint::kAttnNorm, x);
  GL_RETURN_IF_ERROR(Attend(x, angles, ctx, out));
  post_attention_norm_.Forward(out, HookPoint::kAttnPostScale, ctx, out);
  ctx.Visit(HookPoint::kAttnPost, out);
  Add(resid, out, resid);
  ctx.Visit(HookPoint::kResidMid, resid);
  pre_feedforward_norm_.Forward(resid, HookPoint::kMlpNormScale, ctx, x);
  ctx.Visit(HookPoint::kMlpNorm, x);
  // Hooks see all rows at once.
  const int64_t step = ctx.hooks == nullptr ? kFeedForwardRows : resid.rows;
  for (int64_t row = 0; row < resid.rows; row += step) {
    const int64_t rows = std::min(step, resid.rows - row);
    GL_RETURN_IF_ERROR(FeedForward(x.RowRange(row, rows), ctx, out.RowRange(row, rows)));
  }
  post_feedforward_norm_.Forward(out, HookPoint::kFfnPostScale, ctx, out);
  ctx.Visit(HookPoint::kFfnPost, out);
  Add(resid, out, resid);
  ctx.Visit(HookPoint::kResidPost, resid);
  return absl::OkStatus();
}

Status VisionLayer::Attend(ConstMatrix x, const PatchAngles& angles, const PassContext& ctx,
                           Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix q = ctx.arena->NewMatrix(x.rows, q_proj_.weight.shape[0]);
  const Matrix k = ctx.arena->NewMatrix(x.rows, k_proj_.weight.shape[0]);
  const Matrix v = ctx.arena->NewMatrix(x.rows, v_proj_.weight.shape[0]);
  const Matrix z = ctx.arena->NewMatrix(x.rows, q.cols);
  GL_RETURN_IF_ERROR(gemloupe::Forward(x, {{&q_proj_, q}, {&k_proj_, k}, {&v_proj_, v}}, ctx));
  ctx.Visit(HookPoint::kAttnQProj, q);
  ctx.Visit(HookPoint::kAttnKProj, k);
  ctx.Visit(HookPoint::kAttnVProj, v);
  k_norm_.Forward(k, HookPoint::kAttnKScale, ctx, k);
  ctx.Visit(HookPoint::kAttnK, k);
  v_norm_.Forward(v, HookPoint::kAttnVScale, ctx, v);
  ctx.Visit(HookPoint::kAttnV, v);
  ApplyAxialRope(angles.columns, angles.rows, head_dim_, k);
  ctx.Visit(HookPoint::kAttnRotK, k);
  q_norm_.Forward(q, HookPoint::kAttnQScale, ctx, q);
  ctx.Visit(HookPoint::kAttnQ, q);
  ApplyAxialRope(angles.columns, angles.rows, head_dim_, q);
  ctx.Visit(HookPoint::kAttnRotQ, q);
  GL_RETURN_IF_ERROR(DenseAttention(q, k, v, head_dim_, z, ctx.path, *ctx.arena));
  if (ctx.hooks != nullptr) GL_RETURN_IF_ERROR(ShowSteps(q, k, v, ctx, z));
  ctx.Visit(HookPoint::kAttnZ, z);
  GL_RETURN_IF_ERROR(gemloupe::Forward(z, {{&o_proj_, out}}, ctx));
  ctx.Visit(HookPoint::kAttnOut, out);
  return absl::OkStatus();
}

// Shows scores and pattern, computed beside attention, and computes z anew where they were edited.
Status VisionLayer::ShowSteps(ConstMatrix q, ConstMatrix k, ConstMatrix v, const PassContext& ctx,
                              Matrix z) const {
  const bool wants_pattern = ctx.Wants(HookPoint::kAttnPattern);
  if (!wants_pattern && !ctx.Wants(HookPoint::kAttnScores)) return absl::OkStatus();
  const Arena::Scope scope(*ctx.arena);
  Site site;
  site.positions = ctx.batch->positions;
  site.heads = q.cols / head_dim_;
  const std::vector<KeyRange> ranges(static_cast<size_t>(q.rows), KeyRange{0, k.rows});
  const Matrix scores = ctx.arena->NewMatrix(site.heads * q.rows, k.rows);
  AttentionScores(q, k, head_dim_, ranges.data(), scores);
  site.point = HookPoint::kAttnScores;
  bool changed = ctx.VisitSegment(0, site, scores);
  if (!wants_pattern && !changed) return ctx.hooks->status;
  const Matrix pattern = ctx.arena->NewMatrix(scores.rows, k.rows);
  AttentionPattern(scores, q.rows, ranges.data(), pattern);
  site.point = HookPoint::kAttnPattern;
  changed |= ctx.VisitSegment(0, site, pattern);
  if (changed) AttentionOutput(pattern, v, head_dim_, ranges.data(), z);
  return ctx.hooks->status;
}

Status VisionLayer::FeedForward(ConstMatrix x, const PassContext& ctx, Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix gate = ctx.arena->NewMatrix(x.rows, gate_proj_.weight.shape[0]);
  const Matrix up = ctx.arena->NewMatrix(x.rows, gate.cols);
  GL_RETURN_IF_ERROR(gemloupe::Forward(x, {{&gate_proj_, gate}, {&up_proj_, up}}, ctx));
  ctx.Visit(HookPoint::kMlpGate, gate);
  ctx.Visit(HookPoint::kMlpUp, up);
  GeluMul(gate, up, gate);
  ctx.Visit(HookPoint::kMlpHidden, gate);
  GL_RETURN_IF_ERROR(gemloupe::Forward(gate, {{&down_proj_, out}}, ctx));
  ctx.Visit(HookPoint::kMlpOut, out);
  return absl::OkStatus();
}

}  // namespace gemloupe
