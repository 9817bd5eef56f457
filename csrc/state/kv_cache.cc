#include "state/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

int64_t BlocksSpanning(int64_t begin, int64_t end) {
  return begin >= end ? 0 : (end - 1) / kKvBlock - begin / kKvBlock + 1;
}

KvBlockLayout LayoutOf(const KvLayerSpec& spec, const KvCacheOptions& options) {
  KvBlockLayout layout;
  layout.dtype = options.dtype;
  layout.num_heads = spec.num_heads;
  layout.head_dim = spec.head_dim;
  layout.pairs = spec.rope.pairs;
  layout.derived =
      spec.values_are_keys && !options.separate_keys && 2 * spec.rope.pairs < spec.head_dim;
  return layout;
}

}  // namespace

KvCache::KvCache(std::vector<KvLayerSpec> layers, const KvCacheOptions& options)
    : layers_(std::move(layers)), options_(options), storage_(layers_.size()) {
  for (int i = 0; i < static_cast<int>(layers_.size()); ++i) {
    const KvLayerSpec& spec = layers_[static_cast<size_t>(i)];
    layouts_.push_back(LayoutOf(spec, options_));
    GL_CHECK(!IsSource(i) || !layouts_.back().derived || spec.key_weight != nullptr);
  }
  for (Layer& layer : storage_) layer.first_block = options_.start / kKvBlock;
}

uint64_t KvCache::BytesNeeded(const std::vector<KvLayerSpec>& layers, const KvCacheOptions& options,
                              int64_t tokens, int64_t chunk) {
  uint64_t bytes = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].source != static_cast<int>(i)) continue;
    int64_t positions = tokens;
    if (layers[i].window > 0 && !options.full_sliding) {
      positions = std::min(tokens, layers[i].window - 1 + chunk + kKvBlock);
    }
    const int64_t blocks = (positions + kKvBlock - 1) / kKvBlock;
    bytes += static_cast<uint64_t>(blocks * LayoutOf(layers[i], options).bytes());
  }
  return bytes;
}

uint64_t KvCache::layer_nbytes(int layer) const {
  const Layer& stored = storage_[static_cast<size_t>(layer)];
  return (stored.blocks.size() + stored.spare.size()) * BlockBytes(layer);
}

uint64_t KvCache::nbytes() const {
  uint64_t bytes = 0;
  for (size_t i = 0; i < layers_.size(); ++i) bytes += layer_nbytes(static_cast<int>(i));
  return bytes;
}

KvStorage KvCache::storage(int layer) const {
  const auto source = static_cast<size_t>(layers_[static_cast<size_t>(layer)].source);
  return layouts_[source].derived ? KvStorage::kDerived : KvStorage::kSeparate;
}

uint64_t KvCache::shared_nbytes() const {
  uint64_t bytes = 0;
  for (const Layer& layer : storage_) {
    for (const auto& block : layer.blocks) bytes += block.use_count() > 1 ? block->size() : 0;
  }
  return bytes;
}

uint64_t KvCache::TotalBytes(const std::vector<const KvCache*>& caches) {
  absl::flat_hash_set<const AlignedBuffer*> counted;
  uint64_t bytes = 0;
  for (const KvCache* cache : caches) {
    for (const Layer& layer : cache->storage_) {
      for (const auto* blocks : {&layer.blocks, &layer.spare}) {
        for (const auto& block : *blocks) {
          if (counted.insert(block.get()).second) bytes += block->size();
        }
      }
    }
  }
  return bytes;
}

void KvCache::Reserve(int64_t count) {
  const int64_t end = length() + count;
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (!IsSource(static_cast<int>(i))) continue;
    Layer& layer = storage_[i];
    const int64_t last_block = (end - 1) / kKvBlock;
    while (layer.first_block + static_cast<int64_t>(layer.blocks.size()) <= last_block) {
      if (!layer.spare.empty()) {
        layer.blocks.push_back(std::move(layer.spare.back()));
        layer.spare.pop_back();
      } else {
        layer.blocks.push_back(std::make_shared<AlignedBuffer>(BlockBytes(static_cast<int>(i))));
      }
    }
    // Blocks that this pass will write must not be shared with a fork.
    for (int64_t block = length() / kKvBlock; block <= last_block; ++block) {
      WritableBlock(static_cast<int>(i), block);
    }
  }
}

