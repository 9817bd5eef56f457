#ifndef GEMLOUPE_RUNTIME_SAMPLER_H_
#define GEMLOUPE_RUNTIME_SAMPLER_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"

namespace gemloupe {

struct SamplingOptions {
  float temperature = 1.0f;         // 0: greedy
  int64_t top_k = 0;                // 0: off
  float top_p = 1.0f;               // 1: off
  float min_p = 0.0f;               // 0: off
  float repetition_penalty = 1.0f;  // 1: off
  uint64_t seed = 0;
  std::vector<int32_t> suppress;  // ids that are never chosen, greedy included
};

// Log-probability of one token, and the most likely ones: (id, log-probability) descending.
struct TokenLogprobs {
  float logprob = 0.0f;
  std::vector<std::pair<int32_t, float>> top;
};

// Chooses the tokens of one sequence. The draw depends on the seed and on the number of tokens drawn
// only, so that a sequence is the same alone and in a batch.
class Sampler {
 public:
  explicit Sampler(SamplingOptions options) : options_(std::move(options)) {}

  // Tokens of the prompt, for the repetition penalty.
  void Observe(const std::vector<int32_t>& ids) { seen_.insert(ids.begin(), ids.end()); }

  // The next token for logits [V] after the soft-cap. Order: `allowed` (see TokenMask; null: any
  // id), repetition penalty, suppressed ids, temperature, top_k, top_p, min_p. `logits` is changed.
  int32_t Next(float* logits, int64_t vocab, const uint32_t* allowed = nullptr);

 private:
  double NextUniform();

  SamplingOptions options_;
  absl::flat_hash_set<int32_t> seen_;
  uint64_t draws_ = 0;
};

// log softmax(logits)[id], and of the `count` most likely ids (ties: the lower id first).
TokenLogprobs ComputeLogprobs(const float* logits, int64_t vocab, int32_t id, int count);

}  // namespace gemloupe

#endif  // GEMLOUPE_RUNTIME_SAMPLER_H_
