// Attention over every storage of keys and values, beside a float64 twin; and what changes no bit.
#include "ops/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/kernel_table.h"
#include "ops/dispatch.h"
#include "state/kv_cache.h"

namespace gemloupe {
namespace {

using Floats = std::vector<float>;
constexpr double kRoundoff = 0x1p-24;

Floats Normal(int64_t count, unsigned seed, float deviation = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

struct Case {
  int64_t heads, kv_heads, head_dim, pairs;
};
constexpr Case kCases[] = {{3, 1, 20, 3}, {8, 2, 64, 8}, {5, 5, 34, 0}, {16, 1, 130, 17}};
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBfloat16, DType::kInt8};

// A cache of one layer where K = rotated(w ⊙ V): as separate and as derived storage.
struct Sequence {
  Case size;
  int64_t length;
  Floats weight, keys, values;  // exact, [S, K · H]

  Sequence(const Case& c, int64_t count)
      : size(c),
        length(count),
        weight(Normal(c.head_dim, 1)),
        keys(static_cast<size_t>(count * c.kv_heads * c.head_dim)),
        values(Normal(count * c.kv_heads * c.head_dim, 2)) {
    const int64_t half = c.head_dim / 2;
    for (size_t i = 0; i < keys.size(); ++i) keys[i] = values[i] * weight[i % weight.size()];
    for (int64_t row = 0; row < count * c.kv_heads; ++row) {
      for (int64_t i = 0; i < c.pairs; ++i) {
        float* k = keys.data() + row * c.head_dim;
        const float angle = 0.37f * static_cast<float>(row % 91) / static_cast<float>(i + 1);
        const float a = k[i], b = k[i + half];
        k[i] = a * std::cos(angle) - b * std::sin(angle);
        k[i + half] = b * std::cos(angle) + a * std::sin(angle);
      }
    }
  }

