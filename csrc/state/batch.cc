#include "state/batch.h"

namespace gemloupe {

void Batch::Append(KvCache* cache, const int32_t* tokens, int64_t count) {
  segments.push_back({cache, rows(), count, cache->length(), cache->length() + count});
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back(tokens[i]);
    positions.push_back(cache->length() + i);
  }
}

Batch Batch::Select(const std::vector<int64_t>& rows) const {
  Batch some;
  auto row = rows.begin();
  for (const Segment& segment : segments) {
    Segment part = segment;
    part.row = some.rows();
    for (; row != rows.end() && *row < segment.row + segment.rows; ++row) {
      some.ids.push_back(ids[static_cast<size_t>(*row)]);
      some.positions.push_back(positions[static_cast<size_t>(*row)]);
    }
    part.rows = some.rows() - part.row;
    if (part.rows > 0) part.position = some.positions[static_cast<size_t>(part.row)];
    some.segments.push_back(part);
  }
  return some;
}

}  // namespace gemloupe
