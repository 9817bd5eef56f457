// The stored bits of a KV cache, for files.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "state/kv_cache.h"

namespace gemloupe {
namespace {

// Where the rows of one position begin in a layer's bits.
struct BitOffsets {
  explicit BitOffsets(const KvBlockLayout& layout)
      : keys(static_cast<size_t>(layout.num_heads * layout.key_bytes())),
        values(static_cast<size_t>(layout.num_heads * layout.value_bytes())),
        scales(layout.scaled() ? static_cast<size_t>(layout.num_heads) : 0) {}
  size_t keys, values, scales;  // sizes of one position's rows
};

}  // namespace

KvLayerBits KvCache::ReadBits(int layer) const {
  GL_CHECK(IsSource(layer));
  const KvView view = View(layer);
  const BitOffsets one(view.layout);
  const int64_t first = FirstPosition(layer);
  const auto count = static_cast<size_t>(std::max<int64_t>(0, length() - first));
  KvLayerBits bits;
  bits.keys.resize(count * one.keys);
  bits.values.resize(count * one.values);
  bits.key_scales.resize(count * one.scales);
  bits.value_scales.resize(count * one.scales);
  for (size_t i = 0; i < count; ++i) {
    const int64_t position = first + static_cast<int64_t>(i);
    const uint8_t* block = view.blocks[static_cast<size_t>(position / kKvBlock - view.first_block)];
    ReadKeyBits(view.layout, block, position % kKvBlock, bits.keys.data() + i * one.keys,
                bits.key_scales.data() + i * one.scales);
    ReadValueBits(view.layout, block, position % kKvBlock, bits.values.data() + i * one.values,
                  bits.value_scales.data() + i * one.scales);
  }
  return bits;
}

Status KvCache::Adopt(std::vector<int32_t> tokens, const std::vector<int64_t>& first) {
  if (!tokens_.empty()) {
    return absl::FailedPreconditionError("the cache holds tokens, expected an empty one");
  }
  const auto count = static_cast<int64_t>(tokens.size());
  if (count > options_.max_tokens || first.size() != layers_.size()) {
    return absl::InvalidArgumentError(absl::StrCat(count, " tokens in ", first.size(),
                                                   " layers, expected at most ",
                                                   options_.max_tokens, " in ", layers_.size()));
  }
  const int64_t end = options_.start + count;
  std::vector<Layer> storage(layers_.size());
  for (int i = 0; i < static_cast<int>(layers_.size()); ++i) {
    const auto index = static_cast<size_t>(i);
    Layer& layer = storage[index];
    layer.first_block = options_.start / kKvBlock;
    if (!IsSource(i)) continue;
    const int64_t latest =
        KeepsAll(i) ? options_.start : std::max(options_.start, end - layers_[index].window + 1);
    if (first[index] < options_.start || first[index] > latest) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", i, " holds positions from ",
                                                     first[index], " on, expected from ",
                                                     options_.start, " to ", latest, " on"));
    }
    layer.first_position = first[index];
    layer.first_block = first[index] / kKvBlock;
    for (int64_t block = layer.first_block; block * kKvBlock < end; ++block) {
      layer.blocks.push_back(std::make_shared<AlignedBuffer>(BlockBytes(i)));
    }
  }
  storage_ = std::move(storage);
  tokens_ = std::move(tokens);
  return absl::OkStatus();
}

Status KvCache::WriteBits(int layer, const KvLayerBits& bits) {
  GL_CHECK(IsSource(layer));
  const KvBlockLayout& layout = layouts_[static_cast<size_t>(layer)];
  const BitOffsets one(layout);
  const int64_t first = FirstPosition(layer);
  const auto count = static_cast<size_t>(std::max<int64_t>(0, length() - first));
  if (bits.keys.size() != count * one.keys || bits.values.size() != count * one.values ||
      bits.key_scales.size() != count * one.scales ||
      bits.value_scales.size() != count * one.scales) {
    return absl::InvalidArgumentError(absl::StrCat(
        "layer ", layer, " has ", bits.keys.size(), " bytes of keys and ", bits.values.size(),
        " of values, expected ", count * one.keys, " and ", count * one.values));
  }
  for (size_t i = 0; i < count; ++i) {
    const int64_t position = first + static_cast<int64_t>(i);
    uint8_t* block = WritableBlock(layer, position / kKvBlock);
    WriteKeyBits(layout, block, position % kKvBlock, bits.keys.data() + i * one.keys,
                 bits.key_scales.data() + i * one.scales);
    WriteValueBits(layout, block, position % kKvBlock, bits.values.data() + i * one.values,
                   bits.value_scales.data() + i * one.scales);
  }
  return absl::OkStatus();
}

}  // namespace gemloupe
