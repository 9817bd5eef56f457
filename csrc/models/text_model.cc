#include "models/text_model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/function_ref.h"
#include "base/thread_pool.h"
#include "models/adapter.h"
#include "models/weight_names.h"
#include "ops/dispatch.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

// Scratch that a model keeps between passes: what a chunk of the default size takes, so that the next
// one finds its pages; a longer prefill's goes back to the system.
constexpr size_t kKeptScratch = size_t{256} << 20;

// Rows of logits that are held at once where not all are given: 64 MiB at the family's vocabulary.
constexpr int64_t kLogitsBlock = 64;

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

// Rows of embeddings at which soft tokens stand become these.
void MergeSoftTokens(const Batch& batch, Matrix embed) {
  for (size_t row = 0; row < batch.soft_tokens.size(); ++row) {
    if (batch.soft_tokens[row] == nullptr) continue;
    std::copy_n(batch.soft_tokens[row], embed.cols, embed.row(static_cast<int64_t>(row)));
  }
}

// The logits rows of a pass, which compute(begin, dst) gives `block_rows` at a time.
struct LogitsBlocks {
  int64_t count = 0;
  int64_t block_rows = 0;
  int64_t vocab = 0;
  FunctionRef<Status(int64_t begin, Matrix dst)> compute;
};

Status ReadLogits(const LogitsReading& reading, const LogitsBlocks& blocks, Arena& arena,
                  std::vector<float>& logits) {
  const bool all = reading.vocab.empty();
  const int64_t cols = all ? blocks.vocab : static_cast<int64_t>(reading.vocab.size());
  logits.resize(static_cast<size_t>((reading.given_end - reading.given_begin) * cols));
  if (!reading.targets.empty()) reading.scores->resize(reading.targets.size());
  const Matrix block = arena.NewMatrix(blocks.block_rows, blocks.vocab);
  for (int64_t begin = 0; begin < blocks.count; begin += block.rows) {
    const Matrix rows = block.RowRange(0, std::min(block.rows, blocks.count - begin));
    GL_RETURN_IF_ERROR(blocks.compute(begin, rows));
    const int64_t end = std::min(begin + rows.rows, reading.given_end);
    for (int64_t row = std::max(begin, reading.given_begin); row < end; ++row) {
      const float* src = rows.row(row - begin);
      float* dst = logits.data() + (row - reading.given_begin) * cols;
      if (all) std::copy_n(src, cols, dst);
      for (const int32_t id : reading.vocab) *dst++ = src[id];
    }
    if (reading.targets.empty()) continue;
    ScoreTokens(rows, reading.targets.data() + begin, reading.scores->data() + begin);
  }
  return absl::OkStatus();
}

// Marks this thread as the one that runs a pass, until the pass ends or throws (std::bad_alloc).
class Driving {
 public:
  explicit Driving(std::atomic<std::thread::id>& thread) : thread_(thread) {
    thread_.store(std::this_thread::get_id());
  }
  Driving(const Driving&) = delete;
  ~Driving() { thread_.store({}); }

 private:
  std::atomic<std::thread::id>& thread_;
};

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
  const ThreadPool::Pass pass(model->threads());  // converting weights uses every thread
  model->weights_.SetProgress(progress);
  GL_RETURN_IF_ERROR(model->Build());
  if (progress) progress(1.0);
  model->weights_.SetProgress(nullptr);
  return model;
}

StatusOr<std::shared_ptr<TextModel>> TextModel::Override(std::shared_ptr<TextModel> base,
                                                         const NewWeights& weights, DType dtype) {
  if (!base->merged_.empty() || base->experts_ != nullptr) {
    return absl::FailedPreconditionError(
        base->experts_ != nullptr
            ? "override: this model's experts are read from disk on demand (max_memory); load it "
              "without max_memory"
            : "override: an adapter is merged into the weights; unmerge_adapter first");
  }
  uint64_t bytes = 0;
  for (const auto& [name, values] : weights) bytes += TensorBytes(dtype, values.shape);
  if (const uint64_t available = AvailableMemory(); bytes > available) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "override: the weights take %.2f GiB in %s, but %.2f GiB of memory is available; override "
        "fewer of them, or hold them in bfloat16 (dtype=)",
        static_cast<double>(bytes) / (1 << 30), DTypeName(dtype),
        static_cast<double>(available) / (1 << 30)));
  }
  std::shared_ptr<TextModel> model(new TextModel());
  model->id_ = base->id_;
  model->config_ = base->config_;
  model->options_ = base->options_;
  model->driving_ = base->driving_;
  model->weights_ = base->weights_.Borrow();
  model->base_ = std::move(base);
  for (const auto& [name, values] : weights) {
    GL_RETURN_IF_ERROR(model->weights_.Replace(name, values, dtype));
  }
  const ThreadPool::Pass pass(model->threads());
  GL_RETURN_IF_ERROR(model->Build());
  return model;
}

