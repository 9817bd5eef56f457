// TextModel::SetMerged: adapters folded into copies of the weights.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "models/adapter.h"
#include "models/text_model.h"
#include "ops/convert.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

// Rows that are merged at once: whole panels.
constexpr int64_t kPartRows = 256;

// A matrix, or one of a stack, and what the adapters do to it.
struct MatrixMerge {
  TensorView weight;
  std::vector<std::pair<const LoraDelta*, float>> deltas;  // with their weights
  int64_t expert = -1;
  bool embedding = false;
  float factor = 1.0f;  // of an embedding, which its low-rank changes follow
};

const void* StackData(const TensorView& view, int64_t expert) {
  return expert < 0 ? view.data : view.Slice(expert).data;
}

// One row of scale · B A, in float32. `a` is A [r, in] widened, for embeddings B [cols, r].
void LowRankRow(const LoraDelta& delta, const MatrixMerge& merge, int64_t row,
                const std::vector<float>& widened, std::vector<float>& low, float* out) {
  const int64_t rank = delta.b.shape.back();
  const int64_t cols = merge.weight.shape[1];
  low.resize(static_cast<size_t>(rank));
  std::fill_n(out, cols, 0.0f);
  if (merge.embedding) {
    for (int64_t i = 0; i < rank; ++i)
      ReadRowPart(delta.a, i, row, 1, &low[static_cast<size_t>(i)]);
    for (int64_t col = 0; col < cols; ++col) {
      const float* b = widened.data() + col * rank;
      for (int64_t i = 0; i < rank; ++i) out[col] += b[i] * low[static_cast<size_t>(i)];
    }
    return;
  }
  const auto* b = static_cast<const uint8_t*>(StackData(delta.b, merge.expert)) +
                  MatrixBytes(delta.b.dtype, row, rank);
  WidenToFloat(low.data(), b, delta.b.dtype, rank);
  for (int64_t i = 0; i < rank; ++i) {
    Kernels().add_scaled(out, widened.data() + i * cols, low[static_cast<size_t>(i)], cols);
  }
}

// Rows [begin, end) of the merged matrix, in float32.
void MergeRows(const MatrixMerge& merge, const std::vector<std::vector<float>>& widened,
               int64_t begin, int64_t end, std::vector<float>& rows) {
  const int64_t cols = merge.weight.shape[1];
  rows.resize(static_cast<size_t>((end - begin) * cols));
  ReadRows(merge.weight, begin, end, rows.data());
  ForRows(end - begin, cols * 64 * static_cast<int64_t>(sizeof(float)),
          [&](int64_t first, int64_t last) {
            std::vector<float> low;
            std::vector<float> own(static_cast<size_t>(cols));
            std::vector<float> change(static_cast<size_t>(cols));
            for (int64_t i = first; i < last; ++i) {
              float* row = rows.data() + i * cols;
              std::copy_n(row, cols, own.data());
              for (size_t at = 0; at < merge.deltas.size(); ++at) {
                const auto& [delta, weight] = merge.deltas[at];
                if (delta->replaces_rows()) {
                  if (!delta->ReadNewRow(begin + i, 0, cols, change.data())) continue;
                  if (weight == 1.0f && merge.deltas.size() == 1) {
                    std::copy_n(change.data(), cols, row);
                    continue;
                  }
                  for (int64_t col = 0; col < cols; ++col) {
                    row[col] +=
                        weight * (change[static_cast<size_t>(col)] - own[static_cast<size_t>(col)]);
                  }
                  continue;
                }
                LowRankRow(*delta, merge, begin + i, widened[at], low, change.data());
                const float scale = delta->scale / merge.factor;
                for (int64_t col = 0; col < cols; ++col) {
                  const auto c = static_cast<size_t>(col);
                  const float gain = delta->gain.empty() ? 1.0f
                                     : merge.embedding
                                         ? delta->gain[c]
                                         : delta->gain[static_cast<size_t>(begin + i)];
                  row[col] += weight * ((gain - 1.0f) * own[c] + gain * scale * change[c]);
                }
              }
            }
          });
}

}  // namespace

