// The KV cache by itself: separating derived keys, rewinding, and what forks keep.
#include "state/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "ops/dispatch.h"

namespace gemloupe {
namespace {

using Floats = std::vector<float>;

constexpr int64_t kHeads = 2, kHeadDim = 36, kPairs = 5, kRow = kHeads * kHeadDim;
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBfloat16, DType::kInt8};

Floats Normal(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

struct Entries {
  Floats keys, values;  // [S, K · H]
  bool operator==(const Entries&) const = default;
};

// Keys that a layer with values as keys could have: w ⊙ v outside the rotated dims.
Entries RandomEntries(const Floats& weight, int64_t count, uint32_t seed) {
  Entries entries{Normal(count * kRow, seed), Normal(count * kRow, seed + 1)};
  for (int64_t i = 0; i < count * kRow; ++i) {
    const int64_t dim = i % kHeadDim % (kHeadDim / 2);
    const auto at = static_cast<size_t>(i);
    if (dim >= kPairs) entries.keys[at] = entries.values[at] * weight[at % kHeadDim];
  }
  return entries;
}

// Layer 0 slides over `window` positions (0: sees all), layer 1 has values as keys, 2 shares with 1.
class KvCacheOf : public testing::TestWithParam<DType> {
 protected:
  void SetUp() override { ASSERT_TRUE(InitDispatch().ok()); }

  std::unique_ptr<KvCache> Make(int64_t window, bool full_sliding = false,
                                int64_t start = 0) const {
    KvLayerSpec sliding, full;
    sliding.window = window;
    sliding.num_heads = full.num_heads = kHeads;
    sliding.head_dim = full.head_dim = kHeadDim;
    sliding.rope = {1e4f, 1.0f, kHeadDim, kHeadDim / 2};
    full.source = 1;
    full.values_are_keys = true;
    full.rope = {1e6f, 1.0f, kHeadDim, kPairs};
    full.key_weight = std::make_shared<const Floats>(weight_);
    KvCacheOptions options;
    options.dtype = GetParam();
    options.max_tokens = 1000;
    options.full_sliding = full_sliding;
    options.start = start;
    return std::make_unique<KvCache>(std::vector<KvLayerSpec>{sliding, full, full}, options);
  }

  // A pass of `count` tokens whose entries only the layers of `layers` write.
  void Append(KvCache& cache, int64_t count, uint32_t seed, const std::vector<int>& layers) const {
    cache.Reserve(count);
    for (const int layer : layers) {
      const Entries entries = RandomEntries(weight_, count, seed + static_cast<uint32_t>(layer));
      cache.Write(layer, cache.length(), ConstMatrix(entries.keys.data(), count, kRow),
                  ConstMatrix(entries.values.data(), count, kRow));
    }
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(seed + i);
    cache.Advance(ids.data(), count);
  }

  static Entries Read(const KvCache& cache, int layer) {
    const int64_t first = cache.FirstPosition(layer);
    Entries entries;
    entries.keys.resize(static_cast<size_t>((cache.length() - first) * kRow));
    entries.values.resize(entries.keys.size());
    cache.Read(layer, first, cache.length(), entries.keys.data(), entries.values.data());
    return entries;
  }

  // Keys are rounded to the cache's dtype once more when they are separated.
  static float KeyStep(const Floats& keys, size_t i) {
    const size_t row = i / kHeadDim * kHeadDim;
    float largest = 0.0f;
    for (size_t d = 0; d < kHeadDim; ++d) largest = std::max(largest, std::fabs(keys[row + d]));
    switch (GetParam()) {
      case DType::kFloat32: return 0.0f;
      case DType::kFloat16: return std::fabs(keys[i]) * 0x1p-11f + 0x1p-25f;
      case DType::kBfloat16: return std::fabs(keys[i]) * 0x1p-8f;
      default: return largest / 254.0f * 1.001f;
    }
  }

  const Floats weight_ = Normal(kHeadDim, 77);
};
INSTANTIATE_TEST_SUITE_P(, KvCacheOf, testing::ValuesIn(kDTypes),
                         [](const auto& info) { return DTypeName(info.param); });

TEST_P(KvCacheOf, SeparatedKeysAreThoseThatWereReadAndValuesKeepTheirBits) {
  const auto cache = Make(0);
  Append(*cache, 150, 1, {0, 1});
  const Entries before = Read(*cache, 1), other = Read(*cache, 0);
  const uint64_t bytes = cache->layer_nbytes(1);
  cache->SeparateKeys(1);
  EXPECT_EQ(cache->storage(1), KvStorage::kSeparate);
  EXPECT_EQ(cache->storage(2), KvStorage::kSeparate);
  EXPECT_GT(cache->layer_nbytes(1), bytes);
  const Entries after = Read(*cache, 1);
  EXPECT_EQ(after.values, before.values);
  for (size_t i = 0; i < after.keys.size(); ++i) {
    ASSERT_LE(std::fabs(after.keys[i] - before.keys[i]), KeyStep(before.keys, i)) << i;
  }
  EXPECT_EQ(Read(*cache, 2), after);
  EXPECT_EQ(Read(*cache, 0), other);
  cache->SeparateKeys(1);
  EXPECT_EQ(Read(*cache, 1), after);
}

TEST_P(KvCacheOf, AWriteAfterSeparatingStoresKeysWhole) {
  const auto cache = Make(0);
  Append(*cache, 70, 1, {0, 1});
  cache->Reserve(1);
  cache->SeparateKeys(1);  // within a pass: its block is there already
  const Floats keys = Normal(kRow, 5), values = Normal(kRow, 6);
  cache->Write(1, 70, ConstMatrix(keys.data(), 1, kRow), ConstMatrix(values.data(), 1, kRow));
  const int32_t id = 3;
  cache->Advance(&id, 1);
  const Entries after = Read(*cache, 1);
  for (size_t i = 0; i < keys.size(); ++i) {
    ASSERT_LE(std::fabs(after.keys[70 * kRow + i] - keys[i]), KeyStep(keys, i)) << i;
  }
}

TEST_P(KvCacheOf, ForksKeepTheirLayoutAndRestoreTakesIt) {
  const auto cache = Make(0);
  Append(*cache, 130, 1, {0, 1});
  const auto derived = cache->Fork();
  const Entries before = Read(*derived, 1);
  cache->SeparateKeys(1);
  EXPECT_EQ(derived->storage(1), KvStorage::kDerived);
  EXPECT_EQ(Read(*derived, 1), before);
  const Entries separated = Read(*cache, 1);
  const auto separate = cache->Fork();
  EXPECT_EQ(separate->storage(1), KvStorage::kSeparate);
  EXPECT_EQ(Read(*separate, 1), separated);
  Append(*separate, 40, 9, {0, 1});
  EXPECT_EQ(Read(*cache, 1), separated);
  ASSERT_TRUE(separate->Truncate(130).ok());
  EXPECT_EQ(Read(*separate, 1), separated);
  cache->Restore(*derived);
  EXPECT_EQ(cache->storage(1), KvStorage::kDerived);
  EXPECT_EQ(Read(*cache, 1), before);
}

TEST_P(KvCacheOf, LayersThatARewoundPassDoesNotWriteKeepTheirEntries) {
  for (const bool full_sliding : {false, true}) {
    const auto cache = Make(full_sliding ? 20 : 1000, full_sliding);
    Append(*cache, 200, 1, {0, 1});
    const auto fork = cache->Fork();
    const Entries kept = Read(*cache, 0), replaced = Read(*cache, 1);
    const uint64_t bytes = cache->nbytes();
    ASSERT_TRUE(cache->Rewind(61).ok());
    EXPECT_EQ(cache->length(), 61);
    EXPECT_EQ(cache->nbytes(), bytes);
    Append(*cache, 9, 50, {1});
    Append(*cache, 130, 60, {1});
    EXPECT_EQ(cache->length(), 200);
    EXPECT_EQ(cache->tokens()[60], 61);
    EXPECT_EQ(cache->tokens()[61], 50);
    EXPECT_EQ(Read(*cache, 0), kept);
    const Entries now = Read(*cache, 1);
    EXPECT_TRUE(std::equal(now.keys.begin(), now.keys.begin() + 61 * kRow, replaced.keys.begin()));
    EXPECT_NE(now.keys[61 * kRow], replaced.keys[61 * kRow]);
    EXPECT_EQ(Read(*fork, 1), replaced);
    cache->Restore(*fork);
    EXPECT_EQ(Read(*cache, 1), replaced);
  }
}

TEST_P(KvCacheOf, ARewoundCacheIsTruncatedToWhatItsLengthNeeds) {
  const auto cache = Make(0), plain = Make(0);
  Append(*cache, 300, 1, {0, 1});
  ASSERT_TRUE(cache->Rewind(65).ok());
  ASSERT_TRUE(cache->Truncate(10).ok());
  Append(*plain, 300, 1, {0, 1});
  ASSERT_TRUE(plain->Truncate(10).ok());
  EXPECT_EQ(cache->nbytes(), plain->nbytes());
  EXPECT_EQ(Read(*cache, 1), Read(*plain, 1));
}

TEST_P(KvCacheOf, ARingRewindsOnlyToWhereItHoldsTheWindow) {
  const auto cache = Make(20, false, 100);
  Append(*cache, 25, 1, {0, 1});
  ASSERT_TRUE(cache->Rewind(100).ok());  // nothing had left the ring
  Append(*cache, 300, 1, {0, 1});
  const int64_t first = cache->FirstPosition(0);
  ASSERT_GT(first, 100);
  const Status status = cache->Rewind(150);
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
  EXPECT_NE(status.message().find("rewind: length is 150"), std::string::npos) << status;
  EXPECT_NE(status.message().find("sliding=\"full\""), std::string::npos) << status;
  EXPECT_EQ(cache->length(), 400);
  EXPECT_TRUE(cache->Rewind(first + 19).ok());
  EXPECT_FALSE(cache->Rewind(99).ok());
}

}  // namespace
}  // namespace gemloupe