Status TextModel::Build() {
  kv_layers_ = MakeKvLayerSpecs(config_);
  first_sharing_layer_ = FirstSharingLayer(config_);
  for (const RopeSpec& rope : DistinctRopes(config_)) {
    inv_freqs_.push_back(InverseFrequencies(rope));
    for (const float frequency : inv_freqs_.back()) {
      if (!std::isfinite(frequency)) {
        return absl::InvalidArgumentError(absl::StrCat("config: rope_theta ", rope.theta,
                                                       " with factor ", rope.factor,
                                                       " gives no finite frequencies"));
      }
    }
  }
  embed_scale_ = SqrtScale(config_.hidden_size, options_.round_embed_scale);
  per_layer_scale_ = SqrtScale(config_.hidden_size_per_layer_input, options_.round_embed_scale);

  const auto eps = static_cast<float>(config_.rms_norm_eps);
  GL_ASSIGN_OR_RETURN(
      embed_tokens_, weights_.Take(names::kEmbedTokens, {config_.vocab_size, config_.hidden_size}));
  GL_ASSIGN_OR_RETURN(std::vector<float> norm,
                      weights_.TakeFloats(names::kFinalNorm, config_.hidden_size));
  final_norm_ = Norm(std::move(norm), eps);
  if (const int64_t width = config_.hidden_size_per_layer_input; width > 0) {
    const int64_t all = config_.num_hidden_layers * width;
    GL_ASSIGN_OR_RETURN(
        embed_tokens_per_layer_,
        weights_.TakeTable(names::kEmbedTokensPerLayer, {config_.vocab_size_per_layer_input, all}));
    GL_ASSIGN_OR_RETURN(per_layer_model_projection_,
                        weights_.Take(names::kPerLayerModelProjection, {all, config_.hidden_size}));
    GL_ASSIGN_OR_RETURN(std::vector<float> projection_norm,
                        weights_.TakeFloats(names::kPerLayerProjectionNorm, width));
    per_layer_projection_norm_ = Norm(std::move(projection_norm), eps);
  }
  if (options_.expert_memory > 0) experts_ = std::make_shared<ExpertCache>(options_.expert_memory);
  const std::vector<LayerSpec> specs = MakeLayerSpecs(config_);
  for (int i = 0; i < static_cast<int>(specs.size()); ++i) {
    GL_ASSIGN_OR_RETURN(
        DecoderLayer layer,
        DecoderLayer::Load(config_, specs[static_cast<size_t>(i)], i, experts_, weights_));
    kv_layers_[static_cast<size_t>(i)].key_weight = layer.key_weight();
    layers_.push_back(std::move(layer));
  }
  return absl::OkStatus();
}

int TextModel::threads() const { return options_.threads > 0 ? options_.threads : AvailableCpus(); }