uint8_t* KvCache::WritableBlock(int layer, int64_t block) {
  Layer& stored = storage_[static_cast<size_t>(layer)];
  auto& held = stored.blocks[static_cast<size_t>(block - stored.first_block)];
  if (held.use_count() > 1) {
    auto copy = std::make_shared<AlignedBuffer>(held->size());
    std::memcpy(copy->data(), held->data(), held->size());
    held = std::move(copy);
  }
  return held->data();
}

void KvCache::Write(int layer, int64_t position, ConstMatrix keys, ConstMatrix values) {
  GL_CHECK(IsSource(layer));
  const Layer& stored = storage_[static_cast<size_t>(layer)];
  const KvBlockLayout& layout = layouts_[static_cast<size_t>(layer)];
  for (int64_t row = 0; row < keys.rows; ++row) {
    const int64_t at = position + row;
    const auto block = static_cast<size_t>(at / kKvBlock - stored.first_block);
    WriteKeys(layout, stored.blocks[block]->data(), at % kKvBlock, keys.row(row));
    WriteValues(layout, stored.blocks[block]->data(), at % kKvBlock, values.row(row));
  }
}

KvView KvCache::View(int layer) const {
  const auto source = static_cast<size_t>(layers_[static_cast<size_t>(layer)].source);
  const KvLayerSpec& spec = layers_[source];
  const Layer& stored = storage_[source];
  KvView view;
  view.layout = layouts_[source];
  if (view.layout.derived) view.key_weight = spec.key_weight->data();
  view.chunks.grow = spec.window == 0;
  view.first_block = stored.first_block;
  view.blocks.reserve(stored.blocks.size());
  for (const auto& block : stored.blocks) view.blocks.push_back(block->data());
  return view;
}

void KvCache::Advance(const int32_t* ids, int64_t count) {
  tokens_.insert(tokens_.end(), ids, ids + count);
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (KeepsAll(static_cast<int>(i))) continue;
    Layer& layer = storage_[i];
    // The next query, at length(), sees positions from length() − window + 1 on.
    const int64_t oldest = std::max(options_.start, length() - layers_[i].window + 1);
    const int64_t leaving = std::min<int64_t>(oldest / kKvBlock - layer.first_block,
                                              static_cast<int64_t>(layer.blocks.size()));
    for (int64_t block = 0; block < leaving; ++block) {
      // One spare block is what decoding reuses; a long prefill's others go back to the system.
      auto& left = layer.blocks[static_cast<size_t>(block)];
      if (layer.spare.empty() && left.use_count() == 1) layer.spare.push_back(std::move(left));
    }
    if (leaving > 0) {
      layer.blocks.erase(layer.blocks.begin(), layer.blocks.begin() + leaving);
      layer.first_block += leaving;
    }
  }
}

void KvCache::AppendRandom(const std::vector<int32_t>& ids, uint32_t seed) {
  constexpr int64_t kPass = 512;
  int64_t widest = 0;
  for (const KvLayerSpec& spec : layers_) widest = std::max(widest, spec.num_heads * spec.head_dim);
  // A pass of rows, and as many floats more, so that each layer and pass can begin elsewhere in them.
  const int64_t needed = kPass * widest;
  std::vector<float> normal(static_cast<size_t>(2 * needed));
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  for (float& value : normal) value = distribution(generator);
  const auto somewhere = [&] {
    return normal.data() + generator() % static_cast<uint32_t>(needed + 1);
  };
  const auto total = static_cast<int64_t>(ids.size());
  for (int64_t begin = 0; begin < total; begin += kPass) {
    const int64_t count = std::min(kPass, total - begin);
    Reserve(count);
    for (int i = 0; i < static_cast<int>(layers_.size()); ++i) {
      if (!IsSource(i)) continue;
      const KvLayerSpec& spec = layers_[static_cast<size_t>(i)];
      const int64_t row = spec.num_heads * spec.head_dim;
      Write(i, length(), ConstMatrix(somewhere(), count, row),
            ConstMatrix(somewhere(), count, row));
    }
    Advance(ids.data() + begin, count);
  }
}

int64_t KvCache::ShortestLength() const {
  int64_t shortest = options_.start;
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (!IsSource(static_cast<int>(i)) || layers_[i].window == 0) continue;
    const int64_t first = FirstPosition(static_cast<int>(i));
    if (first > options_.start) shortest = std::max(shortest, first + layers_[i].window - 1);
  }
  return shortest;
}

