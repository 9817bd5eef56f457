#ifndef GEMLOUPE_STATE_MEDIA_INPUT_H_
#define GEMLOUPE_STATE_MEDIA_INPUT_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "base/status.h"
#include "base/tensor.h"

namespace gemloupe {

// What a sequence of ids holds beside words: soft tokens of images and sounds.
struct MediaInput {
  std::vector<int64_t> rows;       // indices of the ids that they replace, ascending
  std::vector<float> soft_tokens;  // [rows, D], as the first layer reads them: no scale is applied
  int32_t padding_id = 0;          // whose per-layer embedding these rows have
  // Ranges [begin, end) of ids, ascending and apart, each of which sees itself whole in sliding layers.
  std::vector<std::pair<int64_t, int64_t>> blocks;

  // InvalidArgument where this does not belong to `count` ids of a model of this width and vocabulary.
  Status Check(int64_t count, int64_t hidden_size, int64_t vocab_size) const;
  // Where a chunk [begin, end) must end so that no block is cut: before the block, or behind it where
  // the block begins the chunk.
  int64_t ChunkEnd(int64_t begin, int64_t end) const;
  // The most ids of one chunk, if `chunk` is asked for.
  int64_t LongestChunk(int64_t chunk) const;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_STATE_MEDIA_INPUT_H_
