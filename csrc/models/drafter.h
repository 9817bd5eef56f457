#ifndef GEMLOUPE_MODELS_DRAFTER_H_
#define GEMLOUPE_MODELS_DRAFTER_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "formats/weight_store.h"
#include "layers/norm.h"
#include "models/config.h"
#include "models/decoder_layer.h"
#include "models/text_model.h"
#include "state/kv_cache.h"

namespace gemloupe {

struct DrafterConfig {
  TextConfig text;                   // its own few layers; kv_source does not matter
  int64_t backbone_hidden_size = 0;  // B, the hidden size of the target
  int64_t centroid_top_k = 0;        // clusters whose tokens have logits; 0: all tokens have
  std::vector<int32_t>
      cluster_tokens;  // [V]: the tokens of each cluster, one cluster after the other
  int64_t num_clusters = 0;
};

// A small decoder that guesses what a target model will say next ("assistant", transformers'
// gemma4_assistant): it has no keys and values of its own but reads the target's, of its last layer
// of the same kind that stores any, and the target's last hidden vector.
class Drafter {
 public:
  // InvalidArgument, naming the field, where the config does not belong to a drafter of `target`.
  static StatusOr<std::unique_ptr<Drafter>> Load(const DrafterConfig& config,
                                                 const TextModel& target, WeightStore weights,
                                                 const ProgressFn& progress);

  // One sequence of the target: the token that was chosen last, which its cache does not hold yet, and
  // the target's vector [B] after the final norm that it was chosen from.
  struct Row {
    KvCache* cache = nullptr;
    int32_t token = 0;
    const float* hidden = nullptr;
  };
  // The most likely `count` tokens after each row's, one after the other: drafts [rows, count]. At most
  // kMaxKernelRows rows.
  Status Draft(TextModel& target, std::span<const Row> rows, int64_t count,
               std::vector<int32_t>& drafts);

  const WeightStore& weights() const { return weights_; }
  uint64_t target_id() const { return target_id_; }

 private:
  Drafter() = default;
  // The most likely token after each row of y [R, h], the output of the final norm.
  Status Choose(ConstMatrix y, const MatmulPath& path, std::vector<int32_t>& tokens);
  Status ChooseAmongClusters(ConstMatrix y, const MatmulPath& path, std::vector<int32_t>& tokens);

  DrafterConfig config_;
  uint64_t target_id_ = 0;
  WeightStore weights_;
  TensorView embed_tokens_;     // [V, h], the output matrix
  TensorView pre_projection_;   // [h, 2 B]
  TensorView post_projection_;  // [B, h]
  TensorView centroids_;        // [clusters, h]; empty without clusters
  Norm final_norm_;
  std::vector<DecoderLayer> layers_;
  std::vector<int> kv_layers_;                 // the target's layer that each layer reads
  std::vector<std::vector<float>> inv_freqs_;  // one for each RopeSpec
  Arena arena_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_DRAFTER_H_
