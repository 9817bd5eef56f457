#ifndef GEMLOUPE_OPS_TOKEN_SCORES_H_
#define GEMLOUPE_OPS_TOKEN_SCORES_H_

#include <cstdint>

#include "base/tensor.h"

namespace gemloupe {

// What softmax(logits) of one row says, in nats.
struct TokenScore {
  float logprob = 0.0f;  // of the target; nan without one
  float entropy = 0.0f;
};

// scores[t] of each row of logits [T, V]; targets[t] is an id, −1 for none. Sums are in float64.
void ScoreTokens(ConstMatrix logits, const int32_t* targets, TokenScore* scores);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_TOKEN_SCORES_H_
