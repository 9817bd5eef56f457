#include "layers/lora.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/first_error.h"
#include "base/thread_pool.h"
#include "layers/pass_context.h"
#include "ops/convert.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

// In the order of the enum.
constexpr std::array<const char*, kNumAdaptedModules> kNames = {
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "per_layer.gate",
    "per_layer.projection",
    "router.proj",
    "experts.gate_up_proj",
    "experts.down_proj",
    "embed_tokens",
    "embed_tokens_per_layer",
    "per_layer_model_projection",
    "lm_head",
    "vision.attn.q_proj",
    "vision.attn.k_proj",
    "vision.attn.v_proj",
    "vision.attn.o_proj",
    "vision.mlp.gate_proj",
    "vision.mlp.up_proj",
    "vision.mlp.down_proj",
    "vision.input_proj",
    "vision.patch_dense",
    "vision.projection",
    "audio.ffn1.up_proj",
    "audio.ffn1.down_proj",
    "audio.attn.q_proj",
    "audio.attn.k_proj",
    "audio.attn.v_proj",
    "audio.attn.relative_k_proj",
    "audio.attn.post",
    "audio.conv.linear_start",
    "audio.conv.linear_end",
    "audio.ffn2.up_proj",
    "audio.ffn2.down_proj",
    "audio.input_proj",
    "audio.output_proj",
    "audio.projection",
};

// Outputs of one task of the second fork: its change of many rows stays in the second-level cache, its
// part of B is worth a task where rows are few.
constexpr int64_t kSliceOutputs = 256;
constexpr int64_t kSliceBytes = 32 * 1024;

// Rows of the pass that share their adapters.
struct RowGroup {
  const AdapterMix* mix = nullptr;
  std::vector<int64_t> rows;
};

// Rows of the pass's tail, which are computed as a pass of their own (MatmulPath), have groups of
// their own.
std::vector<RowGroup> GroupRows(const PassContext& ctx, int64_t rows, int64_t tail_rows) {
  std::vector<RowGroup> groups;
  const int64_t body = rows - tail_rows;
  for (size_t i = 0; i < ctx.batch->segments.size(); ++i) {
    const AdapterMix& mix = (*ctx.adapters)[i];
    const Segment& segment = ctx.batch->segments[i];
    if (mix.empty()) continue;
    const int64_t end = ctx.batch->segments.size() == 1 ? rows : segment.row + segment.rows;
    for (int64_t row = segment.row; row < end; ++row) {
      const auto same = [&](const RowGroup& group) {
        return *group.mix == mix && (group.rows.front() >= body) == (row >= body);
      };
      // Most often the group of the row before.
      auto group = !groups.empty() && same(groups.back())
                       ? groups.end() - 1
                       : std::find_if(groups.begin(), groups.end(), same);
      if (group == groups.end()) group = groups.insert(group, RowGroup{&mix, {}});
      group->rows.push_back(row);
    }
  }
  return groups;
}

// What one adapter does to one product.
struct Side {
  const Adapter* adapter = nullptr;
  const LoraDelta* delta = nullptr;
  Matrix product;  // x · Aᵀ, x · replacementᵀ or x · rowsᵀ of all rows, or none
  Matrix shown;    // for hooks: what it adds [T, n]
  std::unique_ptr<LinearInput> low;  // `product`, on the left of B

  bool replaces() const { return delta->replacement.data != nullptr; }
  bool sets_rows() const { return delta->rows.data != nullptr; }
  bool shifts_only() const { return !replaces() && !sets_rows() && delta->b.data == nullptr; }
};

Status CheckFits(const AdaptedJob& job, const LoraDelta& delta, int64_t inputs, int layer) {
  const int64_t outputs = job.weight->shape[0];
  const auto check = [&](const char* what, int64_t got, int64_t expected) {
    if (got == expected) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("adapter: ", AdaptedModuleName(job.module, layer), " has ", got, " ", what,
                     ", expected ", expected));
  };
  for (const auto& [what, view] :
       {std::pair{"inputs of A", &delta.a}, std::pair{"inputs", &delta.replacement},
        std::pair{"inputs", &delta.rows}}) {
    if (view->data != nullptr) GL_RETURN_IF_ERROR(check(what, view->shape.back(), inputs));
  }
  for (const auto& [what, view] :
       {std::pair{"outputs of B", &delta.b}, std::pair{"outputs", &delta.replacement}}) {
    if (view->data != nullptr) GL_RETURN_IF_ERROR(check(what, view->shape[0], outputs));
  }
  if (delta.shift.empty()) return absl::OkStatus();
  return check("biases", static_cast<int64_t>(delta.shift.size()), outputs);
}

