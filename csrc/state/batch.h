#ifndef GEMLOUPE_STATE_BATCH_H_
#define GEMLOUPE_STATE_BATCH_H_

#include <cstdint>
#include <vector>

#include "ops/attention.h"
#include "state/kv_cache.h"
#include "state/media_input.h"

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
  // Of passes with media (else empty): the id [T] whose embeddings are looked up, the padding id at
  // soft tokens; the soft token [T], null for words; and the position [T] up to which a sliding layer's
  // query sees the rest of its block, 0 outside blocks.
  std::vector<int32_t> lookup_ids;
  std::vector<const float*> soft_tokens;
  std::vector<int64_t> block_ends;

  int64_t rows() const { return static_cast<int64_t>(positions.size()); }
  // The ids [T] of embedding tables.
  const std::vector<int32_t>& table_ids() const { return lookup_ids.empty() ? ids : lookup_ids; }

  // Appends `count` ids that continue the sequence of `cache`.
  void Append(KvCache* cache, const int32_t* tokens, int64_t count);
  // Puts the media of ids [begin, begin + rows) of its sequence into the last segment.
  void SetMedia(const MediaInput& media, int64_t begin);
  // These rows (ascending), as a batch of its own with the same segments, which may be empty.
  Batch Select(const std::vector<int64_t>& rows) const;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_STATE_BATCH_H_
