#include "layers/attention.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "ops/attention.h"
#include "ops/attention_steps.h"
#include "ops/rope.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

// What the query at `position` may see, in a pass of its sequence that ends before `pass_end`, in a
// block of media that ends before `block_end` (0: in none).
KeyRange VisibleKeys(const LayerSpec& spec, int64_t start, int64_t position, int64_t pass_end,
                     int64_t block_end) {
  KeyRange range;
  if (spec.behind_cache) {
    range.begin = spec.window == 0 ? start : std::max(start, position - spec.window - 1);
    range.end = position;
    return range;
  }
  // The reference bounds the distance inclusively where attention looks both ways.
  const int64_t reach = spec.bidirectional ? spec.window : spec.window - 1;
  range.begin = spec.window == 0 ? start : std::max(start, position - reach);
  range.end = position + 1;
  if (spec.bidirectional) {
    range.end = spec.window == 0 ? pass_end : std::min(pass_end, position + reach + 1);
  } else if (spec.window > 0) {
    range.end = std::max(range.end, block_end);
  }
  return range;
}

// Weight outside a query's range would be attention that the model does not have.
Status CheckRanges(const Site& site, const std::vector<KeyRange>& ranges, ConstMatrix x,
                   float nothing) {
  for (int64_t row = 0; row < x.rows; ++row) {
    const KeyRange& range = ranges[static_cast<size_t>(row % site.rows())];
    for (int64_t key = 0; key < x.cols; ++key) {
      if ((key >= range.begin && key < range.end) || x.row(row)[key] == nothing) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "edit of ", HookName(site.point, site.layer), ": head ", row / site.rows(), ", query ",
          site.positions[static_cast<size_t>(row % site.rows())], " got ", x.row(row)[key],
          " for key ", key, ", expected ", nothing, " outside the keys that it sees (", range.begin,
          " to ", range.end - 1, ")"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

AttentionLayer::AttentionLayer(const LayerSpec& spec, AttentionWeights weights, float eps)
    : spec_(spec), weights_(std::move(weights)) {
  q_norm_ = Norm(weights_.q_norm, eps);
  k_norm_ = Norm(weights_.k_norm, eps);
  v_norm_ = Norm::WithoutWeight(spec_.head_dim, eps);
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

  if (stores) StoreKeysAndValues(k, v, ctx);
  q_norm_.Forward(q, HookPoint::kAttnQScale, ctx, q);
  ctx.Visit(HookPoint::kAttnQ, q);
  ApplyRope(ctx.angles[static_cast<size_t>(spec_.rope_index)], spec_.head_dim, q);
  ctx.Visit(HookPoint::kAttnRotQ, q);

  GL_RETURN_IF_ERROR(Attend(q, ctx, z));
  ctx.Visit(HookPoint::kAttnZ, z);
  return Output(z, ctx, out);
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
  std::vector<AdaptedJob> jobs;
  if (q.cols > 0) jobs.push_back({AdaptedModule::kQProj, &weights_.q_proj, q});
  const size_t queries = jobs.size();
  if (k.cols > 0) jobs.push_back({AdaptedModule::kKProj, &weights_.k_proj, k});
  if (v.cols > 0 && !spec_.values_are_keys) {
    jobs.push_back({AdaptedModule::kVProj, &weights_.v_proj, v});
  }
  if (!ctx.kv_apart || jobs.size() == queries) {
    GL_RETURN_IF_ERROR(AdaptedLinear(x, jobs, ctx.path, ctx));
  } else {
    // Keys and values are those of a pass that stores all of its rows.
    MatmulPath stored = ctx.path;
    stored.tail_rows = 0;
    const std::span<const AdaptedJob> all(jobs);
    GL_RETURN_IF_ERROR(AdaptedLinear(x, all.first(queries), ctx.path, ctx));
    GL_RETURN_IF_ERROR(AdaptedLinear(x, all.subspan(queries), stored, ctx));
  }
  if (q.cols > 0) ctx.Visit(HookPoint::kAttnQProj, q);
  if (k.cols > 0) ctx.Visit(HookPoint::kAttnKProj, k);
  if (v.cols > 0 && spec_.values_are_keys) CopyRows(k, v);
  return absl::OkStatus();
}

void AttentionLayer::StoreKeysAndValues(Matrix k, Matrix v, const PassContext& ctx) const {
  // Edited keys or values are no longer each other's: their cache holds both from then on.
  std::vector<uint8_t> changed(ctx.batch->segments.size(), 0);
  ctx.Visit(HookPoint::kAttnVProj, v, changed);  // the raw keys where values are keys
  k_norm_.Forward(k, HookPoint::kAttnKScale, ctx, k, &changed);
  ctx.Visit(HookPoint::kAttnK, k, changed);
  v_norm_.Forward(v, HookPoint::kAttnVScale, ctx, v, &changed);
  ctx.Visit(HookPoint::kAttnV, v, changed);
  ApplyRope(ctx.angles[static_cast<size_t>(spec_.rope_index)], spec_.head_dim, k);
  ctx.Visit(HookPoint::kAttnRotK, k, changed);
  for (size_t i = 0; i < ctx.batch->segments.size(); ++i) {
    const Segment& segment = ctx.batch->segments[i];
    if (changed[i] != 0) segment.cache->SeparateKeys(ctx.layer);
    segment.cache->Write(ctx.layer, segment.position, k.RowRange(segment.row, segment.rows),
                         v.RowRange(segment.row, segment.rows));
  }
}

Status AttentionLayer::Attend(ConstMatrix q, const PassContext& ctx, Matrix z) const {
  std::vector<KeyRange> ranges;
  for (size_t i = 0; i < ctx.batch->segments.size(); ++i) {
    const Segment& segment = ctx.batch->segments[i];
    ranges.clear();
    for (int64_t row = segment.row; row < segment.row + segment.rows; ++row) {
      const auto at = static_cast<size_t>(row);
      const int64_t block_end = ctx.batch->block_ends.empty() ? 0 : ctx.batch->block_ends[at];
      ranges.push_back(VisibleKeys(spec_, segment.cache->start(), ctx.batch->positions[at],
                                   segment.end, block_end));
      if (spec_.behind_cache) {
        ranges.back().begin =
            std::max(ranges.back().begin, segment.cache->FirstPosition(ctx.layer));
      }
    }
    const ConstMatrix own_q = q.RowRange(segment.row, segment.rows);
    const Matrix own_z = z.RowRange(segment.row, segment.rows);
    Attention(own_q, segment.cache->View(ctx.layer), ranges.data(), own_z);
    if (ctx.hooks != nullptr && segment.rows > 0) {
      GL_RETURN_IF_ERROR(ShowSteps(i, own_q, ranges, ctx, own_z));
    }
  }
  return absl::OkStatus();
}

// Shows what happens inside attention, computed beside it, and computes z anew where that was edited.
Status AttentionLayer::ShowSteps(size_t segment, ConstMatrix q, const std::vector<KeyRange>& ranges,
                                 const PassContext& ctx, Matrix z) const {
  const bool wants_pattern = ctx.Wants(HookPoint::kAttnPattern, segment);
  const bool wants_scores = ctx.Wants(HookPoint::kAttnScores, segment);
  const bool wants_cached =
      ctx.Wants(HookPoint::kAttnKeys, segment) || ctx.Wants(HookPoint::kAttnValues, segment);
  if (!wants_pattern && !wants_scores && !wants_cached) return absl::OkStatus();
  const Arena::Scope scope(*ctx.arena);
  const Segment& shown = ctx.batch->segments[segment];
  const int64_t end = shown.end;
  const int64_t kv_cols = spec_.num_kv_heads * spec_.head_dim;
  const Matrix keys = ctx.arena->NewMatrix(end, kv_cols);
  const Matrix values = ctx.arena->NewMatrix(end, kv_cols);
  const int64_t first = std::min(shown.cache->FirstPosition(ctx.layer), end);
  std::fill_n(keys.data, first * kv_cols, 0.0f);
  std::fill_n(values.data, first * kv_cols, 0.0f);
  shown.cache->Read(ctx.layer, first, end, keys.row(first), values.row(first));

  std::vector<int64_t> cached(static_cast<size_t>(end));
  std::iota(cached.begin(), cached.end(), 0);
  Site site;
  site.positions = cached;
  site.point = HookPoint::kAttnKeys;
  bool changed = ctx.VisitSegment(segment, site, keys);
  site.point = HookPoint::kAttnValues;
  changed |= ctx.VisitSegment(segment, site, values);
  if (!wants_pattern && !wants_scores && !changed) return ctx.hooks->status;

  const Matrix scores = ctx.arena->NewMatrix(spec_.num_heads * q.rows, end);
  AttentionScores(q, keys, spec_.head_dim, ranges.data(), scores);
  site.positions = std::span(ctx.batch->positions)
                       .subspan(static_cast<size_t>(shown.row), static_cast<size_t>(shown.rows));
  site.heads = spec_.num_heads;
  site.layer = ctx.layer;
  site.point = HookPoint::kAttnScores;
  if (ctx.VisitSegment(segment, site, scores)) {
    changed = true;
    GL_RETURN_IF_ERROR(ctx.hooks->status);
    GL_RETURN_IF_ERROR(CheckRanges(site, ranges, scores, -std::numeric_limits<float>::infinity()));
  }
  if (!wants_pattern && !changed) return ctx.hooks->status;
  const Matrix pattern = ctx.arena->NewMatrix(scores.rows, end);
  AttentionPattern(scores, q.rows, ranges.data(), pattern);
  site.point = HookPoint::kAttnPattern;
  if (ctx.VisitSegment(segment, site, pattern)) {
    changed = true;
    GL_RETURN_IF_ERROR(ctx.hooks->status);
    GL_RETURN_IF_ERROR(CheckRanges(site, ranges, pattern, 0.0f));
  }
  if (changed) AttentionOutput(pattern, values, spec_.head_dim, ranges.data(), z);
  return ctx.hooks->status;
}

Status AttentionLayer::Output(ConstMatrix z, const PassContext& ctx, Matrix out) const {
  GL_RETURN_IF_ERROR(AdaptedLinear(z, {{AdaptedModule::kOProj, &weights_.o_proj, out}}, ctx));
  if (ctx.Wants(HookPoint::kAttnResult)) {
    // What each head adds to the output: o_proj of z with the other heads zero.
    const Arena::Scope scope(*ctx.arena);
    PassContext unseen = ctx;  // what adapters add was shown above
    unseen.hooks = nullptr;
    const Matrix result = ctx.arena->NewMatrix(z.rows, spec_.num_heads * out.cols);
    const Matrix alone = ctx.arena->NewMatrix(z.rows, z.cols);
    for (int64_t head = 0; head < spec_.num_heads; ++head) {
      const int64_t begin = head * spec_.head_dim;
      for (int64_t row = 0; row < z.rows; ++row) {
        std::fill_n(alone.row(row), z.cols, 0.0f);
        std::copy_n(z.row(row) + begin, spec_.head_dim, alone.row(row) + begin);
      }
      const Matrix dst(result.data + head * out.cols, z.rows, out.cols, result.stride);
      GL_RETURN_IF_ERROR(
          AdaptedLinear(alone, {{AdaptedModule::kOProj, &weights_.o_proj, dst}}, unseen));
    }
    std::vector<uint8_t> changed(ctx.batch->segments.size(), 0);
    ctx.Visit(HookPoint::kAttnResult, result, changed);
    for (size_t i = 0; i < changed.size(); ++i) {
      const Segment& segment = ctx.batch->segments[i];
      for (int64_t row = segment.row; changed[i] != 0 && row < segment.row + segment.rows; ++row) {
        std::fill_n(out.row(row), out.cols, 0.0f);
        for (int64_t at = 0; at < result.cols; ++at) {
          out.row(row)[at % out.cols] += result.row(row)[at];
        }
      }
    }
  }
  ctx.Visit(HookPoint::kAttnOut, out);
  return absl::OkStatus();
}

}  // namespace gemloupe