Status KvCache::CheckHeld(const char* operation, int64_t length) const {
  if (length < options_.start || length > this->length()) {
    return absl::OutOfRangeError(absl::StrCat(operation, ": length is ", length, ", expected ",
                                              options_.start, " to ", this->length(),
                                              " (the positions held by this cache)"));
  }
  if (const int64_t smallest = ShortestLength(); length < smallest) {
    return absl::OutOfRangeError(
        absl::StrCat(operation, ": length is ", length,
                     ", but the sliding layers hold the window of positions from ", smallest,
                     " on only; ", operation, " to ", smallest,
                     " or more, or make the cache with sliding=\"full\" to keep every position"));
  }
  return absl::OkStatus();
}

Status KvCache::Truncate(int64_t length) {
  if (length == this->length()) return absl::OkStatus();
  GL_RETURN_IF_ERROR(CheckHeld("truncate", length));
  tokens_.resize(static_cast<size_t>(length - options_.start));
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = storage_[i];
    const int64_t keep = BlocksSpanning(layer.first_block * kKvBlock, length);
    while (static_cast<int64_t>(layer.blocks.size()) > keep) layer.blocks.pop_back();
  }
  return absl::OkStatus();
}

Status KvCache::Rewind(int64_t length) {
  if (length == this->length()) return absl::OkStatus();
  GL_RETURN_IF_ERROR(CheckHeld("rewind", length));
  tokens_.resize(static_cast<size_t>(length - options_.start));
  return absl::OkStatus();
}

void KvCache::SeparateKeys(int layer) {
  GL_CHECK(IsSource(layer));
  const auto index = static_cast<size_t>(layer);
  const KvBlockLayout derived = layouts_[index];
  if (!derived.derived) return;
  KvBlockLayout separate = derived;
  separate.derived = false;
  const auto row = static_cast<size_t>(derived.num_heads * derived.head_dim);
  std::vector<float> keys(row), values(row), scales(static_cast<size_t>(derived.num_heads));
  std::vector<uint8_t> bits(static_cast<size_t>(derived.num_heads * derived.value_bytes()));
  std::vector<std::shared_ptr<AlignedBuffer>> blocks;
  for (const auto& block : storage_[index].blocks) {
    auto converted = std::make_shared<AlignedBuffer>(static_cast<size_t>(separate.bytes()));
    for (int64_t at = 0; at < kKvBlock; ++at) {
      ReadKv(derived, layers_[index].key_weight->data(), block->data(), at, keys.data(),
             values.data());
      WriteKeys(separate, converted->data(), at, keys.data());
      ReadValueBits(derived, block->data(), at, bits.data(), scales.data());
      WriteValueBits(separate, converted->data(), at, bits.data(), scales.data());
    }
    blocks.push_back(std::move(converted));
  }
  layouts_[index] = separate;
  storage_[index].blocks = std::move(blocks);
  storage_[index].spare.clear();
}

std::shared_ptr<KvCache> KvCache::Fork() const {
  auto fork = std::make_shared<KvCache>(layers_, options_);
  fork->Restore(*this);
  return fork;
}

void KvCache::Restore(const KvCache& other) {
  tokens_ = other.tokens_;
  layouts_ = other.layouts_;
  for (size_t i = 0; i < storage_.size(); ++i) {
    storage_[i].first_block = other.storage_[i].first_block;
    storage_[i].first_position = other.storage_[i].first_position;
    storage_[i].blocks = other.storage_[i].blocks;
    storage_[i].spare.clear();
  }
}

int64_t KvCache::FirstPosition(int layer) const {
  const auto source = static_cast<size_t>(layers_[static_cast<size_t>(layer)].source);
  const Layer& stored = storage_[source];
  return std::max({options_.start, stored.first_block * kKvBlock, stored.first_position});
}

void KvCache::Read(int layer, int64_t begin, int64_t end, float* keys, float* values) const {
  const KvView view = View(layer);
  const int64_t row = view.layout.num_heads * view.layout.head_dim;
  for (int64_t at = begin; at < end; ++at) {
    const uint8_t* block = view.blocks[static_cast<size_t>(at / kKvBlock - view.first_block)];
    ReadKv(view.layout, view.key_weight, block, at % kKvBlock, keys + (at - begin) * row,
           values + (at - begin) * row);
  }
}

StatusOr<KvLease> KvLease::Take(std::shared_ptr<KvCache> cache) {
  if (!cache->TryAcquire()) {
    return absl::FailedPreconditionError(
        "this cache is in use by another call; wait for it, or work on cache.fork()");
  }
  return KvLease(std::move(cache));
}

}  // namespace gemloupe
