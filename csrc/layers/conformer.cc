#include "layers/conformer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "ops/audio_attention.h"
#include "ops/dispatch.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

// norm(x within ±clip).
void ClippedNorm(const Norm& norm, float clip, ConstMatrix x, Matrix dst) {
  if (clip < kUnbounded) {
    Clamp(x, -clip, clip, dst);
    x = dst;
  }
  norm.Forward(x, dst);
}

// Rows of x behind those that `state` holds.
Matrix WithRecent(const RecentRows& state, ConstMatrix x, Arena& arena) {
  const int64_t before = state.rows(x.cols);
  const Matrix all = arena.NewMatrix(before + x.rows, x.cols);
  state.CopyTo(all);
  CopyRows(x, all.RowRange(before, x.rows));
  return all;
}

// Weight outside a row's window would be attention that the tower does not have.
Status CheckWindow(const Site& site, int64_t window, ConstMatrix x, float nothing) {
  const int64_t before = x.cols - site.rows();
  for (int64_t row = 0; row < x.rows; ++row) {
    const int64_t last = before + row % site.rows();
    for (int64_t key = 0; key < x.cols; ++key) {
      if ((key > last - window && key <= last) || x.row(row)[key] == nothing) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("edit of ", HookName(site.point, site.layer), ": head ", row / site.rows(),
                       ", query ", last, " got ", x.row(row)[key], " for key ", key, ", expected ",
                       nothing, " outside the keys that it sees (",
                       std::max<int64_t>(0, last - window + 1), " to ", last, ")"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

void RecentRows::CopyTo(Matrix dst) const {
  for (int64_t row = 0; row < rows(dst.cols); ++row) {
    std::copy_n(values_.data() + row * dst.cols, dst.cols, dst.row(row));
  }
}

void RecentRows::Keep(ConstMatrix x, int64_t most) {
  const int64_t first = std::max<int64_t>(0, x.rows - most);
  values_.resize(static_cast<size_t>((x.rows - first) * x.cols));
  for (int64_t row = first; row < x.rows; ++row) {
    std::copy_n(x.row(row), x.cols, values_.data() + (row - first) * x.cols);
  }
}

Status AudioFeedForward::Forward(Matrix x, const PassContext& ctx) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix normed = ctx.arena->NewMatrix(x.rows, x.cols);
  const Matrix hidden = ctx.arena->NewMatrix(x.rows, up.weight.shape[0]);
  ClippedNorm(norm, clip, x, normed);
  ctx.Visit(points.norm, normed);
  GL_RETURN_IF_ERROR(gemloupe::Forward(normed, {{&up, hidden}}, ctx));
  SigmoidMul(hidden, hidden, hidden);
  ctx.Visit(points.hidden, hidden);
  GL_RETURN_IF_ERROR(gemloupe::Forward(hidden, {{&down, normed}}, ctx));
  ctx.Visit(points.out, normed);
  ClippedNorm(post_norm, clip, normed, normed);
  ctx.Visit(points.post, normed);
  AddScaled(normed, weight, x);
  return absl::OkStatus();
}

Status AudioAttentionLayer::Forward(Matrix x, const PassContext& ctx, State& state) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix normed = ctx.arena->NewMatrix(x.rows, x.cols);
  const Matrix q = ctx.arena->NewMatrix(x.rows, x.cols);
  const Matrix k = ctx.arena->NewMatrix(x.rows, x.cols);
  const Matrix v = ctx.arena->NewMatrix(x.rows, x.cols);
  ClippedNorm(norm, clip, x, normed);
  ctx.Visit(HookPoint::kAudioAttnNorm, normed);
  GL_RETURN_IF_ERROR(gemloupe::Forward(normed, {{&q_proj, q}, {&k_proj, k}, {&v_proj, v}}, ctx));
  ctx.Visit(HookPoint::kAudioAttnQProj, q);
  ctx.Visit(HookPoint::kAudioAttnKProj, k);
  const auto head_dim = static_cast<int64_t>(q_scale.size());
  for (int64_t row = 0; row < q.rows; ++row) {
    for (int64_t begin = 0; begin < q.cols; begin += head_dim) {
      Kernels().mul(q.row(row) + begin, q.row(row) + begin, q_scale.data(), head_dim);
    }
  }
  Scale(k, k_scale, k);
  ctx.Visit(HookPoint::kAudioAttnQ, q);
  ctx.Visit(HookPoint::kAudioAttnK, k);
  ctx.Visit(HookPoint::kAudioAttnV, v);
  const Matrix keys = WithRecent(state.keys, k, *ctx.arena);
  const Matrix values = WithRecent(state.values, v, *ctx.arena);
  GL_RETURN_IF_ERROR(Attend(q, keys, values, ctx, normed));
  ctx.Visit(HookPoint::kAudioAttnZ, normed);
  GL_RETURN_IF_ERROR(gemloupe::Forward(normed, {{&post, q}}, ctx));
  ctx.Visit(HookPoint::kAudioAttnOut, q);
  ClippedNorm(post_norm, clip, q, q);
  ctx.Visit(HookPoint::kAudioAttnPost, q);
  Add(x, q, x);
  state.keys.Keep(keys, window - 1);
  state.values.Keep(values, window - 1);
  return absl::OkStatus();
}

Status AudioAttentionLayer::ProjectDistances(const PassContext& ctx, Matrix dst) const {
  const AdaptedJob job = {AdaptedModule::kAudioRelativeKProj, &relative_k_proj, dst};
  return AdaptedLinear(ConstMatrix(sinusoids->data(), dst.rows, dst.cols), {&job, 1},
                       {.row_exact = true}, ctx);
}

Status AudioAttentionLayer::Attend(ConstMatrix q, ConstMatrix keys, ConstMatrix values,
                                   const PassContext& ctx, Matrix z) const {
  const Arena::Scope distances_scope(*ctx.arena);
  AudioAttentionShape shape = {.head_dim = static_cast<int64_t>(q_scale.size()),
                               .window = window,
                               .softcap = softcap,
                               .distances = ConstMatrix(distances.data(), window, q.cols)};
  if (ctx.Adapts(AdaptedModule::kAudioRelativeKProj)) {
    const Matrix adapted = ctx.arena->NewMatrix(window, q.cols);
    GL_RETURN_IF_ERROR(ProjectDistances(ctx, adapted));
    shape.distances = adapted;
  }
  AudioAttention(shape, q, keys, values, z);
  if (!ctx.Wants(HookPoint::kAudioAttnScores) && !ctx.Wants(HookPoint::kAudioAttnPattern)) {
    return absl::OkStatus();
  }
  const Arena::Scope scope(*ctx.arena);
  const Matrix scores = ctx.arena->NewMatrix(num_heads * q.rows, keys.rows);
  const Matrix pattern = ctx.arena->NewMatrix(scores.rows, scores.cols);
  AudioAttentionScores(shape, q, keys, scores);
  Site site;
  site.positions = ctx.batch->positions;
  site.heads = num_heads;
  site.layer = ctx.layer;
  site.point = HookPoint::kAudioAttnScores;
  bool changed = ctx.VisitSegment(0, site, scores);
  GL_RETURN_IF_ERROR(ctx.hooks->status);
  if (changed) {
    const float nothing = -std::numeric_limits<float>::infinity();
    GL_RETURN_IF_ERROR(CheckWindow(site, window, scores, nothing));
  }
  AudioAttentionPattern(scores, pattern);
  site.point = HookPoint::kAudioAttnPattern;
  if (ctx.VisitSegment(0, site, pattern)) {
    changed = true;
    GL_RETURN_IF_ERROR(ctx.hooks->status);
    GL_RETURN_IF_ERROR(CheckWindow(site, window, pattern, 0.0f));
  }
  if (changed) AudioAttentionOutput(shape, pattern, values, z);
  return ctx.hooks->status;
}

Status LightConvolution::Forward(Matrix x, const PassContext& ctx, RecentRows& state) const {
  const Arena::Scope scope(*ctx.arena);
  const int64_t cols = x.cols;
  const Matrix normed = ctx.arena->NewMatrix(x.rows, cols);
  const Matrix both = ctx.arena->NewMatrix(x.rows, 2 * cols);
  norm.Forward(x, normed);
  ctx.Visit(HookPoint::kAudioConvNorm, normed);
  GL_RETURN_IF_ERROR(gemloupe::Forward(normed, {{&start, both}}, ctx));
  SigmoidMul(ConstMatrix(both.data, x.rows, cols, both.stride),
             ConstMatrix(both.data + cols, x.rows, cols, both.stride), normed);
  ctx.Visit(HookPoint::kAudioConvGated, normed);
  const Matrix all = WithRecent(state, normed, *ctx.arena);
  const auto kernel = static_cast<int64_t>(taps.size()) / cols;
  const int64_t before = all.rows - x.rows;
  ForRows(x.rows, kernel * cols * static_cast<int64_t>(sizeof(float)),
          [&](int64_t begin, int64_t end) {
            std::vector<float> product(static_cast<size_t>(cols));
            for (int64_t row = begin; row < end; ++row) {
              float* out = normed.row(row);
              std::fill_n(out, cols, 0.0f);
              for (int64_t tap = 0; tap < kernel; ++tap) {
                const int64_t from = before + row - (kernel - 1) + tap;
                if (from < 0) continue;
                Kernels().mul(product.data(), all.row(from), taps.data() + tap * cols, cols);
                Kernels().add(out, out, product.data(), cols);
              }
            }
          });
  ClippedNorm(conv_norm, clip, normed, normed);
  SigmoidMul(normed, normed, normed);
  ctx.Visit(HookPoint::kAudioConvHidden, normed);
  const Matrix out(both.data, x.rows, cols);
  GL_RETURN_IF_ERROR(gemloupe::Forward(normed, {{&end, out}}, ctx));
  ctx.Visit(HookPoint::kAudioConvOut, out);
  Add(x, out, x);
  state.Keep(all, kernel - 1);
  return absl::OkStatus();
}

}  // namespace gemloupe
