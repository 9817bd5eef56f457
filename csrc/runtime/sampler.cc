#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/dispatch.h"

namespace gemloupe {
namespace {

struct Candidate {
  float logit;
  int32_t id;
};

// Descending logit, then ascending id; NaN last, so that the order is strict.
bool Before(const Candidate& a, const Candidate& b) {
  if (std::isnan(a.logit) || std::isnan(b.logit))
    return !std::isnan(a.logit) && std::isnan(b.logit);
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// The `count` first candidates in order, without sorting the rest.
std::vector<Candidate> Largest(const float* logits, int64_t vocab, int64_t count) {
  std::vector<Candidate> kept;
  kept.reserve(static_cast<size_t>(std::min(count, vocab)) + 1);
  // A heap whose front is the worst kept candidate.
  for (int64_t id = 0; id < vocab; ++id) {
    const Candidate candidate{logits[id], static_cast<int32_t>(id)};
    if (static_cast<int64_t>(kept.size()) < count) {
      kept.push_back(candidate);
      std::push_heap(kept.begin(), kept.end(), Before);
    } else if (Before(candidate, kept.front())) {
      std::pop_heap(kept.begin(), kept.end(), Before);
      kept.back() = candidate;
      std::push_heap(kept.begin(), kept.end(), Before);
    }
  }
  std::sort_heap(kept.begin(), kept.end(), Before);
  return kept;
}

// Makes every id whose bit is not set impossible.
void Forbid(float* logits, int64_t vocab, const uint32_t* allowed) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  for (int64_t begin = 0; begin < vocab; begin += 32) {
    const uint32_t word = allowed[begin / 32];
    const int64_t end = std::min(vocab, begin + 32);
    if (word == 0) {
      std::fill(logits + begin, logits + end, kNever);
    } else if (word != ~uint32_t{0}) {
      for (int64_t id = begin; id < end; ++id) {
        if ((word >> (id - begin) & 1) == 0) logits[id] = kNever;
      }
    }
  }
}

// splitmix64 (Steele, Lea and Flood, 2014): a full-period mix of a counter.
uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

double Sampler::NextUniform() {
  const uint64_t bits = Mix(Mix(options_.seed) + draws_++);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

int32_t Sampler::Next(float* logits, int64_t vocab, const uint32_t* allowed) {
  if (allowed != nullptr) Forbid(logits, vocab, allowed);
  if (options_.repetition_penalty != 1.0f) {
    for (const int32_t id : seen_) {
      float& logit = logits[id];
      logit = logit > 0 ? logit / options_.repetition_penalty : logit * options_.repetition_penalty;
    }
  }
  for (const int32_t id : options_.suppress) {
    logits[id] = -std::numeric_limits<float>::infinity();
  }
  int32_t chosen = 0;
  if (options_.temperature == 0.0f) {
    chosen = Largest(logits, vocab, 1)[0].id;
  } else {
    const int64_t kept = options_.top_k > 0 ? std::min(options_.top_k, vocab) : vocab;
    std::vector<Candidate> candidates = Largest(logits, vocab, kept);
    const double best = candidates[0].logit;
    std::vector<double> probs(candidates.size());
    double total = 0.0;
    for (size_t i = 0; i < candidates.size(); ++i) {
      probs[i] = std::exp((candidates[i].logit - best) / static_cast<double>(options_.temperature));
      if (!(probs[i] >= 0.0)) probs[i] = 0.0;  // NaN, or −infinity minus itself
      total += probs[i];
    }
    size_t count = candidates.size();
    if (options_.top_p < 1.0f) {
      // The shortest prefix whose probability reaches top_p.
      double sum = 0.0;
      count = 0;
      while (count < probs.size() && (count == 0 || sum < options_.top_p * total)) {
        sum += probs[count++];
      }
    }
    if (options_.min_p > 0.0f) {
      while (count > 1 && probs[count - 1] < options_.min_p * probs[0]) --count;
    }
    double mass = 0.0;
    for (size_t i = 0; i < count; ++i) mass += probs[i];
    double left = NextUniform() * mass;
    size_t at = 0;
    while (at + 1 < count && left >= probs[at]) left -= probs[at++];
    chosen = candidates[at].id;
  }
  seen_.insert(chosen);
  return chosen;
}

TokenLogprobs ComputeLogprobs(const float* logits, int64_t vocab, int32_t id, int count) {
  const float max = Kernels().max(logits, vocab);
  const float log_sum = max + std::log(Kernels().exp_sum(nullptr, logits, max, vocab));
  TokenLogprobs result;
  result.logprob = logits[id] - log_sum;
  if (count > 0) {
    for (const Candidate& candidate : Largest(logits, vocab, std::min<int64_t>(count, vocab))) {
      result.top.emplace_back(candidate.id, candidate.logit - log_sum);
    }
  }
  return result;
}

}  // namespace gemloupe