// A job with its sides, for one group of rows.
struct GroupJob {
  const AdaptedJob* job = nullptr;
  const RowGroup* group = nullptr;
  std::vector<std::pair<Side*, float>> sides;  // with their weights, in the order of the mix
  int64_t first_slice = 0;
  int64_t slice_outputs = kSliceOutputs;
};

// How much of the product itself stays: 1 + Σ weight · (gain − 1), less what is replaced.
void ScaleProduct(const GroupJob& work, int64_t begin, int64_t end) {
  const AdaptedJob& job = *work.job;
  std::vector<float> stays;
  for (const auto& [side, weight] : work.sides) {
    if (!side->replaces() && side->delta->gain.empty()) continue;
    stays.resize(static_cast<size_t>(end - begin), 1.0f);
    for (int64_t i = begin; i < end; ++i) {
      stays[static_cast<size_t>(i - begin)] +=
          weight *
          ((side->replaces() ? 0.0f : side->delta->gain[static_cast<size_t>(job.first + i)]) -
           1.0f);
    }
  }
  if (stays.empty()) return;
  for (const int64_t row : work.group->rows) {
    float* dst = job.dst.row(row) + begin;
    Kernels().mul(dst, dst, stays.data(), end - begin);
  }
}

// What a side adds to outputs [begin, end) of the group's rows: change [rows, end − begin].
Status ComputeChange(const GroupJob& work, const Side& side, float weight, int64_t begin,
                     int64_t end, const MatmulPath& path, Matrix change) {
  const LoraDelta& delta = *side.delta;
  const std::vector<int64_t>& rows = work.group->rows;
  const int64_t count = end - begin;
  const int64_t first = work.job->first + begin;
  const bool low_rank = delta.b.data != nullptr;
  if (low_rank) {
    GL_RETURN_IF_ERROR(LinearSlice(*side.low, rows, delta.b, first, first + count, change, path));
  }
  for (int64_t i = 0; i < change.rows; ++i) {
    float* row = change.row(i);
    if (low_rank) {
      if (!delta.gain.empty()) Kernels().mul(row, row, delta.gain.data() + first, count);
      Kernels().scale(row, row, weight * delta.scale, count);
    } else if (side.replaces()) {
      Kernels().scale(row, side.product.row(rows[static_cast<size_t>(i)]) + begin, weight, count);
    } else {
      std::fill_n(row, count, 0.0f);
    }
    if (!delta.shift.empty()) {
      Kernels().add_scaled(row, delta.shift.data() + first, weight, count);
    }
  }
  return absl::OkStatus();
}

// Outputs [begin, end) of one group.
Status AddSlice(const GroupJob& work, int64_t begin, int64_t end, const MatmulPath& path,
                Matrix change) {
  const AdaptedJob& job = *work.job;
  const std::vector<int64_t>& rows = work.group->rows;
  const int64_t count = end - begin;
  const bool shown = std::any_of(work.sides.begin(), work.sides.end(), [](const auto& side) {
    return side.first->shown.data != nullptr;
  });
  std::vector<float> before;  // the products, where someone looks at changes
  if (shown) {
    before.resize(rows.size() * static_cast<size_t>(count));
    for (size_t i = 0; i < rows.size(); ++i) {
      std::copy_n(job.dst.row(rows[i]) + begin, count,
                  before.data() + i * static_cast<size_t>(count));
    }
  }
  ScaleProduct(work, begin, end);
  for (const auto& [side, weight] : work.sides) {
    if (side->sets_rows()) continue;
    GL_RETURN_IF_ERROR(ComputeChange(work, *side, weight, begin, end, path, change));
    for (size_t i = 0; i < rows.size(); ++i) {
      const float* added = change.row(static_cast<int64_t>(i));
      float* dst = job.dst.row(rows[i]) + begin;
      Kernels().add(dst, dst, added, count);
      if (side->shown.data == nullptr) continue;
      float* to = side->shown.row(rows[i]) + begin;
      for (int64_t at = 0; at < count; ++at) {
        const auto output = static_cast<size_t>(job.first + begin + at);
        const float stays = side->replaces()            ? 0.0f
                            : side->delta->gain.empty() ? 1.0f
                                                        : side->delta->gain[output];
        to[at] = added[at] + weight * (stays - 1.0f) *
                                 before[i * static_cast<size_t>(count) + static_cast<size_t>(at)];
      }
    }
  }
  return absl::OkStatus();
}