Status TextModel::Forward(const PassRequest& request, std::vector<float>& logits) {
  GL_RETURN_IF_ERROR(CheckIds(config_, request.batch.ids));
  for (const AdapterMix& mix : request.adapters) {
    for (const WeightedAdapter& one : mix) {
      if (one.adapter->fits().load(std::memory_order_relaxed) == id_) continue;
      GL_RETURN_IF_ERROR(CheckAdapter(config_, *one.adapter));
      one.adapter->fits().store(id_, std::memory_order_relaxed);
    }
  }
  if (driving_->load() == std::this_thread::get_id()) {
    return absl::FailedPreconditionError(
        "this model is running a pass that called this edit function; call it after the pass, or "
        "load another model");
  }
  const ThreadPool::Pass pass(threads());
  const Driving driving(*driving_);
  for (const Segment& segment : request.batch.segments) segment.cache->Reserve(segment.rows);
  PassHooks hooks;
  hooks.of_segment = request.hooks;
  const bool hooked = std::any_of(request.hooks.begin(), request.hooks.end(),
                                  [](const Hooks* of) { return of != nullptr && !of->empty(); });
  const auto each_hook = [&](auto fn) {
    for (Hooks* of : request.hooks) {
      if (of != nullptr) fn(*of);
    }
  };
  const bool adapted = std::any_of(request.adapters.begin(), request.adapters.end(),
                                   [](const AdapterMix& mix) { return !mix.empty(); });
  each_hook([&](Hooks& of) { of.BeginPass(request.row_exact); });
  Status status;
  {
    const Arena::Scope scope(arena_);
    PassContext ctx;
    ctx.arena = &arena_;
    ctx.hooks = hooked ? &hooks : nullptr;
    ctx.adapters = adapted ? &request.adapters : nullptr;
    ctx.merged = merged_.empty() ? nullptr : &merged_;
    ctx.path = {.row_exact = request.row_exact || options_.invariant,
                .bfloat16 = options_.bfloat16_matmul,
                .float32_activations = options_.float32_activations};
    status = RunLayers(request, ctx, logits);
    status.Update(hooks.status);
  }
  arena_.ShrinkTo(kKeptScratch);
  each_hook([&](Hooks& of) { of.EndPass(status.ok()); });
  if (!status.ok()) return status;
  if (request.keep_length) return status;
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

// Layers [begin, end) whose per-layer inputs are computed in one product.
struct TextModel::InputLayers {
  int begin = 0;
  int end = 0;
  int64_t tail_rows = 0;
};

// Which rows each layer computes. Before the last layer that stores keys and values, all of them.
// From there on a row matters to itself alone, so only those go on whose logits are wanted or that
// someone looks at.
struct TextModel::Rows {
  int last_storing = 0;
  int end = 0;              // the pass ends before this layer
  bool wants_head = false;  // the final norm and the logits are computed
  // The first layer that computes fewer rows than the pass has: last_storing (which then only stores
  // the keys and values of the others), a later one, or `end`.
  int first_reduced = 0;
  // Of the rows that are computed anyway, those at the end that no hook has brought in: they are
  // computed as without hooks.
  int64_t tail_rows = 0;
  bool reduces = false;
  const PassRequest* request = nullptr;
  int num_layers = 0;

  Rows(const PassRequest& pass, int first_sharing_layer, int layers)
      : last_storing(first_sharing_layer - 1), request(&pass), num_layers(layers) {
    int last_hooked = -1;
    bool hooked_here = false;
    bool hooks_inputs = false;  // of all layers, which are shown in one piece
    for (const Hooks* of : pass.hooks) {
      if (of == nullptr) continue;
      last_hooked = std::max(last_hooked, of->LastLayer(layers));
      hooked_here |= of->HasLayer(last_storing);
      hooks_inputs |= of->HasInputs();
    }
    wants_head = !pass.logits_rows.empty() || last_hooked == layers;
    // Without logits the pass ends after the last layer that stores keys or shows something.
    end = wants_head ? layers : std::max(first_sharing_layer, last_hooked + 1);
    const Batch& batch = pass.batch;
    const bool only_last =
        batch.rows() > static_cast<int64_t>(batch.segments.size()) &&
        (pass.logits_rows.empty() ||
         (pass.logits_rows.size() == batch.segments.size() &&
          std::equal(pass.logits_rows.begin(), pass.logits_rows.end(), batch.segments.begin(),
                     [](int64_t row, const Segment& segment) {
                       return row == segment.row + segment.rows - 1;
                     })));
    reduces = only_last;
    first_reduced = !reduces || hooks_inputs ? end : hooked_here ? last_storing + 1 : last_storing;
    if (reduces && batch.segments.size() == 1) {
      tail_rows = static_cast<int64_t>(pass.logits_rows.size());
    }
  }

  // The rows of the pass that `layer`, at first_reduced or later, computes.
  std::vector<int64_t> Of(int layer) const {
    const Batch& batch = request->batch;
    std::vector<int64_t> rows;
    auto wanted = request->logits_rows.begin();
    for (size_t i = 0; i < batch.segments.size(); ++i) {
      const Hooks* of = request->hooks.empty() ? nullptr : request->hooks[i];
      const Segment& segment = batch.segments[i];
      for (int64_t row = segment.row; row < segment.row + segment.rows; ++row) {
        const bool logits = wanted != request->logits_rows.end() && *wanted == row;
        if (logits) ++wanted;
        const int64_t position = batch.positions[static_cast<size_t>(row)];
        if (logits || (of != nullptr && of->Needs(position, layer, num_layers))) {
          rows.push_back(row);
        }
      }
    }
    return rows;
  }
};

Status TextModel::RunLayers(const PassRequest& request, PassContext& ctx,
                            std::vector<float>& logits) {
  const auto num_layers = static_cast<int>(layers_.size());
  const Rows plan(request, first_sharing_layer_, num_layers);
  logits.clear();

  SetBatch(request.batch, ctx);
  Matrix resid = arena_.NewMatrix(ctx.rows(), config_.hidden_size);
  const TensorView& table =
      merged_.Of(AdaptedModule::kEmbedTokens, -1, embed_tokens_);  // the head has its own
  GatherRows(table, request.batch.table_ids().data(), 0, embed_scale_, resid);
  AdaptEmbedding(AdaptedModule::kEmbedTokens, 0, embed_scale_, ctx, resid);
  MergeSoftTokens(request.batch, resid);
  if (request.first_layer == 0) ctx.Visit(HookPoint::kEmbed, resid);
  const int64_t width = config_.hidden_size_per_layer_input;
  const Matrix embed = resid.rows > 0 && width > 0 && plan.first_reduced < plan.end
                           ? arena_.NewMatrix(resid.rows, resid.cols)
                           : Matrix();
  if (embed.data != nullptr) CopyRows(resid, embed);
  Matrix inputs;  // per-layer inputs of layers [first_input, …)
  const int first = request.first_layer;
  int first_input = first;
  const int whole = std::min(plan.first_reduced, plan.end);  // layers before it see all rows
  if (width > 0 && first < whole) {
    // Layers that a pass without hooks computes for its tail, or not at all, have their own product.
    const int split = plan.reduces ? std::clamp(plan.last_storing, first, whole) : whole;
    const std::vector<InputLayers> parts = {{first, split, 0}, {split, whole, plan.tail_rows}};
    inputs = arena_.NewMatrix(resid.rows, (whole - first) * width);
    GL_RETURN_IF_ERROR(PerLayerInputs(resid, parts, ctx, inputs));
  }
  if (request.resid_pre.rows > 0) CopyRows(request.resid_pre, resid);
  Batch batch;                                             // the rows that go on
  std::vector<int64_t> held;                               // their numbers in the pass
  std::vector<int64_t> logits_rows = request.logits_rows;  // their numbers among those that go on
  bool reduced = false;
  for (int i = first; i < plan.end; ++i) {
    if (request.stopped && request.stopped()) return absl::CancelledError("interrupted");
    if (ctx.hooks != nullptr) GL_RETURN_IF_ERROR(ctx.hooks->status);
    ctx.layer = i;
    ctx.kv_stored = plan.reduces && i == plan.first_reduced && i == plan.last_storing;
    ctx.kv_apart = plan.reduces && i == plan.last_storing;
    ctx.path.tail_rows = i >= plan.last_storing ? plan.tail_rows : 0;
    if (ctx.kv_stored) {
      GL_RETURN_IF_ERROR(layers_[static_cast<size_t>(i)].StoreKeysAndValues(resid, ctx));
    }
    if (plan.reduces && i >= plan.first_reduced) {
      const std::vector<int64_t> rows = plan.Of(i);
      if (rows.empty()) break;
      if (!reduced || rows.size() < held.size()) {
        // Numbers among the rows held so far.
        std::vector<int64_t> among = rows;
        if (!held.empty()) {
          for (int64_t& row : among) {
            row = std::lower_bound(held.begin(), held.end(), row) - held.begin();
          }
        }
        const auto select = [&](ConstMatrix src) {
          const Matrix kept = arena_.NewMatrix(static_cast<int64_t>(among.size()), src.cols);
          for (size_t row = 0; row < among.size(); ++row) {
            CopyRows(src.RowRange(among[row], 1), kept.RowRange(static_cast<int64_t>(row), 1));
          }
          return kept;
        };
        resid = select(resid);
        batch = request.batch.Select(rows);
        SetBatch(batch, ctx);
        for (size_t row = 0; row < logits_rows.size(); ++row) {
          logits_rows[row] =
              std::lower_bound(rows.begin(), rows.end(), request.logits_rows[row]) - rows.begin();
        }
        if (width > 0 && !reduced) {
          inputs = arena_.NewMatrix(resid.rows, (plan.end - i) * width);
          const InputLayers part = {i, plan.end, plan.tail_rows};
          GL_RETURN_IF_ERROR(PerLayerInputs(select(embed), {&part, 1}, ctx, inputs));
          first_input = i;
        } else if (width > 0) {
          inputs = select(inputs);
        }
        held = rows;
        reduced = true;
      }
    }
    const Matrix input(inputs.data + (i - first_input) * width, inputs.rows, width, inputs.stride);
    GL_RETURN_IF_ERROR(layers_[static_cast<size_t>(i)].Forward(resid, input, ctx));
  }
  ctx.layer = -1;
  ctx.kv_stored = false;
  if (!plan.wants_head) return absl::OkStatus();
  return Head(resid, logits_rows, request, ctx, logits);
}

// (norm(projection(embed) / √D) + √P · table[ids]) / √2 for the layers of `parts`, which follow each
// other: inputs [T, layers · P].
Status TextModel::PerLayerInputs(ConstMatrix embed, std::span<const InputLayers> parts,
                                 const PassContext& ctx, Matrix inputs) const {
  const int64_t width = config_.hidden_size_per_layer_input;
  const int first = parts.front().begin;
  const Arena::Scope scope(*ctx.arena);
  for (const InputLayers& part : parts) {
    if (part.begin == part.end) continue;
    MatmulPath path = ctx.path;
    path.tail_rows = part.tail_rows;
    const int64_t cols = (part.end - part.begin) * width;
    const Matrix dst(inputs.data + (part.begin - first) * width, inputs.rows, cols, inputs.stride);
    // oneDNN's bits depend on the distance of its rows: a product has its own, whatever follows it.
    const Matrix alone = cols == inputs.stride ? dst : ctx.arena->NewMatrix(inputs.rows, cols);
    const AdaptedJob job = {AdaptedModule::kPerLayerModelProjection, &per_layer_model_projection_,
                            alone, part.begin * width};
    GL_RETURN_IF_ERROR(AdaptedLinear(embed, {&job, 1}, path, ctx));
    if (alone.data != dst.data) CopyRows(alone, dst);
  }
  // Hooks see the inputs of all layers in one piece.
  const bool shown =
      parts.front().begin == 0 && parts.back().end == static_cast<int>(layers_.size());
  const auto visit = [&](HookPoint point, Matrix x) {
    if (shown) ctx.Visit(point, x);
  };
  const auto root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config_.hidden_size)));
  Scale(inputs, root, inputs);
  if (shown) {
    per_layer_projection_norm_.Forward(inputs, HookPoint::kPerLayerContextScale, ctx, inputs);
  } else {
    per_layer_projection_norm_.Forward(inputs, inputs);
  }
  visit(HookPoint::kPerLayerContext, inputs);
  const Matrix token = ctx.arena->NewMatrix(embed.rows, inputs.cols);
  GL_RETURN_IF_ERROR(embed_tokens_per_layer_.Gather(ctx.batch->table_ids().data(), first * width,
                                                    per_layer_scale_, token));
  AdaptEmbedding(AdaptedModule::kEmbedTokensPerLayer, first * width, per_layer_scale_, ctx, token);
  visit(HookPoint::kPerLayerToken, token);
  Add(inputs, token, inputs);
  Scale(inputs, static_cast<float>(1.0 / std::sqrt(2.0)), inputs);
  visit(HookPoint::kPerLayerInputs, inputs);
  return absl::OkStatus();
}

