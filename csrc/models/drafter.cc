#include "models/drafter.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/thread_pool.h"
#include "kernels/kernel_table.h"
#include "models/weight_names.h"
#include "ops/rope.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

Status Mismatch(const char* field, int64_t got, int64_t expected, const char* of) {
  return absl::InvalidArgumentError(
      absl::StrCat("drafter: ", field, " is ", got, ", expected ", expected, " (", of, ")"));
}

// The last layer of this kind that stores keys and values, −1 if there is none.
int LastStoring(const TextConfig& target, const std::string& kind) {
  for (auto i = static_cast<int>(target.layers.size()) - 1; i >= 0; --i) {
    const LayerConfig& layer = target.layers[static_cast<size_t>(i)];
    if (layer.kind == kind && layer.kv_source == i) return i;
  }
  return -1;
}

// The layers read keys of `target`, so their heads must be alike.
StatusOr<std::vector<int>> MatchLayers(const TextConfig& drafter, const TextConfig& target) {
  std::vector<int> sources;
  for (size_t i = 0; i < drafter.layers.size(); ++i) {
    const LayerConfig& layer = drafter.layers[i];
    const int source = LastStoring(target, layer.kind);
    if (source < 0) {
      return absl::InvalidArgumentError(absl::StrCat("drafter: layer ", i, " is a ", layer.kind,
                                                     " layer, of which the target has none"));
    }
    const LayerConfig& read = target.layers[static_cast<size_t>(source)];
    if (layer.head_dim != read.head_dim) {
      return Mismatch("head_dim", layer.head_dim, read.head_dim, "the target's");
    }
    if (layer.num_kv_heads != read.num_kv_heads) {
      return Mismatch("num_key_value_heads", layer.num_kv_heads, read.num_kv_heads, "the target's");
    }
    sources.push_back(source);
  }
  return sources;
}

Status CheckClusters(const DrafterConfig& config) {
  if (config.num_clusters == 0) return absl::OkStatus();
  const int64_t vocab = config.text.vocab_size;
  if (config.num_clusters < 0 || vocab % config.num_clusters != 0 || config.centroid_top_k < 1 ||
      config.centroid_top_k > config.num_clusters) {
    return absl::InvalidArgumentError(absl::StrCat(
        "drafter: ", config.centroid_top_k, " of ", config.num_clusters, " clusters of ", vocab,
        " tokens; expected clusters of one size, and at least one of them to be chosen"));
  }
  if (static_cast<int64_t>(config.cluster_tokens.size()) != vocab) {
    return Mismatch("length of token_ordering", static_cast<int64_t>(config.cluster_tokens.size()),
                    vocab, "vocab_size");
  }
  for (const int32_t id : config.cluster_tokens) {
    if (id < 0 || id >= vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("drafter: token_ordering holds ", id, ", expected 0 to ", vocab - 1));
    }
  }
  return absl::OkStatus();
}

int32_t Largest(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (x[i] > x[best]) best = i;
  }
  return static_cast<int32_t>(best);
}

}  // namespace

StatusOr<std::unique_ptr<Drafter>> Drafter::Load(const DrafterConfig& config,
                                                 const TextModel& target, WeightStore weights,
                                                 const ProgressFn& progress) {
  GL_RETURN_IF_ERROR(CheckConfig(config.text));
  GL_RETURN_IF_ERROR(CheckClusters(config));
  const TextConfig& of_target = target.config();
  if (config.backbone_hidden_size != of_target.hidden_size) {
    return Mismatch("backbone_hidden_size", config.backbone_hidden_size, of_target.hidden_size,
                    "hidden_size of the target");
  }
  if (config.text.vocab_size != of_target.vocab_size) {
    return Mismatch("vocab_size", config.text.vocab_size, of_target.vocab_size, "the target's");
  }
  if (config.text.hidden_size_per_layer_input != 0 || config.text.num_experts != 0) {
    return absl::InvalidArgumentError(
        "drafter: it has per-layer inputs or experts, expected neither");
  }
  std::unique_ptr<Drafter> drafter(new Drafter());
  drafter->config_ = config;
  drafter->target_id_ = target.id();
  GL_ASSIGN_OR_RETURN(drafter->kv_layers_, MatchLayers(config.text, of_target));
  for (const RopeSpec& rope : DistinctRopes(config.text)) {
    drafter->inv_freqs_.push_back(InverseFrequencies(rope));
  }

  const ThreadPool::Pass pass(target.threads());  // converting weights uses every thread
  drafter->weights_ = std::move(weights);
  WeightStore& store = drafter->weights_;
  store.SetProgress(progress);
  const int64_t hidden = config.text.hidden_size;
  const int64_t backbone = config.backbone_hidden_size;
  const auto eps = static_cast<float>(config.text.rms_norm_eps);
  GL_ASSIGN_OR_RETURN(drafter->embed_tokens_,
                      store.Take(names::kEmbedTokens, {config.text.vocab_size, hidden}));
  GL_ASSIGN_OR_RETURN(drafter->pre_projection_,
                      store.Take(names::kDrafterPreProjection, {hidden, 2 * backbone}));
  GL_ASSIGN_OR_RETURN(drafter->post_projection_,
                      store.Take(names::kDrafterPostProjection, {backbone, hidden}));
  GL_ASSIGN_OR_RETURN(std::vector<float> norm, store.TakeFloats(names::kFinalNorm, hidden));
  drafter->final_norm_ = Norm(std::move(norm), eps);
  if (config.num_clusters > 0) {
    GL_ASSIGN_OR_RETURN(drafter->centroids_,
                        store.Take(names::kDrafterCentroids, {config.num_clusters, hidden}));
  }
  std::vector<LayerSpec> specs = MakeLayerSpecs(config.text);
  for (int i = 0; i < static_cast<int>(specs.size()); ++i) {
    LayerSpec& spec = specs[static_cast<size_t>(i)];
    spec.shares_kv = true;
    spec.behind_cache = true;
    GL_ASSIGN_OR_RETURN(DecoderLayer layer,
                        DecoderLayer::Load(config.text, spec, i, nullptr, store));
    drafter->layers_.push_back(std::move(layer));
  }
  if (progress) progress(1.0);
  store.SetProgress(nullptr);
  return drafter;
}

