#include "runtime/run.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/memory.h"

namespace gemloupe {
namespace {

std::string Gibibytes(uint64_t bytes) {
  return absl::StrFormat("%.2f GiB", static_cast<double>(bytes) / (1 << 30));
}

// Gives a cache its content back when the work on it ends early, by a status or by an exception.
class RestoreUnlessDone {
 public:
  explicit RestoreUnlessDone(KvCache& cache) : cache_(cache), before_(cache.Fork()) {}
  RestoreUnlessDone(const RestoreUnlessDone&) = delete;
  RestoreUnlessDone& operator=(const RestoreUnlessDone&) = delete;
  ~RestoreUnlessDone() {
    if (!done_) cache_.Restore(*before_);
  }
  void Done() { done_ = true; }

 private:
  KvCache& cache_;
  std::shared_ptr<KvCache> before_;
  bool done_ = false;
};

Status CheckMemory(const std::vector<KvLayerSpec>& layers, const KvCacheOptions& options,
                   int64_t tokens, int64_t chunk, uint64_t held) {
  const uint64_t needed = KvCache::BytesNeeded(layers, options, tokens, chunk);
  const uint64_t available = AvailableMemory();
  if (needed <= held || needed - held <= available) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "a KV cache of ", tokens, " tokens in ", DTypeName(options.dtype), " needs ",
      Gibibytes(needed), ", but ", Gibibytes(available),
      " of memory is available; ask for fewer tokens (max_tokens=), or kv_dtype=\"float16\""));
}

}  // namespace

Status CheckRoom(const TextModel& model, const KvCache& cache, int64_t count, int64_t chunk) {
  if (cache.options().model_id != model.id()) {
    return absl::InvalidArgumentError(
        "the cache belongs to another model, expected one of this model; make it with this model's "
        "new_cache()");
  }
  for (int layer = 0; layer < static_cast<int>(cache.layers().size()); ++layer) {
    const bool own_entries = cache.layers()[static_cast<size_t>(layer)].source == layer;
    if (!own_entries || cache.storage(layer) != KvStorage::kDerived) continue;
    const auto& held = cache.layers()[static_cast<size_t>(layer)].key_weight;
    const auto& own = model.kv_layers()[static_cast<size_t>(layer)].key_weight;
    if (held == own || *held == *own) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "the cache derives the keys of layer ", layer,
        " from its values by the k_norm of other weights; expected one that was made under these "
        "(inside the block of model.override), or by new_cache(separate_keys=True)"));
  }
  const int64_t limit = cache.start() + cache.options().max_tokens;
  if (cache.length() + count > limit) {
    return absl::OutOfRangeError(absl::StrCat(
        "the sequence would reach ", cache.length() + count, " positions (", cache.length(),
        " held and ", count, " new), expected at most ", limit,
        limit == model.config().max_position_embeddings
            ? " (max_position_embeddings of this model); shorten the prompt or max_new_tokens"
            : " (max_tokens of this cache); make a larger cache with new_cache(max_tokens=)"));
  }
  const int64_t tokens = cache.length() - cache.start() + count;
  return CheckMemory(cache.layers(), cache.options(), tokens, chunk, cache.nbytes());
}

StatusOr<std::shared_ptr<KvCache>> NewCache(const TextModel& model, KvCacheOptions options,
                                            int64_t chunk) {
  const int64_t most = model.config().max_position_embeddings;
  if (options.start < 0 || options.start >= most) {
    return absl::OutOfRangeError(absl::StrCat("new_cache: start is ", options.start,
                                              ", expected 0 to ", most - 1,
                                              " (max_position_embeddings − 1)"));
  }
  if (options.max_tokens < 0 || options.max_tokens > most - options.start) {
    return absl::OutOfRangeError(absl::StrCat(
        "new_cache: max_tokens is ", options.max_tokens, ", expected 1 to ", most - options.start,
        " (max_position_embeddings ", most, " minus start ", options.start, ")"));
  }
  if (options.max_tokens > 0) {
    GL_RETURN_IF_ERROR(CheckMemory(model.kv_layers(), options, options.max_tokens, chunk, 0));
  } else {
    options.max_tokens = most - options.start;
  }
  options.model_id = model.id();
  return std::make_shared<KvCache>(model.kv_layers(), options);
}