// New rows of an output matrix: their products take the place of the old ones.
void SetOutputs(const GroupJob& work) {
  for (const auto& [side, weight] : work.sides) {
    if (!side->sets_rows()) continue;
    const std::vector<int32_t>& ids = side->delta->ids;
    for (const int64_t row : work.group->rows) {
      float* dst = work.job->dst.row(row);
      for (size_t i = 0; i < ids.size(); ++i) {
        const int64_t at = ids[i] - work.job->first;
        if (at < 0 || at >= work.job->dst.cols) continue;
        const float change = side->product.row(row)[i] - dst[at];
        dst[at] = weight == 1.0f ? side->product.row(row)[i] : dst[at] + weight * change;
      }
    }
  }
}

// The mix of each row of the pass, null for none.
std::vector<const AdapterMix*> MixOfRows(const PassContext& ctx) {
  std::vector<const AdapterMix*> mixes(static_cast<size_t>(ctx.rows()), nullptr);
  for (size_t i = 0; i < ctx.batch->segments.size(); ++i) {
    const Segment& segment = ctx.batch->segments[i];
    for (int64_t row = segment.row; row < segment.row + segment.rows; ++row) {
      mixes[static_cast<size_t>(row)] = &(*ctx.adapters)[i];
    }
  }
  return mixes;
}

std::vector<const Adapter*> DistinctAdapters(const PassContext& ctx) {
  std::vector<const Adapter*> adapters;
  for (const AdapterMix& mix : *ctx.adapters) {
    for (const WeightedAdapter& one : mix) {
      if (std::find(adapters.begin(), adapters.end(), one.adapter.get()) == adapters.end()) {
        adapters.push_back(one.adapter.get());
      }
    }
  }
  return adapters;
}

// out [n] = matrix[first : first + n] · x [k].
void Multiply(const TensorView& matrix, int64_t first, const float* x, int64_t n, float* out) {
  const int64_t k = matrix.shape.back();
  const auto* data = static_cast<const uint8_t*>(matrix.data) + MatrixBytes(matrix.dtype, first, k);
  MatmulKernelFor(matrix.dtype)(out, n, x, k, data, k, 1, n, k, {});
}

// What one adapter makes of a token's embedding.
void AdaptRow(const LoraDelta& delta, int32_t id, int64_t column, float factor, float weight,
              float* low, float* change, Matrix row) {
  const int64_t cols = row.cols;
  float* dst = row.data;
  if (delta.replaces_rows()) {
    if (!delta.ReadNewRow(id, column, cols, change)) return;
    Kernels().scale(change, change, factor, cols);
    if (weight == 1.0f) {
      std::copy_n(change, cols, dst);
    } else {
      for (int64_t i = 0; i < cols; ++i) dst[i] += weight * (change[i] - dst[i]);
    }
    return;
  }
  const int64_t rank = delta.b.shape[1];
  for (int64_t i = 0; i < rank; ++i) ReadRowPart(delta.a, i, id, 1, low + i);
  Multiply(delta.b, column, low, cols, change);
  for (int64_t i = 0; i < cols; ++i) {
    if (delta.gain.empty()) {
      dst[i] += weight * delta.scale * change[i];
    } else {
      const float gain = delta.gain[static_cast<size_t>(column + i)];
      dst[i] += weight * ((gain - 1.0f) * dst[i] + gain * delta.scale * change[i]);
    }
  }
}

}  // namespace

