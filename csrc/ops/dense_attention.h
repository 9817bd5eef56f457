#ifndef GEMLOUPE_OPS_DENSE_ATTENTION_H_
#define GEMLOUPE_OPS_DENSE_ATTENTION_H_

#include <cstdint>

#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"
#include "ops/linear.h"

namespace gemloupe {

// Attention of all rows to all rows, without mask and cache: z [T, N · H] = softmax(q · kᵀ) · v per
// head, scaling 1. q [T, N · H]; k and v [T, K · H], query head n reads key-value head n / (N / K).
// Beside kᵀ or vᵀ it needs room for some rows of scores a thread, not for [T, T].
Status DenseAttention(ConstMatrix q, ConstMatrix k, ConstMatrix v, int64_t head_dim, Matrix z,
                      const MatmulPath& path, Arena& arena);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_DENSE_ATTENTION_H_
