#include "ops/token_scores.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "ops/dispatch.h"

namespace gemloupe {
namespace {

// Exponentials that are summed in float32 before they join the float64 sum.
constexpr int64_t kPart = 1024;
constexpr int64_t kLanes = 8;

// weight · (logit − shift), where a weight of 0 counts as nothing (its logit may be −infinity).
inline float Term(float weight, float logit, float shift) {
  return weight == 0.0f ? 0.0f : weight * (logit - shift);
}

double WeightedSum(const float* weights, const float* logits, float shift, int64_t count) {
  std::array<double, kLanes> sums = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[static_cast<size_t>(lane)] += Term(weights[i + lane], logits[i + lane], shift);
    }
  }
  for (; i < count; ++i) sums[0] += Term(weights[i], logits[i], shift);
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

TokenScore ScoreRow(const float* logits, int64_t vocab, int32_t target) {
  const float largest = Kernels().max(logits, vocab);
  std::array<float, kPart> weights;
  double sum = 0.0;
  double weighted = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kPart) {
    const int64_t count = std::min(kPart, vocab - begin);
    sum += Kernels().exp_sum(weights.data(), logits + begin, largest, count);
    weighted += WeightedSum(weights.data(), logits + begin, largest, count);
  }
  const double log_sum = std::log(sum);
  TokenScore score;
  score.entropy = static_cast<float>(log_sum - weighted / sum);
  score.logprob = target < 0 ? std::numeric_limits<float>::quiet_NaN()
                             : static_cast<float>(static_cast<double>(logits[target]) -
                                                  static_cast<double>(largest) - log_sum);
  return score;
}

}  // namespace

void ScoreTokens(ConstMatrix logits, const int32_t* targets, TokenScore* scores) {
  // Exponentials cost several times what reading their logits does.
  ForRows(logits.rows, logits.cols * 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scores[row] = ScoreRow(logits.row(row), logits.cols, targets[row]);
    }
  });
}

}  // namespace gemloupe
