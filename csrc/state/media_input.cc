#include "state/media_input.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace gemloupe {

Status MediaInput::Check(int64_t count, int64_t hidden_size, int64_t vocab_size) const {
  const auto wanted = static_cast<int64_t>(rows.size()) * hidden_size;
  if (static_cast<int64_t>(soft_tokens.size()) != wanted) {
    return absl::InvalidArgumentError(absl::StrCat("soft tokens have ", soft_tokens.size(),
                                                   " values, expected ", rows.size(), " rows of ",
                                                   hidden_size, " (hidden_size)"));
  }
  int64_t next = 0;
  for (const int64_t row : rows) {
    if (row < next || row >= count) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a soft token stands for id ", row, ", expected ascending indices of ", count, " ids"));
    }
    next = row + 1;
  }
  next = 0;
  for (const auto& [begin, end] : blocks) {
    if (begin < next || end <= begin || end > count) {
      return absl::InvalidArgumentError(absl::StrCat("a block of soft tokens is [", begin, ", ",
                                                     end, "), expected ascending ranges of ", count,
                                                     " ids"));
    }
    next = end;
  }
  if (padding_id < 0 || padding_id >= vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("the padding id is ", padding_id, ", expected 0 to ", vocab_size - 1));
  }
  return absl::OkStatus();
}

int64_t MediaInput::ChunkEnd(int64_t begin, int64_t end) const {
  for (const auto& [first, last] : blocks) {
    if (first < end && end < last) return first > begin ? first : last;
  }
  return end;
}

int64_t MediaInput::LongestChunk(int64_t chunk) const {
  for (const auto& [first, last] : blocks) chunk = std::max(chunk, last - first);
  return chunk;
}

}  // namespace gemloupe
