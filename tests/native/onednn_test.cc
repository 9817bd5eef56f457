// oneDNN's matmul against a loop in double precision.
#include "ops/onednn.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "base/cpu.h"
#include "base/dtype.h"
#include "base/thread_pool.h"

namespace gemloupe {
namespace {

struct Shape {
  int64_t m, n, k;
};

constexpr Shape kShapes[] = {{1, 1, 1},   {1, 7, 3},     {2, 3, 17},    {9, 33, 65},
                             {13, 1, 31}, {64, 48, 100}, {5, 129, 257}, {31, 16, 512}};

std::vector<float> RandomValues(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// Compares with Σ src·weight in double. Summing k float products in any order errs by at most
// k·eps·Σ|src·weight| (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
void ExpectIsProduct(ConstMatrix src, ConstMatrix weight, ConstMatrix dst) {
  for (int64_t i = 0; i < dst.rows; ++i) {
    for (int64_t j = 0; j < dst.cols; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < src.cols; ++k) {
        const double product = static_cast<double>(src.row(i)[k]) * weight.row(j)[k];
        sum += product;
        magnitude += std::fabs(product);
      }
      const double bound = static_cast<double>(src.cols + 1) * 0x1p-24 * magnitude * 1.001;
      ASSERT_LE(std::fabs(dst.row(i)[j] - sum), bound) << i << ", " << j;
    }
  }
}

bool OnednnMayRun() { return SelectedIsa().value() != Isa::kPortable; }

TEST(Onednn, MatmulIsTheProductOnOddShapesAndStrides) {
  if (!OnednnMayRun()) GTEST_SKIP() << "GEMLOUPE_ISA=portable: oneDNN is not used";
  for (const Shape& shape : kShapes) {
    for (int64_t gap : {0, 1, 5}) {
      const auto src_values = RandomValues(shape.m * (shape.k + gap), 1);
      const auto weight_values = RandomValues(shape.n * (shape.k + gap), 2);
      std::vector<float> dst_values(static_cast<size_t>(shape.m * (shape.n + gap)), 77.0f);
      const ConstMatrix src(src_values.data(), shape.m, shape.k, shape.k + gap);
      const ConstMatrix weight(weight_values.data(), shape.n, shape.k, shape.k + gap);
      const Matrix dst(dst_values.data(), shape.m, shape.n, shape.n + gap);
      const Status status = OnednnMatmulF32(src, weight, dst);
      ASSERT_TRUE(status.ok()) << status.ToString();
      ExpectIsProduct(src, weight, dst);
      for (int64_t i = 0; i < shape.m; ++i) {
        for (int64_t j = 0; j < gap; ++j) ASSERT_EQ(dst.row(i)[shape.n + j], 77.0f);
      }
    }
  }
}

TEST(Onednn, Bfloat16MatmulIsTheProductWhereTheCpuHasIt) {
  if (!OnednnMayRun()) GTEST_SKIP() << "GEMLOUPE_ISA=portable: oneDNN is not used";
  for (const Shape& shape : kShapes) {
    std::vector<float> src_values = RandomValues(shape.m * shape.k, 3);
    std::vector<float> weight_values = RandomValues(shape.n * shape.k, 4);
    const auto round = [](std::vector<float>& values) {
      std::vector<uint16_t> bits;
      for (float& value : values) {
        bits.push_back(FloatToBfloat16(value));
        value = Bfloat16ToFloat(bits.back());
      }
      return bits;
    };
    const auto src_bits = round(src_values), weight_bits = round(weight_values);
    std::vector<float> dst_values(static_cast<size_t>(shape.m * shape.n));
    const Matrix dst(dst_values.data(), shape.m, shape.n);
    const Status status = OnednnMatmulBf16({src_bits.data(), shape.m, shape.k},
                                           {weight_bits.data(), shape.n, shape.k}, dst);
    if (SelectedIsa().value() < Isa::kAvx512) {
      ASSERT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status.ToString();
      continue;
    }
    ASSERT_TRUE(status.ok()) << status.ToString();
    ExpectIsProduct(ConstMatrix(src_values.data(), shape.m, shape.k),
                    ConstMatrix(weight_values.data(), shape.n, shape.k), dst);
  }
}

TEST(Onednn, PoolThreadsComputeSlicesSideBySide) {
  if (!OnednnMayRun()) GTEST_SKIP() << "GEMLOUPE_ISA=portable: oneDNN is not used";
  const int64_t m = 33, n = 210, k = 96;
  const auto src_values = RandomValues(m * k, 5), weight_values = RandomValues(n * k, 6);
  std::vector<float> dst_values(static_cast<size_t>(m * n));
  const ConstMatrix src(src_values.data(), m, k), weight(weight_values.data(), n, k);
  const ThreadPool::Pass pass(4);
  for (int repeat = 0; repeat < 20; ++repeat) {
    std::fill(dst_values.begin(), dst_values.end(), 0.0f);
    ThreadPool::Get().ParallelFor(21, [&](int64_t chunk, int) {
      const Matrix slice(dst_values.data() + chunk * 10, m, 10, n);
      EXPECT_TRUE(OnednnMatmulF32(src, weight.RowRange(chunk * 10, 10), slice).ok());
    });
    ExpectIsProduct(src, weight, Matrix(dst_values.data(), m, n));
  }
}

TEST(Onednn, MoreShapesThanTheCacheHoldsAreComputed) {
  if (!OnednnMayRun()) GTEST_SKIP() << "GEMLOUPE_ISA=portable: oneDNN is not used";
  const auto values = RandomValues(400 * 3, 7);
  for (int round = 0; round < 2; ++round) {
    for (int64_t m = 1; m <= 150; ++m) {
      std::vector<float> dst_values(static_cast<size_t>(m * 2));
      const ConstMatrix src(values.data(), m, 3), weight(values.data() + 600, 2, 3);
      const Matrix dst(dst_values.data(), m, 2);
      ASSERT_TRUE(OnednnMatmulF32(src, weight, dst).ok());
      ExpectIsProduct(src, weight, dst);
    }
  }
}

TEST(Onednn, CallersOpenMpSettingIsKept) {
  if (!OnednnMayRun()) GTEST_SKIP() << "GEMLOUPE_ISA=portable: oneDNN is not used";
  omp_set_num_threads(3);
  const float one = 1;
  float product = 0;
  ASSERT_TRUE(OnednnMatmulF32({&one, 1, 1}, {&one, 1, 1}, {&product, 1, 1}).ok());
  EXPECT_EQ(omp_get_max_threads(), 3);
  EXPECT_EQ(product, 1.0f);
}

TEST(Onednn, VersionIsAtLeastTheOneAskedFor) { EXPECT_GE(OnednnVersion().substr(0, 3), "3.2"); }

}  // namespace
}  // namespace gemloupe
