#ifndef GEMLOUPE_OPS_ATTENTION_H_
#define GEMLOUPE_OPS_ATTENTION_H_

#include <cstdint>
#include <vector>

#include "base/tensor.h"

namespace gemloupe {

// Positions of one block of cached keys or values. Blocks lie at absolute positions
// [64 b, 64 b + 64), so that how a sequence is cut into passes changes no sum.
inline constexpr int64_t kKvBlock = 64;

// The keys and values that one layer reads, for one sequence.
struct KvView {
  DType dtype = DType::kFloat32;
  int64_t num_heads = 0;  // K
  int64_t head_dim = 0;   // H
  int64_t first_block = 0;
  // Block first_block + i: [K, kKvBlock, H], element (head, position mod kKvBlock, dim).
  std::vector<const void*> keys;
  std::vector<const void*> values;
};

// Positions [begin, end) that a query may see. Causal, sliding and image-block masks are all such
// intervals.
struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// z [T, N · H] = softmax(q · kᵀ) · v per head, scaling 1, over ranges[t]; query head n reads
// key-value head n / (N / K). q [T, N · H]. Online softmax in float32 over blocks in ascending order:
// a row's bits depend on its own query, range and keys only.
void Attention(ConstMatrix q, const KvView& kv, const KeyRange* ranges, Matrix z);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_ATTENTION_H_