const char* AdaptedModuleName(AdaptedModule module) { return kNames[static_cast<size_t>(module)]; }

std::string AdaptedModuleName(AdaptedModule module, int layer) {
  const std::string_view name = AdaptedModuleName(module);
  if (layer < 0) return std::string(name);
  const size_t tower = IsOfTower(module) ? name.find('.') + 1 : 0;
  return absl::StrCat(std::string(name.substr(0, tower)), "layers.", layer, ".",
                      std::string(name.substr(tower)));
}

StatusOr<AdaptedModule> ParseAdaptedModule(std::string_view name) {
  const auto it = std::find(kNames.begin(), kNames.end(), name);
  if (it != kNames.end()) return static_cast<AdaptedModule>(it - kNames.begin());
  return absl::InvalidArgumentError(
      absl::StrCat("'", std::string(name), "' is no module that adapters change"));
}

bool LoraDelta::ReadNewRow(int64_t id, int64_t column, int64_t count, float* dst) const {
  if (rows.data == nullptr) {
    ReadRowPart(replacement, id, column, count, dst);
    return true;
  }
  const auto found = std::lower_bound(ids.begin(), ids.end(), id);
  if (found == ids.end() || *found != id) return false;
  ReadRowPart(rows, found - ids.begin(), column, count, dst);
  return true;
}

Status Adapter::Add(AdaptedModule module, int layer, LoraDelta delta) {
  const bool added = deltas_.try_emplace({layer, module}, std::move(delta)).second;
  if (added) return absl::OkStatus();
  return absl::AlreadyExistsError(
      absl::StrCat("the adapter changes ", AdaptedModuleName(module, layer), " twice"));
}

void Adapter::AddShift(AdaptedModule module, int layer, std::vector<float> shift) {
  deltas_[{layer, module}].shift = std::move(shift);
}

uint8_t* Adapter::NewMemory(size_t bytes) {
  memory_.emplace_back(bytes);
  nbytes_ += bytes;
  return memory_.back().data();
}

const LoraDelta* Adapter::Find(AdaptedModule module, int layer) const {
  const auto it = deltas_.find({layer, module});
  return it == deltas_.end() ? nullptr : &it->second;
}

uint64_t MergedWeights::nbytes() const {
  uint64_t bytes = 0;
  for (const AlignedBuffer& buffer : memory_) bytes += buffer.size();
  return bytes;
}

uint8_t* MergedWeights::Add(AdaptedModule module, int layer, DType dtype,
                            const std::vector<int64_t>& shape) {
  memory_.emplace_back(TensorBytes(dtype, shape));
  views_[{layer, module}] = {memory_.back().data(), dtype, shape};
  return memory_.back().data();
}

Status AdaptedLinear(ConstMatrix x, std::initializer_list<AdaptedJob> jobs,
                     const PassContext& ctx) {
  return AdaptedLinear(x, std::span<const AdaptedJob>(jobs.begin(), jobs.size()), ctx.path, ctx);
}

