#ifndef GEMLOUPE_STATE_BATCH_H_
#define GEMLOUPE_STATE_BATCH_H_

#include <cstdint>
#include <vector>

#include "ops/attention.h"
#include "state/kv_cache.h"

namespace gemloupe {

// Consecutive rows of a pass that belong to one sequence, in ascending positions.
struct Segment {
  KvCache* cache = nullptr;
  int64_t row = 0;       // its first row in the pass
  int64_t rows = 0;      // T of this sequence
  int64_t position = 0;  // absolute position of its first row
  int64_t end = 0;       // position after the last one that the pass gives this sequence
};

// The rows of one pass: T tokens of one or several sequences.
struct Batch {
  std::vector<int32_t> ids;        // [T]
  std::vector<int64_t> positions;  // [T]
  std::vector<Segment> segments;   // in row order

  int64_t rows() const { return static_cast<int64_t>(positions.size()); }

  // Appends `count` ids that continue the sequence of `cache`.
  void Append(KvCache* cache, const int32_t* tokens, int64_t count);
  // These rows (ascending), as a batch of its own with the same segments, which may be empty.
  Batch Select(const std::vector<int64_t>& rows) const;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_STATE_BATCH_H_
