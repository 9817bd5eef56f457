#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/blocks.h"
#include "kernels/packed_layout.h"
#include "kernels/quant_table.h"
#include "ops/convert.h"
#include "ops/dispatch.h"
#include "ops/linear.h"
#include "ops/quantizer.h"

namespace gemloupe {
namespace {

constexpr DType kPacked[] = {DType::kInt4,  DType::kInt6,  DType::kInt8,
                             DType::kInt4K, DType::kInt5K, DType::kInt6K};
constexpr DType kBlocked[] = {DType::kQ4_0, DType::kQ8_0, DType::kQ4K, DType::kQ5K, DType::kQ6K};

// The tables that this CPU can run beside the scalar one.
std::vector<const QuantKernels*> Tables() {
  std::vector<const QuantKernels*> tables;
  const Isa isa = DetectedIsa();
  if (isa >= Isa::kAvx2 && Avx2QuantKernels() != nullptr) tables.push_back(Avx2QuantKernels());
  if (isa >= Isa::kAvx512Vnni && VnniQuantKernels() != nullptr)
    tables.push_back(VnniQuantKernels());
  return tables;
}

std::vector<float> Normal(int64_t count, int seed) {
  std::mt19937 generator(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// A matrix of `dtype`: quantised from random floats, or random blocks of a K format.
struct Stored {
  AlignedBuffer bytes;
  TensorView view;
};

Stored RandomBlocks(DType dtype, int64_t n, int64_t k, int seed) {
  Stored stored;
  stored.bytes = AlignedBuffer(MatrixBytes(dtype, n, k));
  std::mt19937 generator(static_cast<unsigned>(seed));
  for (size_t i = 0; i < stored.bytes.size(); ++i) {
    stored.bytes.data()[i] = static_cast<uint8_t>(generator());
  }
  // The float16 factors must be finite: d (and dmin) of each block.
  const size_t block = MatrixBytes(dtype, 1, BlockElements(dtype));
  const bool at_end = dtype == DType::kQ6K;
  const int factors = dtype == DType::kQ4K || dtype == DType::kQ5K ? 2 : 1;
  for (size_t at = 0; at < stored.bytes.size(); at += block) {
    for (int i = 0; i < factors; ++i) {
      const uint16_t d = FloatToFloat16(static_cast<float>(generator() % 1000) * 1e-5f);
      std::memcpy(stored.bytes.data() + at + (at_end ? block - 2 : static_cast<size_t>(2 * i)), &d,
                  2);
    }
  }
  stored.view = {stored.bytes.data(), dtype, {n, k}};
  return stored;
}

DType BlockedTwin(DType packed) {
  return packed == DType::kInt4K   ? DType::kQ4K
         : packed == DType::kInt5K ? DType::kQ5K
                                   : DType::kQ6K;
}

Stored RandomPacked(DType dtype, int64_t n, int64_t k, int seed) {
  const ThreadPool::Pass pass(1);
  Stored stored;
  stored.bytes = AlignedBuffer(MatrixBytes(dtype, n, k));
  stored.view = {stored.bytes.data(), dtype, {n, k}};
  if (dtype >= DType::kInt4K) {
    const Stored blocks = RandomBlocks(BlockedTwin(dtype), n, k, seed);
    EXPECT_TRUE(ConvertRows(blocks.view, 0, n, dtype, stored.bytes.data()).ok());
  } else {
    const std::vector<float> values = Normal(n * k, seed);
    const TensorView floats = {values.data(), DType::kFloat32, {n, k}};
    EXPECT_TRUE(ConvertRows(floats, 0, n, dtype, stored.bytes.data()).ok());
  }
  return stored;
}

int64_t SomeK(DType dtype, int which) {
  if (dtype >= DType::kInt4K) return which == 0 ? 256 : 1280;
  return std::vector<int64_t>{1, 40, 64, 200, 704, 2112}[static_cast<size_t>(which)];
}
int Ks(DType dtype) { return dtype >= DType::kInt4K ? 2 : 6; }

// Quantised rows, in groups of `width`, in memory of their own.
struct Rows {
  std::vector<int32_t> q, start, half_start;
  std::vector<float> scale, scaled_sum;
  QuantizedRows view;
  Rows(const QuantKernels& kernels, const std::vector<float>& x, int64_t rows, int64_t k,
       int64_t width = 1) {
    const int64_t padded = (k + 255) / 256 * 256;
    const int64_t all = (rows + width - 1) / width * width;
    q.resize(static_cast<size_t>(all * padded / 4));
    scale.resize(static_cast<size_t>(all * padded / 32));
    scaled_sum.resize(scale.size());
    start.resize(scale.size());
    half_start.resize(scale.size());
    view = {q.data(),          scale.data(), start.data(), half_start.data(),
            scaled_sum.data(), padded,       width};
    for (int64_t r = 0; r < rows; ++r) kernels.quantize_row(view, r, x.data() + r * k, k);
  }
  // The same as gemm's tiles, from rows of width 1: in each group, 32 elements of row 0, of row 1, …
  void MakeTiles(const Rows& single, int64_t rows) {
    const int64_t groups = view.padded / kGroup;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t tile = r / view.width * groups + group;
        std::memcpy(&q[static_cast<size_t>((tile * view.width + r % view.width) * (kGroup / 4))],
                    &single.q[static_cast<size_t>((r * groups + group) * (kGroup / 4))], kGroup);
      }
    }
  }
  // Element i of row r, for width 1.
  int8_t Element(int64_t r, int64_t i) const {
    int8_t four[4];
    std::memcpy(four, &q[static_cast<size_t>((r * view.padded + i) / 4)], 4);
    return four[i % 4];
  }
};

TEST(QuantKernels, QuantizedRowsAreTheSameOnEveryIsa) {
  for (const int64_t k : {1, 31, 32, 33, 100, 700}) {
    std::vector<float> x = Normal(4 * k, 1);
    std::fill_n(x.begin() + k, k, 0.0f);     // a zero row
    x[static_cast<size_t>(2 * k)] = 1e-35f;  // next to nothing
    x[static_cast<size_t>(3 * k)] = INFINITY;
    const Rows scalar(PortableQuantKernels(), x, 4, k);
    for (const int64_t width : {3, 12}) {
      const Rows wide(PortableQuantKernels(), x, 4, k, width);
      for (const QuantKernels* kernels : Tables()) {
        const Rows rows(*kernels, x, 4, k, width);
        EXPECT_EQ(rows.q, wide.q) << kernels->name << " k " << k << " width " << width;
        EXPECT_EQ(rows.start, wide.start) << kernels->name << " width " << width;
      }
    }
    for (const QuantKernels* kernels : Tables()) {
      const Rows rows(*kernels, x, 4, k);
      EXPECT_EQ(rows.q, scalar.q) << kernels->name << " k " << k;
      EXPECT_EQ(rows.start, scalar.start) << kernels->name;
      EXPECT_EQ(rows.half_start, scalar.half_start) << kernels->name;
      EXPECT_EQ(
          std::memcmp(rows.scaled_sum.data(), scalar.scaled_sum.data(), 4 * rows.scaled_sum.size()),
          0)
          << kernels->name << " k " << k;
      EXPECT_EQ(std::memcmp(rows.scale.data(), scalar.scale.data(), 4 * rows.scale.size()), 0)
          << kernels->name << " k " << k;
    }
    // x is within half a step of scale · q.
    for (int64_t i = 0; i < k; ++i) {
      const double step = scalar.scale[static_cast<size_t>(i / 32)];
      EXPECT_LE(std::fabs(x[static_cast<size_t>(i)] - step * scalar.Element(0, i)),
                0.5000001 * step);
    }
  }
}

TEST(QuantKernels, UnpackedPanelsAreTheRowsThatWereConverted) {
  for (const DType dtype : kPacked) {
    for (int which = 0; which < Ks(dtype); ++which) {
      const int64_t n = 37, k = SomeK(dtype, which);
      const Stored stored = RandomPacked(dtype, n, k, which);
      const int64_t padded =
          (k + BlockElements(dtype) - 1) / BlockElements(dtype) * BlockElements(dtype);
      for (int64_t row = 0; row < n; row += kPanelRows) {
        std::vector<float> scalar(static_cast<size_t>(padded * kPanelRows));
        PortableQuantKernels().unpack[PackedFormat(dtype)](scalar.data(),
                                                           PanelData(stored.view, row), 0, padded);
        for (const QuantKernels* kernels : Tables()) {
          std::vector<float> values(scalar.size());
          kernels->unpack[PackedFormat(dtype)](values.data(), PanelData(stored.view, row), 0,
                                               padded);
          EXPECT_EQ(std::memcmp(values.data(), scalar.data(), 4 * values.size()), 0)
              << kernels->name << " " << DTypeName(dtype) << " k " << k;
        }
      }
    }
  }
}

// Blocked rows, packed, still have the values that the blocks define.
TEST(QuantKernels, RepackedBlocksKeepTheirValues) {
  const ThreadPool::Pass pass(2);
  for (const DType dtype : kBlocked) {
    const int64_t n = 35, k = 768;
    const Stored blocks = RandomBlocks(dtype, n, k, 5);
    const DType packed = dtype == DType::kQ4_0   ? DType::kInt4
                         : dtype == DType::kQ8_0 ? DType::kInt8
                         : dtype == DType::kQ4K  ? DType::kInt4K
                         : dtype == DType::kQ5K  ? DType::kInt5K
                                                 : DType::kInt6K;
    AlignedBuffer bytes(MatrixBytes(packed, n, k));
    ASSERT_TRUE(ConvertRows(blocks.view, 0, n, packed, bytes.data()).ok());
    std::vector<float> expected(static_cast<size_t>(n * k)), values(expected.size());
    ReadRows(blocks.view, 0, n, expected.data());
    ReadRows({bytes.data(), packed, {n, k}}, 0, n, values.data());
    EXPECT_EQ(values, expected) << DTypeName(dtype);
    ASSERT_NE(expected[0], expected[1]);
  }
}

// The scalar product against double arithmetic on the values themselves.
TEST(QuantKernels, ScalarProductIsWithinItsBound) {
  for (const DType dtype : kPacked) {
    for (int which = 0; which < Ks(dtype); ++which) {
      const int64_t n = 19, k = SomeK(dtype, which);
      const Stored stored = RandomPacked(dtype, n, k, which);
      const Rows rows(PortableQuantKernels(), Normal(k, 3), 1, k);
      std::vector<float> weights(static_cast<size_t>(n * k)), product(static_cast<size_t>(n));
      ReadRows(stored.view, 0, n, weights.data());
      PortableQuantKernels().matmul[PackedFormat(dtype)](product.data(), n, rows.view, 0, 1,
                                                         stored.bytes.data(), 0, n, k);
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0, size = 0;
        for (int64_t j = 0; j < k; ++j) {
          const double x =
              static_cast<double>(rows.scale[static_cast<size_t>(j / 32)]) * rows.Element(0, j);
          sum += x * weights[static_cast<size_t>(i * k + j)];
          size += std::fabs(x * weights[static_cast<size_t>(i * k + j)]);
        }
        // In formats with a min the two parts of a weight are summed apart, and may be larger.
        const double parts = dtype == DType::kInt4K || dtype == DType::kInt5K ? 64 : 4;
        const double bound = 0x1p-24 * (static_cast<double>(k) / 16 + parts) * size * parts + 1e-30;
        EXPECT_NEAR(product[static_cast<size_t>(i)], sum, bound) << DTypeName(dtype) << " k " << k;
      }
    }
  }
}

TEST(QuantKernels, ProductsHaveTheSameBitsOnEveryIsaAndForAnyRows) {
  for (const DType dtype : kPacked) {
    for (int which = 0; which < Ks(dtype); ++which) {
      const int64_t n = 53, k = SomeK(dtype, which);
      const Stored stored = RandomPacked(dtype, n, k, which);
      const std::vector<float> x = Normal(17 * k, 4);
      const Rows rows(PortableQuantKernels(), x, 17, k);
      std::vector<float> expected(static_cast<size_t>(17 * n));
      for (int r = 0; r < 17; ++r) {
        PortableQuantKernels().matmul[PackedFormat(dtype)](expected.data() + r * n, n, rows.view, r,
                                                           1, stored.bytes.data(), 0, n, k);
      }
      for (const QuantKernels* kernels : Tables()) {
        for (int width = 1; width <= 8; ++width) {
          // The second group of this width, one row short where there are several.
          const Rows grouped(*kernels, x, 17, k, width);
          const int count = std::max(1, width - 1);
          for (const auto& [begin, end] :
               {std::pair<int64_t, int64_t>{0, n}, {16, 48}, {5, 6}, {13, 51}}) {
            std::vector<float> product(static_cast<size_t>(count * n), -1.0f);
            kernels->matmul[PackedFormat(dtype)](product.data(), n, grouped.view, 1, count,
                                                 stored.bytes.data(), begin, end, k);
            for (int r = 0; r < count; ++r) {
              EXPECT_EQ(
                  std::memcmp(product.data() + r * n, expected.data() + (r + width) * n + begin,
                              4 * static_cast<size_t>(end - begin)),
                  0)
                  << kernels->name << " " << DTypeName(dtype) << " k " << k << " rows " << count;
              for (int64_t i = end - begin; i < n; ++i)
                EXPECT_EQ(product[static_cast<size_t>(r * n + i)], -1.0f);
            }
          }
        }
      }
    }
  }
}

class GemmKernels : public testing::TestWithParam<std::string> {};

TEST_P(GemmKernels, HaveTheBitsOfTheScalarProductOfOneRow) {
  const bool amx = GetParam() == "amx";
  const QuantKernels* kernels = amx ? AmxQuantKernels() : VnniQuantKernels();
  if (kernels == nullptr || DetectedIsa() < (amx ? Isa::kAmx : Isa::kAvx512Vnni)) {
    GTEST_SKIP() << "this machine cannot run the " << GetParam() << " kernels";
  }
  AlignedBuffer scratch(kGemmScratchBytes);
  for (const DType dtype : kPacked) {
    const QuantKernels::Gemm gemm = kernels->gemm[PackedFormat(dtype)];
    if (gemm == nullptr) continue;
    for (int which = 0; which < Ks(dtype); ++which) {
      const int64_t n = 53, k = SomeK(dtype, which), most = 30, width = kernels->gemm_rows;
      const Stored stored = RandomPacked(dtype, n, k, which);
      const std::vector<float> x = Normal(most * k, 4);
      const Rows single(PortableQuantKernels(), x, most, k);
      std::vector<float> expected(static_cast<size_t>(most * n));
      for (int r = 0; r < most; ++r) {
        PortableQuantKernels().matmul[PackedFormat(dtype)](expected.data() + r * n, n, single.view,
                                                           r, 1, stored.bytes.data(), 0, n, k);
      }
      for (const int64_t rows : {int64_t{1}, int64_t{9}, width, most}) {
        Rows grouped(*kernels, x, rows, k, width);
        if (kernels->gemm_tiles) grouped.MakeTiles(single, rows);
        std::vector<float> product(static_cast<size_t>(rows * n), -1.0f);
        for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 32}, {32, n}}) {
          gemm(product.data() + begin, n, grouped.view, rows, stored.bytes.data(), begin, end, k,
               scratch.data());
        }
        EXPECT_EQ(std::memcmp(product.data(), expected.data(), 4 * static_cast<size_t>(rows * n)),
                  0)
            << DTypeName(dtype) << " k " << k << " rows " << rows;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, GemmKernels, testing::Values("avx512_vnni", "amx"),
                         [](const auto& info) { return info.param; });

// `Linear` with many rows (gemm where there is one) and with one row: the same bits.
TEST(QuantKernels, ManyRowsGiveTheBitsOfOneRow) {
  ASSERT_TRUE(InitDispatch().ok());
  const ThreadPool::Pass pass(2);
  Arena arena;
  for (const DType dtype : kPacked) {
    for (const int64_t count : {9, 12, 13, 30}) {
      for (const bool floats : {false, true}) {
        const int64_t n = 150, k = dtype >= DType::kInt4K ? 2304 : 2120;
        const Stored stored = RandomPacked(dtype, n, k, 7);
        const std::vector<float> x = Normal(count * k, 8);
        std::vector<float> all(static_cast<size_t>(count * n)), one(static_cast<size_t>(n));
        const MatmulPath path = {.row_exact = true, .float32_activations = floats};
        const int64_t first = 3;
        ASSERT_TRUE(Linear(ConstMatrix(x.data(), count, k),
                           {{&stored.view, Matrix(all.data(), count, n - first, n), first}}, path,
                           arena)
                        .ok());
        for (int64_t row = 0; row < count; ++row) {
          ASSERT_TRUE(Linear(ConstMatrix(x.data() + row * k, 1, k),
                             {{&stored.view, Matrix(one.data(), 1, n)}}, path, arena)
                          .ok());
          EXPECT_EQ(std::memcmp(all.data() + row * n, one.data() + first,
                                4 * static_cast<size_t>(n - first)),
                    0)
              << DTypeName(dtype) << " rows " << count << " floats " << floats;
        }
      }
    }
  }
}

// Float32 activations: the product of the unpacked weights, within the bound of a float32 sum.
TEST(QuantKernels, Float32ActivationsAreExactUpToSummation) {
  ASSERT_TRUE(InitDispatch().ok());
  const ThreadPool::Pass pass(2);
  Arena arena;
  for (const DType dtype : kPacked) {
    const int64_t n = 40, k = 512;
    const Stored stored = RandomPacked(dtype, n, k, 7);
    const std::vector<float> x = Normal(3 * k, 8);
    std::vector<float> weights(static_cast<size_t>(n * k)), product(static_cast<size_t>(3 * n));
    ReadRows(stored.view, 0, n, weights.data());
    ASSERT_TRUE(Linear(ConstMatrix(x.data(), 3, k), {{&stored.view, Matrix(product.data(), 3, n)}},
                       {.float32_activations = true}, arena)
                    .ok());
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0, size = 0;
        for (int64_t j = 0; j < k; ++j) {
          const double term = static_cast<double>(x[static_cast<size_t>(r * k + j)]) *
                              weights[static_cast<size_t>(i * k + j)];
          sum += term;
          size += std::fabs(term);
        }
        EXPECT_NEAR(product[static_cast<size_t>(r * n + i)], sum, 0x1p-24 * k * size);
      }
    }
  }
}