Status TextModel::Head(ConstMatrix resid, const std::vector<int64_t>& rows,
                       const PassRequest& request, PassContext& ctx,
                       std::vector<float>& logits) const {
  const Arena::Scope scope(*ctx.arena);
  const auto count = static_cast<int64_t>(rows.size());
  const Matrix x = ctx.arena->NewMatrix(count, resid.cols);
  const auto select = [&](ConstMatrix src) {
    for (int64_t i = 0; i < count; ++i) {
      CopyRows(src.RowRange(rows[static_cast<size_t>(i)], 1), x.RowRange(i, 1));
    }
  };
  if (ctx.Wants(HookPoint::kFinalNorm) || ctx.Wants(HookPoint::kFinalNormScale)) {
    const Arena::Scope of_norm(*ctx.arena);
    const Matrix normed = ctx.arena->NewMatrix(resid.rows, resid.cols);
    final_norm_.Forward(resid, HookPoint::kFinalNormScale, ctx, normed);
    ctx.Visit(HookPoint::kFinalNorm, normed);
    select(normed);
  } else {
    select(resid);
    final_norm_.Forward(x, x);
  }
  if (count == 0) return absl::OkStatus();
  if (request.final_norm != nullptr) request.final_norm->assign(x.data, x.data + x.rows * x.cols);
  const Batch& of_pass = *ctx.batch;
  MatmulPath path = ctx.path;
  path.tail_rows = 0;
  const float cap = request.softcap.value_or(static_cast<float>(config_.final_logit_softcapping));
  const auto compute = [&](int64_t begin, Matrix dst) -> Status {
    const auto first = rows.begin() + begin;
    const Batch batch = of_pass.Select(std::vector<int64_t>(first, first + dst.rows));
    ctx.batch = &batch;
    const AdaptedJob job = {AdaptedModule::kHead, &embed_tokens_, dst};
    const Status status = AdaptedLinear(x.RowRange(begin, dst.rows), {&job, 1}, path, ctx);
    if (status.ok()) {
      ctx.Visit(HookPoint::kLogitsRaw, dst);
      if (cap > 0.0f) Softcap(cap, dst);
      ctx.Visit(HookPoint::kLogits, dst);
    }
    ctx.batch = &of_pass;
    return status;
  };
  if (request.reading == nullptr) {
    logits.resize(static_cast<size_t>(count * config_.vocab_size));
    return compute(0, Matrix(logits.data(), count, config_.vocab_size));
  }
  GL_RETURN_IF_ERROR(CheckIds(config_, request.reading->vocab));
  // Hooks see a pass's logits in one piece; who captures them has asked for [T, V].
  const bool shown = ctx.Wants(HookPoint::kLogitsRaw) || ctx.Wants(HookPoint::kLogits);
  const LogitsBlocks blocks = {count, shown ? count : std::min(count, kLogitsBlock),
                               config_.vocab_size, compute};
  return ReadLogits(*request.reading, blocks, *ctx.arena, logits);
}

