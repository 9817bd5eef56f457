#ifndef GEMLOUPE_RUNTIME_RUN_H_
#define GEMLOUPE_RUNTIME_RUN_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/status.h"
#include "inspect/hooks.h"
#include "models/text_model.h"
#include "state/kv_cache.h"

namespace gemloupe {

inline constexpr int64_t kDefaultChunk = 512;

// One sequence through the model, in chunks.
struct RunRequest {
  std::vector<int32_t> ids;
  std::shared_ptr<KvCache> cache;  // the tokens are appended to it
  int64_t logits_begin = 0;        // rows [logits_begin, logits_end) of ids give logits
  int64_t logits_end = 0;
  std::vector<int32_t> vocab;    // the columns of logits that are given; empty: all
  std::vector<int32_t> targets;  // one for each of ids, −1 for none; empty: no scores
  Hooks* hooks = nullptr;
  AdapterMix adapters;
  std::shared_ptr<const MediaInput> media;  // of ids; null: words only
  // As in PassRequest; resid_pre [ids, D].
  int first_layer = 0;
  ConstMatrix resid_pre;
  std::optional<float> softcap;
  int64_t chunk = kDefaultChunk;
  std::function<bool()> stopped;
};

struct RunResult {
  std::vector<float> logits;       // [logits_end − logits_begin, V or vocab]
  std::vector<TokenScore> scores;  // [ids], with targets
};

// On any error the cache is as it was.
Status Run(TextModel& model, const RunRequest& request, RunResult& result);

// OutOfRange or ResourceExhausted, with the figures, if `cache` can't take `count` more tokens.
Status CheckRoom(const TextModel& model, const KvCache& cache, int64_t count, int64_t chunk);

// A new cache for `model`; max_tokens 0 stands for the model's maximum. ResourceExhausted, before
// allocating, if an explicit max_tokens does not fit in memory.
StatusOr<std::shared_ptr<KvCache>> NewCache(const TextModel& model, KvCacheOptions options,
                                            int64_t chunk);

}  // namespace gemloupe

#endif  // GEMLOUPE_RUNTIME_RUN_H_
