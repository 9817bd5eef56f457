#ifndef GEMLOUPE_MODELS_TEXT_MODEL_H_
#define GEMLOUPE_MODELS_TEXT_MODEL_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "formats/expert_cache.h"
#include "formats/row_table.h"
#include "formats/weight_store.h"
#include "layers/norm.h"
#include "models/config.h"
#include "models/decoder_layer.h"
#include "ops/rows.h"
#include "ops/token_scores.h"
#include "state/batch.h"

namespace gemloupe {

struct TextModelOptions {
  // Products of more than kMaxKernelRows rows may round activations to bfloat16 on CPUs that have it.
  bool bfloat16_matmul = false;
  // Products with quantised weights read float32 activations instead of int8 ones.
  bool float32_activations = false;
  // √D and √P, the embeddings' factors, are rounded to bfloat16, as a bfloat16 reference holds them.
  bool round_embed_scale = false;
  // Every row's bits are the same whatever the batch, the chunk and the thread count.
  bool invariant = false;
  // Memory for experts that are read from the file on demand; 0: all stay mapped.
  uint64_t expert_memory = 0;
  int threads = 0;                   // 0: all available CPUs
  DType kv_dtype = DType::kFloat16;  // of caches that are made without naming one
};

// How the logits of a pass are read: in blocks of rows, so that [T, V] is never held.
struct LogitsReading {
  std::vector<int32_t> vocab;    // the columns that are given; empty: all
  std::vector<int32_t> targets;  // one a logits row, −1 for none; empty: no scores
  // Of the logits rows, [begin, end) are given; the others are only scored.
  int64_t given_begin = 0;
  int64_t given_end = 0;
  std::vector<TokenScore>* scores = nullptr;  // out: one a logits row
};

// One pass over the model: T tokens of one or several sequences.
struct PassRequest {
  Batch batch;
  std::vector<int64_t> logits_rows;  // rows of the batch whose logits are wanted, ascending
  std::vector<Hooks*> hooks;         // one a segment, null for none; or empty
  std::vector<AdapterMix> adapters;  // one a segment; or empty
  // The pass begins at this layer, with these residual streams [T, D] (without rows: the embeddings);
  // the caches hold what earlier layers stored.
  int first_layer = 0;
  ConstMatrix resid_pre;
  bool row_exact = false;  // decode: a row's bits do not depend on its neighbours
  // The caches keep their length: the caller knows later which tokens stay, and calls Advance.
  bool keep_length = false;
  const LogitsReading* reading = nullptr;    // null: all columns of all logits rows
  std::vector<float>* final_norm = nullptr;  // if wanted: [logits_rows, D], what logits are made of
  std::optional<float> softcap;              // instead of the config's; 0 for none
  std::function<bool()> stopped;  // asked once a layer; true ends the pass with Cancelled
};

// The text decoder of every Gemma 4.
class TextModel {
 public:
  // Takes the weights in the store's target dtypes; `progress` is told of conversions.
  static StatusOr<std::unique_ptr<TextModel>> Load(const TextConfig& config, WeightStore weights,
                                                   const TextModelOptions& options,
                                                   const ProgressFn& progress);

  // `base` with other values of some tensors, float32 views that need live until it returns, for whole
  // passes at once: the two share all else, caches included. Matrices are held in `dtype`, float32,
  // bfloat16 or float16. FailedPrecondition while adapters are merged into `base` or its experts are
  // on disk, ResourceExhausted where the values do not fit in memory.
  using NewWeights = std::vector<std::pair<std::string, TensorView>>;
  static StatusOr<std::shared_ptr<TextModel>> Override(std::shared_ptr<TextModel> base,
                                                       const NewWeights& weights, DType dtype);

  // Runs the pass and appends its tokens to their caches; logits [logits_rows, V]. On any error the
  // caches have their previous length. Calls of several threads take turns; FailedPrecondition for a
  // call from inside a hook of this model.
  Status Forward(const PassRequest& request, std::vector<float>& logits);

  // Logits [T, V], or [T, vocab.size()] of these ids, of residual streams x [T, D].
  struct UnembedOptions {
    bool norm = true;              // apply the final norm before
    std::optional<float> softcap;  // instead of the config's; 0 for none
    std::vector<int32_t> vocab;    // empty: all
  };
  Status Unembed(ConstMatrix x, const UnembedOptions& options, std::vector<float>& logits);

  // From now on passes use weights into which these adapters are merged, in this order, instead of the
  // stored ones, which stay as they are: no adapters, and the bits are back. Plain matrices keep their
  // dtype; packed ones become int8, or stay as they are with `requantize`. Gives the relative error
  // that rounding adds, ‖merged − exact‖ / ‖exact‖, of each matrix. On an error nothing has changed.
  struct MergeOptions {
    bool requantize = false;
    ProgressFn progress;
  };
  struct MergedModule {
    std::string name;
    double error = 0.0;
  };
  StatusOr<std::vector<MergedModule>> SetMerged(const AdapterMix& adapters,
                                                const MergeOptions& options);

  // The embeddings [T, D] that the first layer reads for these ids. Needs a pass of the thread pool.
  void Embed(std::span<const int32_t> ids, Matrix dst) const {
    GatherRows(embed_tokens_, ids.data(), 0, embed_scale_, dst);
  }

  const TextConfig& config() const { return config_; }
  const TextModelOptions& options() const { return options_; }
  const WeightStore& weights() const { return weights_; }
  const std::vector<KvLayerSpec>& kv_layers() const { return kv_layers_; }
  // Unlike that of any other model of this process: a cache belongs to the model that fills it.
  uint64_t id() const { return id_; }
  int threads() const;
  // The cache of experts that are read on demand, or null.
  const ExpertCache* experts() const { return experts_.get(); }

 private:
  TextModel() = default;
  Status Build();  // from config_, options_ and weights_
  struct InputLayers;
  struct Rows;
  Status RunLayers(const PassRequest& request, PassContext& ctx, std::vector<float>& logits);
  Status PerLayerInputs(ConstMatrix embed, std::span<const InputLayers> parts,
                        const PassContext& ctx, Matrix inputs) const;
  Status Head(ConstMatrix resid, const std::vector<int64_t>& rows, const PassRequest& request,
              PassContext& ctx, std::vector<float>& logits) const;
  void SetBatch(const Batch& batch, PassContext& ctx) const;

  std::shared_ptr<const TextModel> base_;  // whose memory an overridden model reads
  uint64_t id_ = 0;
  TextConfig config_;
  TextModelOptions options_;
  WeightStore weights_;
  std::vector<KvLayerSpec> kv_layers_;
  std::vector<std::vector<float>> inv_freqs_;  // one for each RopeSpec
  int first_sharing_layer_ = 0;

  TensorView embed_tokens_;
  RowTable embed_tokens_per_layer_;
  TensorView per_layer_model_projection_;
  Norm per_layer_projection_norm_;
  Norm final_norm_;
  std::vector<DecoderLayer> layers_;
  std::shared_ptr<ExpertCache> experts_;
  MergedWeights merged_;
  float embed_scale_ = 0.0f;
  float per_layer_scale_ = 0.0f;

  Arena arena_;  // of the running pass
  // The thread that runs a pass of this model or of one that shares its weights.
  std::shared_ptr<std::atomic<std::thread::id>> driving_ =
      std::make_shared<std::atomic<std::thread::id>>();
};

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_TEXT_MODEL_H_