Status Drafter::Draft(TextModel& target, std::span<const Row> rows, int64_t count,
                      std::vector<int32_t>& drafts) {
  const auto num_rows = static_cast<int64_t>(rows.size());
  GL_CHECK(num_rows <= kMaxKernelRows && target.id() == target_id_);
  drafts.resize(static_cast<size_t>(num_rows * count));
  const ThreadPool::Pass pass(target.threads());
  const Arena::Scope scope(arena_);
  const int64_t backbone = config_.backbone_hidden_size;
  std::vector<int32_t> tokens;
  Batch batch;
  for (const Row& row : rows) {
    tokens.push_back(row.token);
    batch.Append(row.cache, &row.token, 1);  // all drafts have the position of this token
  }
  PassContext ctx;
  ctx.arena = &arena_;
  ctx.batch = &batch;
  ctx.path = {.row_exact = true};
  for (const std::vector<float>& inv_freq : inv_freqs_) {
    ctx.angles.push_back(ComputeRopeAngles(inv_freq, batch.positions, arena_));
  }
  // The token's embedding in the target, then the hidden vector.
  const Matrix input = arena_.NewMatrix(num_rows, 2 * backbone);
  const Matrix hidden(input.data + backbone, num_rows, backbone, input.stride);
  for (int64_t i = 0; i < num_rows; ++i) {
    std::copy_n(rows[static_cast<size_t>(i)].hidden, backbone, hidden.row(i));
  }
  const Matrix resid = arena_.NewMatrix(num_rows, config_.text.hidden_size);
  for (int64_t step = 0; step < count; ++step) {
    const Arena::Scope of_step(arena_);
    target.Embed(tokens, Matrix(input.data, num_rows, backbone, input.stride));
    GL_RETURN_IF_ERROR(Linear(input, {{&pre_projection_, resid}}, ctx.path, arena_));
    for (size_t i = 0; i < layers_.size(); ++i) {
      ctx.layer = kv_layers_[i];
      GL_RETURN_IF_ERROR(layers_[i].Forward(resid, Matrix(), ctx));
    }
    final_norm_.Forward(resid, resid);
    GL_RETURN_IF_ERROR(Choose(resid, ctx.path, tokens));
    for (int64_t i = 0; i < num_rows; ++i) {
      drafts[static_cast<size_t>(i * count + step)] = tokens[static_cast<size_t>(i)];
    }
    if (step + 1 < count) {
      GL_RETURN_IF_ERROR(Linear(resid, {{&post_projection_, hidden}}, ctx.path, arena_));
    }
  }
  return absl::OkStatus();
}

Status Drafter::Choose(ConstMatrix y, const MatmulPath& path, std::vector<int32_t>& tokens) {
  if (config_.num_clusters > 0) return ChooseAmongClusters(y, path, tokens);
  const Matrix logits = arena_.NewMatrix(y.rows, config_.text.vocab_size);
  GL_RETURN_IF_ERROR(Linear(y, {{&embed_tokens_, logits}}, path, arena_));
  for (int64_t i = 0; i < y.rows; ++i) {
    tokens[static_cast<size_t>(i)] = Largest(logits.row(i), logits.cols);
  }
  return absl::OkStatus();
}

// Only the tokens of the clusters whose centroids are nearest have logits.
Status Drafter::ChooseAmongClusters(ConstMatrix y, const MatmulPath& path,
                                    std::vector<int32_t>& tokens) {
  const int64_t clusters = config_.num_clusters;
  const int64_t size = config_.text.vocab_size / clusters;
  const int64_t chosen = config_.centroid_top_k;
  const Matrix nearness = arena_.NewMatrix(y.rows, clusters);
  GL_RETURN_IF_ERROR(Linear(y, {{&centroids_, nearness}}, path, arena_));
  std::vector<int32_t> order(static_cast<size_t>(clusters));
  std::vector<int32_t> ids(static_cast<size_t>(chosen * size));
  const Matrix candidates = arena_.NewMatrix(chosen * size, y.cols);
  const Matrix logits = arena_.NewMatrix(1, candidates.rows);
  for (int64_t i = 0; i < y.rows; ++i) {
    const float* near = nearness.row(i);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(
        order.begin(), order.begin() + chosen, order.end(),
        [near](int32_t a, int32_t b) { return near[a] != near[b] ? near[a] > near[b] : a < b; });
    for (int64_t at = 0; at < chosen; ++at) {
      std::copy_n(config_.cluster_tokens.data() + order[static_cast<size_t>(at)] * size, size,
                  ids.data() + at * size);
    }
    std::sort(ids.begin(), ids.end());  // equal logits: the lowest id, as among all tokens
    GatherRows(embed_tokens_, ids.data(), 0, 1.0f, candidates);
    const TensorView rows = {candidates.data, DType::kFloat32, {candidates.rows, candidates.cols}};
    GL_RETURN_IF_ERROR(Linear(y.RowRange(i, 1), {{&rows, logits}}, path, arena_));
    tokens[static_cast<size_t>(i)] =
        ids[static_cast<size_t>(Largest(logits.data, candidates.rows))];
  }
  return absl::OkStatus();
}

}  // namespace gemloupe
