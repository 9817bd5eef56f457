#include "state/batch.h"

namespace gemloupe {

void Batch::Append(KvCache* cache, const int32_t* tokens, int64_t count) {
  segments.push_back({cache, rows(), count, cache->length()});
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back(tokens[i]);
    positions.push_back(cache->length() + i);
  }
}

Batch Batch::LastRows() const {
  Batch last;
  for (const Segment& segment : segments) {
    const int64_t row = segment.row + segment.rows - 1;
    last.segments.push_back({segment.cache, last.rows(), 1, segment.position + segment.rows - 1});
    last.ids.push_back(ids[static_cast<size_t>(row)]);
    last.positions.push_back(positions[static_cast<size_t>(row)]);
  }
  return last;
}

}  // namespace gemloupe