Status TextModel::Unembed(ConstMatrix x, const UnembedOptions& options,
                          std::vector<float>& logits) {
  GL_RETURN_IF_ERROR(CheckIds(config_, options.vocab));
  const ThreadPool::Pass pass(threads());
  const Arena::Scope scope(arena_);
  const Matrix normed = arena_.NewMatrix(x.rows, x.cols);
  if (options.norm) {
    final_norm_.Forward(x, normed);
  } else {
    CopyRows(x, normed);
  }
  TensorView table = embed_tokens_;
  if (!options.vocab.empty()) {
    const auto count = static_cast<int64_t>(options.vocab.size());
    const Matrix rows = arena_.NewMatrix(count, x.cols);
    GatherRows(embed_tokens_, options.vocab.data(), 0, 1.0f, rows);
    table = {rows.data, DType::kFloat32, {count, x.cols}};
  }
  logits.resize(static_cast<size_t>(x.rows * table.shape[0]));
  const Matrix dst(logits.data(), x.rows, table.shape[0]);
  const MatmulPath path = {.row_exact = options_.invariant,
                           .bfloat16 = options_.bfloat16_matmul,
                           .float32_activations = options_.float32_activations};
  GL_RETURN_IF_ERROR(Linear(normed, {{&table, dst}}, path, arena_));
  const float cap = options.softcap.value_or(static_cast<float>(config_.final_logit_softcapping));
  if (cap > 0.0f) Softcap(cap, dst);
  return absl::OkStatus();
}

}  // namespace gemloupe