Status Run(TextModel& model, const RunRequest& request, RunResult& result) {
  const auto count = static_cast<int64_t>(request.ids.size());
  const int64_t vocab = model.config().vocab_size;
  const bool scored = !request.targets.empty();
  if (scored && static_cast<int64_t>(request.targets.size()) != count) {
    return absl::InvalidArgumentError(absl::StrCat("there are ", request.targets.size(),
                                                   " targets, expected one for each of the ", count,
                                                   " ids"));
  }
  for (const int32_t target : request.targets) {
    if (target < -1 || target >= vocab) {
      return absl::InvalidArgumentError(absl::StrCat("target ", target,
                                                     " is outside the vocabulary (0 to ", vocab - 1,
                                                     "; −1 stands for none)"));
    }
  }
  KvCache& cache = *request.cache;
  GL_ASSIGN_OR_RETURN(const KvLease lease, KvLease::Take(request.cache));
  const MediaInput* media = request.media.get();
  if (media != nullptr) {
    GL_RETURN_IF_ERROR(media->Check(count, model.config().hidden_size, model.config().vocab_size));
  }
  const int64_t most = media == nullptr ? request.chunk : media->LongestChunk(request.chunk);
  GL_RETURN_IF_ERROR(CheckRoom(model, cache, count, most));
  const bool bidirectional = model.config().bidirectional == "all";
  // A pass that sees later positions can't be cut.
  const int64_t chunk = bidirectional ? count : std::max<int64_t>(1, request.chunk);
  RestoreUnlessDone restore(cache);
  const int64_t cols = request.vocab.empty() ? vocab : static_cast<int64_t>(request.vocab.size());
  result = {};
  result.logits.reserve(static_cast<size_t>((request.logits_end - request.logits_begin) * cols));
  std::vector<TokenScore> chunk_scores;
  std::vector<float> chunk_logits;
  int64_t end = 0;
  for (int64_t begin = 0; begin < count; begin = end) {
    end = std::min(count, begin + chunk);
    if (media != nullptr) end = media->ChunkEnd(begin, end);
    PassRequest pass;
    pass.batch.Append(&cache, request.ids.data() + begin, end - begin);
    if (media != nullptr) pass.batch.SetMedia(*media, begin);
    const int64_t first = std::clamp(request.logits_begin, begin, end);
    const int64_t last = std::clamp(request.logits_end, first, end);
    for (int64_t row = scored ? begin : first; row < (scored ? end : last); ++row) {
      pass.logits_rows.push_back(row - begin);
    }
    LogitsReading reading;
    if (scored) {
      reading.targets.assign(request.targets.begin() + begin, request.targets.begin() + end);
    }
    if (scored || !request.vocab.empty()) {
      reading.vocab = request.vocab;
      reading.given_begin = scored ? first - begin : 0;
      reading.given_end = reading.given_begin + last - first;
      reading.scores = &chunk_scores;
      pass.reading = &reading;
    }
    if (request.hooks != nullptr) pass.hooks = {request.hooks};
    if (!request.adapters.empty()) pass.adapters = {request.adapters};
    pass.first_layer = request.first_layer;
    if (request.resid_pre.rows > 0) pass.resid_pre = request.resid_pre.RowRange(begin, end - begin);
    pass.softcap = request.softcap;
    pass.stopped = request.stopped;
    GL_RETURN_IF_ERROR(model.Forward(pass, chunk_logits));
    if (begin == 0 && end == count) {
      result.logits.swap(chunk_logits);
    } else {
      result.logits.insert(result.logits.end(), chunk_logits.begin(), chunk_logits.end());
    }
    if (scored) {
      result.scores.insert(result.scores.end(), chunk_scores.begin(), chunk_scores.end());
    }
  }
  restore.Done();
  return absl::OkStatus();
}

}  // namespace gemloupe
