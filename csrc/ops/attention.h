#ifndef GEMLOUPE_OPS_ATTENTION_H_
#define GEMLOUPE_OPS_ATTENTION_H_

#include <cstdint>
#include <vector>

#include "base/tensor.h"
#include "ops/kv_block.h"

namespace gemloupe {

// Chunks of positions: kShort each, and from position kLongFrom on kLong where `grow`. Short ones give
// every thread work in a short sequence; in a long one their partial results would be 6 % of the traffic.
struct KvChunks {
  static constexpr int64_t kShort = 2 * kKvBlock;
  static constexpr int64_t kLong = 8 * kKvBlock;
  static constexpr int64_t kLongFrom = 4 * kLong;
  bool grow = true;

  // The chunk of a position, and the first position of a chunk.
  int64_t Of(int64_t position) const {
    if (!grow || position < kLongFrom) return position / kShort;
    return kLongFrom / kShort + (position - kLongFrom) / kLong;
  }
  int64_t Begin(int64_t chunk) const {
    if (!grow || chunk * kShort < kLongFrom) return chunk * kShort;
    return kLongFrom + (chunk - kLongFrom / kShort) * kLong;
  }
};

// The keys and values that one layer reads, for one sequence.
struct KvView {
  KvBlockLayout layout;
  const float* key_weight = nullptr;  // w [H] where the layout is derived
  // The softmax of a row is the merge, in ascending order, of its softmax over each chunk of absolute
  // positions: chunks are what threads share when there are few rows, and they are always there, so
  // that threads change no bit.
  KvChunks chunks;
  int64_t first_block = 0;
  std::vector<const uint8_t*> blocks;  // block first_block + i
};

// Positions [begin, end) that a query may see. Causal, sliding and image-block masks are all such
// intervals.
struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// z [T, N · H] = softmax(q · kᵀ) · v per head, scaling 1, over ranges[t] (not empty; begin and end
// ascend with t); query head n reads key-value head n / (N / K). q [T, N · H]. Online softmax in
// float32 over blocks in ascending order: a row's bits depend on its own query, range and keys only.
void Attention(ConstMatrix q, const KvView& kv, const KeyRange* ranges, Matrix z);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_ATTENTION_H_
