#include "layers/attention.h"

#include <algorithm>
#include <utility>

#include "ops/attention.h"
#include "ops/rope.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

// What the query at `position` may see, in a pass of its sequence that ends before `pass_end`.
KeyRange VisibleKeys(const LayerSpec& spec, int64_t start, int64_t position, int64_t pass_end) {
  KeyRange range;
  // The reference bounds the distance inclusively where attention looks both ways.
  const int64_t reach = spec.bidirectional ? spec.window : spec.window - 1;
  range.begin = spec.window == 0 ? start : std::max(start, position - reach);
  range.end = position + 1;
  if (spec.bidirectional) {
    range.end = spec.window == 0 ? pass_end : std::min(pass_end, position + reach + 1);
  }
  return range;
}

}  // namespace

AttentionLayer::AttentionLayer(const LayerSpec& spec, AttentionWeights weights, float eps)
    : spec_(spec), weights_(std::move(weights)), eps_(eps) {
  q_norm_ = Norm(weights_.q_norm, eps);
  k_norm_ = Norm(weights_.k_norm, eps);
}

std::shared_ptr<const std::vector<float>> AttentionLayer::key_weight() const {
  if (!spec_.values_are_keys || spec_.shares_kv) return nullptr;
  return std::make_shared<const std::vector<float>>(weights_.k_norm);
}

Status AttentionLayer::Forward(ConstMatrix x, const PassContext& ctx, Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  const bool stores = !spec_.shares_kv && !ctx.kv_stored;
  const int64_t kv_cols = stores ? spec_.num_kv_heads * spec_.head_dim : 0;
  const Matrix q = ctx.arena->NewMatrix(x.rows, spec_.num_heads * spec_.head_dim);
  const Matrix k = ctx.arena->NewMatrix(x.rows, kv_cols);
  const Matrix v = ctx.arena->NewMatrix(x.rows, kv_cols);
  const Matrix z = ctx.arena->NewMatrix(x.rows, q.cols);
  GL_RETURN_IF_ERROR(Project(x, ctx, q, k, v));

  q_norm_.Forward(q, q);
  ctx.Visit(HookPoint::kAttnQ, q);
  ApplyRope(ctx.angles[static_cast<size_t>(spec_.rope_index)], spec_.head_dim, q);
  ctx.Visit(HookPoint::kAttnRotQ, q);
  if (stores) StoreKeysAndValues(k, v, ctx);

  Attend(q, ctx, z);
  ctx.Visit(HookPoint::kAttnZ, z);
  GL_RETURN_IF_ERROR(Linear(z, {{&weights_.o_proj, out}}, ctx.path, *ctx.arena));
  ctx.Visit(HookPoint::kAttnOut, out);
  return absl::OkStatus();
}

Status AttentionLayer::Store(ConstMatrix x, const PassContext& ctx) const {
  GL_CHECK(!spec_.shares_kv);
  const Arena::Scope scope(*ctx.arena);
  const int64_t kv_cols = spec_.num_kv_heads * spec_.head_dim;
  const Matrix k = ctx.arena->NewMatrix(x.rows, kv_cols);
  const Matrix v = ctx.arena->NewMatrix(x.rows, kv_cols);
  GL_RETURN_IF_ERROR(Project(x, ctx, Matrix(nullptr, x.rows, 0), k, v));
  StoreKeysAndValues(k, v, ctx);
  return absl::OkStatus();
}

Status AttentionLayer::Project(ConstMatrix x, const PassContext& ctx, Matrix q, Matrix k,
                               Matrix v) const {
  std::vector<LinearJob> jobs;
  if (q.cols > 0) jobs.push_back({&weights_.q_proj, q});
  if (k.cols > 0) jobs.push_back({&weights_.k_proj, k});
  if (v.cols > 0 && !spec_.values_are_keys) jobs.push_back({&weights_.v_proj, v});
  GL_RETURN_IF_ERROR(Linear(x, jobs, ctx.path, *ctx.arena));
  if (v.cols > 0 && spec_.values_are_keys) CopyRows(k, v);
  if (q.cols > 0) ctx.Visit(HookPoint::kAttnQProj, q);
  if (k.cols > 0) {
    ctx.Visit(HookPoint::kAttnKProj, k);
    ctx.Visit(HookPoint::kAttnVProj, v);  // the raw keys where values are keys
  }
  return absl::OkStatus();
}

void AttentionLayer::StoreKeysAndValues(Matrix k, Matrix v, const PassContext& ctx) const {
  k_norm_.Forward(k, k);
  ctx.Visit(HookPoint::kAttnK, k);
  RmsNorm(v, nullptr, spec_.head_dim, eps_, v);
  ctx.Visit(HookPoint::kAttnV, v);
  ApplyRope(ctx.angles[static_cast<size_t>(spec_.rope_index)], spec_.head_dim, k);
  ctx.Visit(HookPoint::kAttnRotK, k);
  for (const Segment& segment : ctx.batch->segments) {
    segment.cache->Write(ctx.layer, segment.position, k.RowRange(segment.row, segment.rows),
                         v.RowRange(segment.row, segment.rows));
  }
}

void AttentionLayer::Attend(ConstMatrix q, const PassContext& ctx, Matrix z) const {
  std::vector<KeyRange> ranges;
  for (const Segment& segment : ctx.batch->segments) {
    ranges.clear();
    for (int64_t row = 0; row < segment.rows; ++row) {
      ranges.push_back(VisibleKeys(spec_, segment.cache->start(), segment.position + row,
                                   segment.position + segment.rows));
    }
    Attention(q.RowRange(segment.row, segment.rows), segment.cache->View(ctx.layer), ranges.data(),
              z.RowRange(segment.row, segment.rows));
  }
}

}  // namespace gemloupe
