#include "state/batch.h"

#include <algorithm>

namespace gemloupe {

void Batch::Append(KvCache* cache, const int32_t* tokens, int64_t count) {
  segments.push_back({cache, rows(), count, cache->length(), cache->length() + count});
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back(tokens[i]);
    positions.push_back(cache->length() + i);
  }
}

void Batch::SetMedia(const MediaInput& media, int64_t begin) {
  const Segment& segment = segments.back();
  lookup_ids.insert(lookup_ids.end(), ids.begin() + static_cast<int64_t>(lookup_ids.size()),
                    ids.end());
  soft_tokens.resize(ids.size(), nullptr);
  block_ends.resize(ids.size(), 0);
  if (media.rows.empty()) return;
  const size_t width = media.soft_tokens.size() / media.rows.size();
  const auto first = std::lower_bound(media.rows.begin(), media.rows.end(), begin);
  for (auto row = first; row != media.rows.end() && *row < begin + segment.rows; ++row) {
    const auto at = static_cast<size_t>(segment.row + *row - begin);
    lookup_ids[at] = media.padding_id;
    soft_tokens[at] =
        media.soft_tokens.data() + static_cast<size_t>(row - media.rows.begin()) * width;
  }
  for (const auto& [block_begin, block_end] : media.blocks) {
    const int64_t last = std::min(block_end, begin + segment.rows);
    for (int64_t id = std::max(block_begin, begin); id < last; ++id) {
      block_ends[static_cast<size_t>(segment.row + id - begin)] = segment.position + last - begin;
    }
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
      if (!lookup_ids.empty()) {
        some.lookup_ids.push_back(lookup_ids[static_cast<size_t>(*row)]);
        some.soft_tokens.push_back(soft_tokens[static_cast<size_t>(*row)]);
        some.block_ends.push_back(block_ends[static_cast<size_t>(*row)]);
      }
    }
    part.rows = some.rows() - part.row;
    if (part.rows > 0) part.position = some.positions[static_cast<size_t>(part.row)];
    some.segments.push_back(part);
  }
  return some;
}

}  // namespace gemloupe