  std::unique_ptr<KvCache> Cache(DType dtype, bool separate, int64_t window = 0,
                                 int64_t start = 0) const {
    KvLayerSpec spec;
    spec.window = window;
    spec.num_heads = size.kv_heads;
    spec.head_dim = size.head_dim;
    spec.values_are_keys = true;
    spec.rope.pairs = size.pairs;
    spec.key_weight = std::make_shared<const Floats>(weight);
    KvCacheOptions options;
    options.dtype = dtype;
    options.separate_keys = separate;
    options.start = start;
    options.max_tokens = length;
    auto cache = std::make_unique<KvCache>(std::vector<KvLayerSpec>{spec}, options);
    const int64_t row = size.kv_heads * size.head_dim;
    std::vector<int32_t> ids(static_cast<size_t>(length));
    for (int64_t at = 0; at < length;) {
      const int64_t count = std::min<int64_t>(37, length - at);
      cache->Reserve(count);
      cache->Write(0, start + at, ConstMatrix(keys.data() + at * row, count, row),
                   ConstMatrix(values.data() + at * row, count, row));
      cache->Advance(ids.data(), count);
      at += count;
    }
    return cache;
  }
};

Floats Attend(const KvCache& cache, const Floats& q, const std::vector<KeyRange>& ranges,
              int threads) {
  const ThreadPool::Pass pass(threads);
  const auto rows = static_cast<int64_t>(ranges.size());
  const int64_t cols = static_cast<int64_t>(q.size()) / rows;
  Floats z(q.size());
  Attention(ConstMatrix(q.data(), rows, cols), cache.View(0), ranges.data(),
            Matrix(z.data(), rows, cols));
  return z;
}

// The last `rows` positions of the sequence, each seeing at most `window` positions.
std::vector<KeyRange> Causal(int64_t length, int64_t rows, int64_t window, int64_t start = 0) {
  std::vector<KeyRange> ranges;
  for (int64_t at = start + length - rows; at < start + length; ++at) {
    ranges.push_back({window == 0 ? start : std::max(start, at - window + 1), at + 1});
  }
  return ranges;
}

class AttentionOf : public testing::TestWithParam<DType> {
 protected:
  void SetUp() override { ASSERT_TRUE(InitDispatch().ok()); }
};
INSTANTIATE_TEST_SUITE_P(, AttentionOf, testing::ValuesIn(kDTypes),
                         [](const auto& info) { return DTypeName(info.param); });

// |z − exact| on the keys and values as stored: a score is off by γ(H + 4) Σ|q||k|, each weight by the
// factor exp of twice that and 2⁻²⁰ for exp itself, and sums over S positions add γ(S + 8).
void CheckAgainstTwin(const Sequence& sequence, const KvCache& cache, const Floats& q,
                      const std::vector<KeyRange>& ranges, const Floats& z) {
  const Case& c = sequence.size;
  const int64_t first = cache.FirstPosition(0), held = cache.length() - first;
  const int64_t row = c.kv_heads * c.head_dim;
  Floats keys(static_cast<size_t>(held * row)), values(keys.size());
  cache.Read(0, first, cache.length(), keys.data(), values.data());
  const int64_t group = c.heads / c.kv_heads;
  for (size_t t = 0; t < ranges.size(); ++t) {
    for (int64_t head = 0; head < c.heads; ++head) {
      const float* query = q.data() + (static_cast<int64_t>(t) * c.heads + head) * c.head_dim;
      std::vector<double> score;
      double largest = -INFINITY, magnitude = 0;
      for (int64_t at = ranges[t].begin; at < ranges[t].end; ++at) {
        const float* key = keys.data() + (at - first) * row + head / group * c.head_dim;
        double sum = 0, absolute = 0;
        for (int64_t i = 0; i < c.head_dim; ++i) {
          sum += static_cast<double>(query[i]) * key[i];
          absolute += std::fabs(static_cast<double>(query[i]) * key[i]);
        }
        score.push_back(sum);
        largest = std::max(largest, sum);
        magnitude = std::max(magnitude, absolute);
      }
      double total = 0;
      for (double& s : score) total += s = std::exp(s - largest);
      // Derived keys round w ⊙ V once more, and the scales of int8 twice.
      const double score_error = (static_cast<double>(c.head_dim) + 8) * kRoundoff * magnitude;
      const double relative = std::expm1(2 * score_error) + 0x1p-20 +
                              (static_cast<double>(score.size()) + 16) * kRoundoff;
      for (int64_t i = 0; i < c.head_dim; ++i) {
        double exact = 0, absolute = 0;
        for (size_t s = 0; s < score.size(); ++s) {
          const int64_t at = ranges[t].begin + static_cast<int64_t>(s) - first;
          const double v = values[static_cast<size_t>(at * row + head / group * c.head_dim + i)];
          exact += score[s] / total * v;
          absolute += score[s] / total * std::fabs(v);
        }
        const double got =
            z[static_cast<size_t>((static_cast<int64_t>(t) * c.heads + head) * c.head_dim + i)];
        ASSERT_LE(std::fabs(got - exact), relative * absolute + 1e-30)
            << "row " << t << " head " << head << " dim " << i;
      }
    }
  }
}

TEST_P(AttentionOf, EqualsItsTwinOnOddSizes) {
  for (const Case& c : kCases) {
    for (const int64_t length : {1, 63, 65, 700}) {
      const Sequence sequence(c, length);
      for (const bool separate : {true, false}) {
        const auto cache = sequence.Cache(GetParam(), separate);
        ASSERT_EQ(cache->storage(0) == KvStorage::kSeparate, separate);
        for (const int64_t rows : {int64_t{1}, int64_t{5}, int64_t{33}}) {
          if (rows > length) continue;
          const Floats q = Normal(rows * c.heads * c.head_dim, 3, 0.3f);
          const auto ranges = Causal(length, rows, 0);
          CheckAgainstTwin(sequence, *cache, q, ranges, Attend(*cache, q, ranges, 2));
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(KvChunks, CoverEveryPositionInWholeBlocks) {
  for (const bool grow : {false, true}) {
    const KvChunks chunks = {grow};
    EXPECT_EQ(chunks.Begin(0), 0);
    for (int64_t position = 0; position < 3 * KvChunks::kLongFrom; ++position) {
      const int64_t chunk = chunks.Of(position), begin = chunks.Begin(chunk);
      const int64_t size = chunks.Begin(chunk + 1) - begin;
      ASSERT_LE(begin, position);
      ASSERT_LT(position, begin + size);
      ASSERT_EQ(begin % kKvBlock, 0);
      ASSERT_EQ(size, grow && position >= KvChunks::kLongFrom ? KvChunks::kLong : KvChunks::kShort);
    }
  }
}

TEST_P(AttentionOf, WindowsAndStartsSkipBlocks) {
  const Sequence sequence(kCases[1], 900);
  const auto cache = sequence.Cache(GetParam(), false, 150, 333);
  EXPECT_GT(cache->FirstPosition(0), 333 + 500);
  const Floats q = Normal(8 * 64, 4, 0.3f);
  const auto ranges = Causal(900, 1, 150, 333);
  CheckAgainstTwin(sequence, *cache, q, ranges, Attend(*cache, q, ranges, 2));
}

TEST_P(AttentionOf, RowsHaveTheSameBitsAloneInATileAndOnAnyThreads) {
  for (const Case& c : kCases) {
    const int64_t length = 2900, rows = 61;  // chunks of both sizes; more rows than a tile
    const Sequence sequence(c, length);
    for (const bool separate : {true, false}) {
      for (const int64_t window : {0, 300}) {
        const auto cache = sequence.Cache(GetParam(), separate);
        const Floats q = Normal(rows * c.heads * c.head_dim, 5, 0.3f);
        const auto ranges = Causal(length, rows, window);
        const Floats together = Attend(*cache, q, ranges, 1);
        EXPECT_EQ(Attend(*cache, q, ranges, 2), together);
        EXPECT_EQ(Attend(*cache, q, ranges, 3), together);
        const int64_t row = c.heads * c.head_dim;
        for (const int64_t t : {int64_t{0}, int64_t{17}, rows - 1}) {
          const Floats one(q.begin() + t * row, q.begin() + (t + 1) * row);
          const Floats want(together.begin() + t * row, together.begin() + (t + 1) * row);
          for (const int threads : {1, 2, 3}) {
            EXPECT_EQ(Attend(*cache, one, {ranges[static_cast<size_t>(t)]}, threads), want)
                << "row " << t << ", " << threads << " threads";
          }
        }
      }
    }
  }
}

TEST_P(AttentionOf, ReadsBackWhatWasWrittenUpToItsRounding) {
  for (const Case& c : kCases) {
    const Sequence sequence(c, 200);
    const int64_t row = c.kv_heads * c.head_dim;
    for (const bool separate : {true, false}) {
      const auto cache = sequence.Cache(GetParam(), separate);
      Floats keys(sequence.keys.size()), values(keys.size());
      cache->Read(0, 0, 200, keys.data(), values.data());
      if (GetParam() == DType::kFloat32) {  // derived keys are rebuilt in the reference's order
        EXPECT_EQ(keys, sequence.keys);
        EXPECT_EQ(values, sequence.values);
        continue;
      }
      const double unit = GetParam() == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
      for (int64_t head = 0; head < 200 * c.kv_heads; ++head) {
        const auto begin =
            static_cast<size_t>(head / c.kv_heads * row + head % c.kv_heads * c.head_dim);
        double key_largest = 0, value_largest = 0;
        for (size_t i = begin; i < begin + static_cast<size_t>(c.head_dim); ++i) {
          key_largest = std::max(key_largest, std::fabs(static_cast<double>(sequence.keys[i])));
          value_largest =
              std::max(value_largest, std::fabs(static_cast<double>(sequence.values[i])));
        }
        for (int64_t d = 0; d < c.head_dim; ++d) {
          const auto i = begin + static_cast<size_t>(d);
          double value_bound = unit * std::fabs(sequence.values[i]) + 0x1p-25;
          double key_bound = unit * std::fabs(sequence.keys[i]) + 0x1p-25;
          const bool rotated = d % (c.head_dim / 2) < c.pairs;
          if (GetParam() == DType::kInt8) {  // half a step of the row's scale, and a few roundings
            value_bound = value_largest / 254 * (1 + 0x1p-14);
            key_bound = key_largest / 254 * (1 + 0x1p-14);
          }
          if (!separate && !rotated) {
            const double w = std::fabs(sequence.weight[static_cast<size_t>(d)]);
            key_bound = w * value_bound + kRoundoff * std::fabs(sequence.keys[i]) + 1e-30;
          }
          ASSERT_LE(std::fabs(static_cast<double>(values[i]) - sequence.values[i]), value_bound);
          ASSERT_LE(std::fabs(static_cast<double>(keys[i]) - sequence.keys[i]), key_bound) << d;
        }
      }
    }
  }
}

TEST_P(AttentionOf, ForksTruncatedCachesAndReusedRingsKeepTheirEntries) {
  const Sequence sequence(kCases[1], 640);
  const int64_t row = 2 * 64;
  for (const bool separate : {true, false}) {
    const auto cache = sequence.Cache(GetParam(), separate, 100);
    const auto fork = cache->Fork();
    Floats before(static_cast<size_t>(100 * row)), values(before.size()), after(before.size());
    cache->Read(0, 540, 640, before.data(), values.data());
    ASSERT_TRUE(fork->Truncate(639).ok());
    const Floats other = Normal(row, 9);
    const int32_t id = 0;
    fork->Reserve(1);
    fork->Write(0, 639, ConstMatrix(other.data(), 1, row), ConstMatrix(other.data(), 1, row));
    fork->Advance(&id, 1);
    cache->Read(0, 540, 640, after.data(), values.data());
    EXPECT_EQ(after, before);
    fork->Read(0, 540, 639, after.data(), values.data());
    EXPECT_TRUE(std::equal(after.begin(), after.begin() + 99 * row, before.begin()));
    EXPECT_FALSE(fork->Truncate(300).ok());
  }
}

TEST_P(AttentionOf, BytesAreThoseOfTheLayout) {
  const Sequence sequence({16, 2, 512, 64}, 130);
  const int64_t element =
      GetParam() == DType::kInt8 ? 1 : static_cast<int64_t>(DTypeSize(GetParam()));
  const int64_t scales = GetParam() == DType::kInt8 ? 8 : 0;
  for (const bool separate : {true, false}) {
    const auto cache = sequence.Cache(GetParam(), separate);
    const int64_t row = 2 * ((separate ? 1024 : 640) * element + scales);
    EXPECT_EQ(cache->nbytes(), static_cast<uint64_t>(3 * kKvBlock * row));
    EXPECT_EQ(KvCache::BytesNeeded(cache->layers(), cache->options(), 130, 512), cache->nbytes());
  }
}

// The int8 kernels of every instruction set, beside their scalar twin.
TEST(Int8Kernels, EqualTheirTwinsOnOddSizes) {
  const KernelTable* tables[] = {&PortableKernels(),
                                 DetectedIsa() >= Isa::kAvx2 ? Avx2Kernels() : nullptr,
                                 DetectedIsa() >= Isa::kAvx512 ? Avx512Kernels() : nullptr};
  for (const KernelTable* kernels : tables) {
    if (kernels == nullptr) continue;
    SCOPED_TRACE(kernels->name);
    constexpr int64_t kCount = 19;  // values: groups that go together and three alone
    for (const int64_t n : {1, 2, 7, 8, 15, 16, 17, 33, 100, 257}) {
      Floats src = Normal(n, static_cast<unsigned>(n));
      std::vector<int8_t> q(static_cast<size_t>(n) + 1, 77), twin(static_cast<size_t>(n));
      const float scale = kernels->f32_to_i8(q.data(), src.data(), n);
      EXPECT_EQ(scale, PortableKernels().f32_to_i8(twin.data(), src.data(), n));
      EXPECT_EQ(q.back(), 77) << "written behind the end";
      q.pop_back();
      EXPECT_EQ(q, twin);
      Floats wide(static_cast<size_t>(n));
      kernels->i8_to_f32(wide.data(), q.data(), n);
      for (int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<size_t>(i);
        ASSERT_EQ(wide[at], q[at]);
        ASSERT_LE(std::fabs(src[at] - scale * wide[at]), scale * 0.5 * (1 + 0x1p-14));
      }
      for (int rows = 1; rows <= kMaxKernelRows; ++rows) {
        const Floats x = Normal(rows * n, 3), coef = Normal(rows * kCount, 4);
        std::vector<int8_t> w;
        for (int64_t i = 0; i < kCount * n; ++i)
          w.push_back(static_cast<int8_t>(i * 37 % 255 - 127));
        Floats dst(static_cast<size_t>(rows * kCount)), sum(static_cast<size_t>(rows * n), 0.5f);
        kernels->matmul_i8(dst.data(), kCount, x.data(), n, w.data(), n, rows, kCount, n, {});
        kernels->accumulate_i8(sum.data(), n, coef.data(), kCount, w.data(), n, rows, kCount, n,
                               {});
        for (int r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < kCount; ++j) {
            double exact = 0, magnitude = 0;
            for (int64_t i = 0; i < n; ++i) {
              const double product = static_cast<double>(x[static_cast<size_t>(r * n + i)]) *
                                     w[static_cast<size_t>(j * n + i)];
              exact += product;
              magnitude += std::fabs(product);
            }
            ASSERT_LE(std::fabs(dst[static_cast<size_t>(r * kCount + j)] - exact),
                      static_cast<double>(n + 1) * kRoundoff * magnitude);
          }
          for (int64_t i = 0; i < n; ++i) {
            double exact = 0.5, magnitude = 0.5;
            for (int64_t j = 0; j < kCount; ++j) {
              const double product =
                  static_cast<double>(coef[static_cast<size_t>(r * kCount + j)]) *
                  w[static_cast<size_t>(j * n + i)];
              exact += product;
              magnitude += std::fabs(product);
            }
            ASSERT_LE(std::fabs(sum[static_cast<size_t>(r * n + i)] - exact),
                      (kCount + 1) * kRoundoff * magnitude);
          }
        }
      }
    }
    // Zeros, tiny and non-finite values.
    std::vector<int8_t> q(3);
    const Floats zeros(3, 0.0f), tiny(3, 1e-38f), bad = {NAN, INFINITY, 1.0f};
    EXPECT_EQ(kernels->f32_to_i8(q.data(), zeros.data(), 3), 0.0f);
    EXPECT_EQ(kernels->f32_to_i8(q.data(), tiny.data(), 3), 0.0f);
    EXPECT_EQ(q, (std::vector<int8_t>{0, 0, 0}));
    EXPECT_TRUE(std::isinf(kernels->f32_to_i8(q.data(), bad.data(), 3)));
  }
}

}  // namespace
}  // namespace gemloupe
