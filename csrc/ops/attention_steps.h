#ifndef GEMLOUPE_OPS_ATTENTION_STEPS_H_
#define GEMLOUPE_OPS_ATTENTION_STEPS_H_

#include <cstdint>

#include "base/tensor.h"
#include "ops/attention.h"

namespace gemloupe {

// Attention in three steps that materialise what `Attention` keeps to itself, for hooks. Rows of
// scores and patterns are [N · T] (head n, row t: n · T + t), their columns the positions 0 … S − 1.
// keys and values [S, K · H] float32.

// scores = q · kᵀ inside the range of each row, −inf outside. q [T, N · H].
void AttentionScores(ConstMatrix q, ConstMatrix keys, int64_t head_dim, const KeyRange* ranges,
                     Matrix scores);

// pattern = softmax(scores), 0 outside the ranges; a row whose scores are all −inf becomes zeros.
void AttentionPattern(ConstMatrix scores, int64_t rows, const KeyRange* ranges, Matrix pattern);

// z [T, N · H] = pattern · values.
void AttentionOutput(ConstMatrix pattern, ConstMatrix values, int64_t head_dim,
                     const KeyRange* ranges, Matrix z);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_ATTENTION_STEPS_H_