Status AdaptedLinear(ConstMatrix x, std::span<const AdaptedJob> jobs, const MatmulPath& path,
                     const PassContext& ctx) {
  std::vector<LinearJob> products;
  products.reserve(jobs.size());
  for (const AdaptedJob& job : jobs) {
    const TensorView* weight = job.weight;
    if (ctx.merged != nullptr) {
      weight = &ctx.merged->Of(job.module, ctx.LayerOf(job.module), *weight);
    }
    products.push_back({weight, job.dst, job.first});
  }
  if (ctx.adapters == nullptr) return Linear(x, products, path, *ctx.arena);
  GL_CHECK(x.rows == ctx.rows() || ctx.batch->segments.size() == 1);
  const Arena::Scope scope(*ctx.arena);
  std::vector<std::vector<Side>> sides(jobs.size());
  bool adapted = false;
  for (const Adapter* adapter : DistinctAdapters(ctx)) {
    for (size_t i = 0; i < jobs.size(); ++i) {
      const AdaptedJob& job = jobs[i];
      const LoraDelta* delta = adapter->Find(job.module, ctx.LayerOf(job.module));
      if (delta == nullptr) continue;
      GL_RETURN_IF_ERROR(CheckFits(job, *delta, x.cols, ctx.LayerOf(job.module)));
      adapted = true;
      Side side;
      side.adapter = adapter;
      side.delta = delta;
      if (!side.shifts_only()) {
        LinearJob product;
        if (side.replaces()) {
          product = {&delta->replacement, ctx.arena->NewMatrix(x.rows, job.dst.cols), job.first};
        } else {
          const TensorView& left = side.sets_rows() ? delta->rows : delta->a;
          product = {&left, ctx.arena->NewMatrix(x.rows, left.shape[0])};
        }
        side.product = product.dst;
        products.push_back(product);
      }
      if (x.rows == ctx.rows() && ctx.WantsDelta(job.module, *adapter)) {
        side.shown = ctx.arena->NewMatrix(x.rows, job.dst.cols);
        for (int64_t row = 0; row < x.rows; ++row) {
          std::fill_n(side.shown.row(row), job.dst.cols, 0.0f);
        }
      }
      sides[i].push_back(std::move(side));
    }
  }
  GL_RETURN_IF_ERROR(Linear(x, products, path, *ctx.arena));
  if (!adapted) return absl::OkStatus();

  const int64_t tail = path.tail_rows < x.rows ? path.tail_rows : 0;
  const std::vector<RowGroup> groups = GroupRows(ctx, x.rows, tail);
  std::vector<GroupJob> work;
  int64_t slices = 0;
  int64_t most_rows = 0;
  int64_t most_outputs = 0;
  int64_t bytes = 0;
  for (size_t i = 0; i < jobs.size(); ++i) {
    for (const RowGroup& group : groups) {
      GroupJob part = {&jobs[i], &group, {}, slices, kSliceOutputs};
      for (const WeightedAdapter& one : *group.mix) {
        for (Side& side : sides[i]) {
          if (side.adapter == one.adapter.get()) part.sides.push_back({&side, one.weight});
        }
      }
      if (part.sides.empty()) continue;
      for (const auto& [side, weight] : part.sides) {
        if (side->delta->b.data == nullptr) continue;
        if (side->low == nullptr) {
          side->low = std::make_unique<LinearInput>(side->product, *ctx.arena);
        }
        side->low->Prepare(
            ChooseEngine(static_cast<int64_t>(group.rows.size()), side->delta->b.dtype, path));
        const auto row_bytes =
            static_cast<int64_t>(MatrixBytes(side->delta->b.dtype, 1, side->delta->b.shape[1]));
        bytes += row_bytes * jobs[i].dst.cols;
        if (group.rows.size() <= kMaxKernelRows) {
          part.slice_outputs = std::max(kSliceOutputs, kSliceBytes / row_bytes);
        }
      }
      slices += (jobs[i].dst.cols + part.slice_outputs - 1) / part.slice_outputs;
      most_outputs = std::max(most_outputs, part.slice_outputs);
      most_rows = std::max(most_rows, static_cast<int64_t>(group.rows.size()));
      work.push_back(std::move(part));
    }
  }
  const Matrix scratch =
      ctx.arena->NewMatrix(ThreadPool::Get().threads() * most_rows, most_outputs);
  FirstError error;
  const auto run_slice = [&](int64_t slice, int worker) {
    size_t at = work.size() - 1;
    while (work[at].first_slice > slice) --at;
    const GroupJob& part = work[at];
    const int64_t begin = (slice - part.first_slice) * part.slice_outputs;
    const int64_t end = std::min(part.job->dst.cols, begin + part.slice_outputs);
    const Matrix change(scratch.row(worker * most_rows),
                        static_cast<int64_t>(part.group->rows.size()), end - begin, most_outputs);
    error.Add(AddSlice(part, begin, end, path, change));
  };
  if (bytes < kInlineBytes && x.rows <= kMaxKernelRows) {
    for (int64_t slice = 0; slice < slices; ++slice) run_slice(slice, 0);
  } else {
    ThreadPool::Get().ParallelFor(slices, run_slice);
  }
  GL_RETURN_IF_ERROR(error.Take());
  for (const GroupJob& part : work) SetOutputs(part);
  for (size_t i = 0; i < jobs.size(); ++i) {
    for (const Side& side : sides[i]) {
      if (side.shown.data != nullptr) ctx.VisitDelta(jobs[i].module, *side.adapter, side.shown);
    }
  }
  return absl::OkStatus();
}