StatusOr<std::vector<TextModel::MergedModule>> TextModel::SetMerged(const AdapterMix& adapters,
                                                                    const MergeOptions& options) {
  std::set<std::pair<int, AdaptedModule>> modules;
  for (const WeightedAdapter& one : adapters) {
    GL_RETURN_IF_ERROR(CheckAdapter(config_, *one.adapter));
    for (const auto& [key, delta] : one.adapter->deltas()) {
      if (IsOfTower(key.second)) continue;
      const bool of_table = key.second == AdaptedModule::kEmbedTokensPerLayer;
      const bool on_disk = experts_ != nullptr && IsOfExperts(key.second);
      if (of_table || on_disk || !delta.shift.empty()) {
        return absl::UnimplementedError(
            absl::StrCat("merge: ", AdaptedModuleName(key.second, key.first),
                         of_table  ? " stays on disk"
                         : on_disk ? "'s experts stay on disk (max_memory)"
                                   : " has a bias (lora_bias), for which the model has no place",
                         "; use the adapter without merging it"));
      }
      modules.insert(key);
    }
  }
  const ThreadPool::Pass pass(threads());
  struct Planned {
    TensorView weight;
    DType dtype;
  };
  std::vector<Planned> plan;
  uint64_t bytes = 0;
  double work = 0.0;
  for (const auto& [layer, module] : modules) {
    GL_ASSIGN_OR_RETURN(const TensorView weight, weights_.Find(AdaptedModuleTensor(module, layer)));
    DType dtype = weight.dtype;
    if (IsPacked(dtype) && !options.requantize) dtype = DType::kInt8;
    if (dtype == DType::kInt4K) dtype = DType::kInt4;
    if (dtype == DType::kInt5K || dtype == DType::kInt6K) dtype = DType::kInt6;
    plan.push_back({weight, dtype});
    bytes += TensorBytes(dtype, weight.shape);
    work += static_cast<double>(weight.size());
  }
  const uint64_t available = AvailableMemory();
  if (bytes > available) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "merge: the merged matrices take %.2f GiB, but %.2f GiB of memory is available; use the "
        "adapters without merging them",
        static_cast<double>(bytes) / (1 << 30), static_cast<double>(available) / (1 << 30)));
  }

  MergedWeights merged;
  std::vector<MergedModule> report;
  double done = 0.0;
  size_t at = 0;
  for (const auto& [layer, module] : modules) {
    const auto& [weight, dtype] = plan[at++];
    uint8_t* dst = merged.Add(module, layer, dtype, weight.shape);
    const bool stacked = weight.shape.size() == 3;
    double error = 0.0;
    double norm = 0.0;
    for (int64_t i = 0; i < (stacked ? weight.shape[0] : 1); ++i) {
      MatrixMerge merge;
      merge.weight = stacked ? weight.Slice(i) : weight;
      merge.expert = stacked ? i : -1;
      merge.embedding = module == AdaptedModule::kEmbedTokens;
      if (merge.embedding) merge.factor = embed_scale_;
      std::vector<std::vector<float>> widened;
      for (const WeightedAdapter& one : adapters) {
        const LoraDelta* delta = one.adapter->Find(module, layer);
        if (delta == nullptr) continue;
        merge.deltas.push_back({delta, one.weight});
        widened.emplace_back();
        if (delta->b.data == nullptr) continue;
        const TensorView& factor = merge.embedding ? delta->b : delta->a;
        const TensorView own = stacked ? factor.Slice(i) : factor;
        widened.back().resize(static_cast<size_t>(own.size()));
        WidenToFloat(widened.back().data(), own.data, own.dtype, own.size());
      }
      const int64_t outputs = merge.weight.shape[0];
      const int64_t cols = merge.weight.shape[1];
      std::vector<float> rows;
      std::vector<float> stored;
      for (int64_t begin = 0; begin < outputs; begin += kPartRows) {
        const int64_t end = std::min(outputs, begin + kPartRows);
        MergeRows(merge, widened, begin, end, rows);
        const TensorView part = {rows.data(), DType::kFloat32, {end - begin, cols}};
        GL_RETURN_IF_ERROR(ConvertRows(part, 0, end - begin, dtype, dst));
        stored.resize(rows.size());
        ReadRows({dst, dtype, {end - begin, cols}}, 0, end - begin, stored.data());
        for (size_t j = 0; j < rows.size(); ++j) {
          const double difference = static_cast<double>(stored[j]) - rows[j];
          error += difference * difference;
          norm += static_cast<double>(rows[j]) * rows[j];
        }
        dst += MatrixBytes(dtype, end - begin, cols);
        done += static_cast<double>((end - begin) * cols);
        if (options.progress && !options.progress(done / work)) {
          return absl::CancelledError("interrupted");
        }
      }
    }
    report.push_back(
        {AdaptedModuleName(module, layer), norm > 0.0 ? std::sqrt(error / norm) : 0.0});
  }
  merged_ = std::move(merged);
  return report;
}

}  // namespace gemloupe