TEST(Quantizer, RecoversALattice) {
  std::mt19937 generator(1);
  for (const int bits : {4, 6, 8}) {
    for (int trial = 0; trial < 200; ++trial) {
      const float d = Float16ToFloat(
          FloatToFloat16(0.001f + 0.00001f * static_cast<float>(generator() % 1000)));
      const int range = 1 + static_cast<int>(generator() % 7);
      float x[kGroup];
      for (float& value : x)
        value = d * static_cast<float>(static_cast<int>(generator() % (2 * range + 1)) - range);
      uint8_t u[kGroup];
      uint16_t scale;
      ASSERT_TRUE(QuantizeGroup(x, bits, u, &scale));
      for (int i = 0; i < kGroup; ++i) {
        EXPECT_EQ(Float16ToFloat(scale) * static_cast<float>(u[i] - (1 << (bits - 1))), x[i]);
      }
    }
  }
}

// No worse than the plain rule of GGUF's Q4_0 (largest element to −8), summed over many groups.
TEST(Quantizer, ErrorIsBelowPlainRounding) {
  const std::vector<float> x = Normal(32 * 500, 9);
  double ours = 0, plain = 0;
  for (size_t at = 0; at < x.size(); at += 32) {
    uint8_t u[kGroup];
    uint16_t scale;
    ASSERT_TRUE(QuantizeGroup(x.data() + at, 4, u, &scale));
    float most = 0;
    for (size_t i = at; i < at + 32; ++i)
      if (std::fabs(x[i]) > std::fabs(most)) most = x[i];
    const float d = Float16ToFloat(FloatToFloat16(most / -8));
    for (size_t i = 0; i < 32; ++i) {
      const float w = Float16ToFloat(scale) * static_cast<float>(u[i] - 8);
      const float q = std::clamp(std::nearbyint(x[at + i] / d), -8.0f, 7.0f) * d;
      ours += std::pow(x[at + i] - w, 2);
      plain += std::pow(x[at + i] - q, 2);
    }
  }
  EXPECT_LT(ours, 0.9 * plain);
  float x_bad[kGroup] = {NAN};
  uint8_t u[kGroup];
  uint16_t scale;
  EXPECT_FALSE(QuantizeGroup(x_bad, 4, u, &scale));
}

}  // namespace
}  // namespace gemloupe