void AdaptEmbedding(AdaptedModule module, int64_t column, float factor, const PassContext& ctx,
                    Matrix dst) {
  if (ctx.adapters == nullptr) return;
  GL_CHECK(dst.rows == ctx.rows());
  const std::vector<const AdapterMix*> mixes = MixOfRows(ctx);
  int64_t rank = 0;
  for (const Adapter* adapter : DistinctAdapters(ctx)) {
    const LoraDelta* delta = adapter->Find(module, ctx.LayerOf(module));
    if (delta != nullptr) rank = std::max(rank, delta->b.data == nullptr ? 1 : delta->b.shape[1]);
  }
  if (rank == 0) return;
  ForRows(dst.rows, dst.cols * rank * static_cast<int64_t>(sizeof(float)),
          [&](int64_t begin, int64_t end) {
            std::vector<float> low(static_cast<size_t>(rank));
            std::vector<float> change(static_cast<size_t>(dst.cols));
            for (int64_t row = begin; row < end; ++row) {
              for (const WeightedAdapter& one : *mixes[static_cast<size_t>(row)]) {
                const LoraDelta* delta = one.adapter->Find(module, ctx.LayerOf(module));
                if (delta == nullptr) continue;
                AdaptRow(*delta, ctx.batch->table_ids()[static_cast<size_t>(row)], column, factor,
                         one.weight, low.data(), change.data(), dst.RowRange(row, 1));
              }
            }
          });
}

ExpertDeltas::ExpertDeltas(AdaptedModule module, ConstMatrix x, const Slots& slots,
                           const PassContext& ctx)
    : experts_(slots.experts) {
  if (ctx.adapters == nullptr) return;
  const std::vector<const AdapterMix*> of_rows = MixOfRows(ctx);
  for (const int64_t row : slots.rows) mixes_.push_back(of_rows[static_cast<size_t>(row)]);
  const auto count = static_cast<int64_t>(slots.rows.size());
  for (const Adapter* adapter : DistinctAdapters(ctx)) {
    const LoraDelta* delta = adapter->Find(module, ctx.layer);
    if (delta == nullptr) continue;
    const Side side = {adapter, delta, ctx.arena->NewMatrix(count, delta->a.shape[1])};
    ForRows(count, static_cast<int64_t>(MatrixBytes(delta->a.dtype, side.low.cols, x.cols)),
            [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) {
                const auto slot = static_cast<size_t>(i);
                const AdapterMix& mix = *mixes_[slot];
                const bool has = std::any_of(mix.begin(), mix.end(), [&](const auto& one) {
                  return one.adapter.get() == adapter;
                });
                if (!has) continue;
                Multiply(delta->a.Slice(slots.experts[slot]), 0, x.row(slots.sources[slot]),
                         side.low.cols, side.low.row(i));
              }
            });
    sides_.push_back(side);
  }
}

// In the order of each row's mix, whatever its neighbours have: sums keep their bits.
void ExpertDeltas::Add(int64_t first, int64_t begin, int64_t end, Matrix dst) const {
  std::vector<float> change(static_cast<size_t>(end - begin));
  for (int64_t i = 0; i < dst.rows; ++i) {
    const auto slot = static_cast<size_t>(first + i);
    for (const WeightedAdapter& one : *mixes_[slot]) {
      for (const Side& side : sides_) {
        if (side.adapter != one.adapter.get()) continue;
        Multiply(side.delta->b.Slice(experts_[slot]), begin, side.low.row(first + i), end - begin,
                 change.data());
        Kernels().add_scaled(dst.row(i), change.data(), one.weight * side.delta->scale,
                             end - begin);
      }
    }
  }
}

}  // namespace gemloupe
