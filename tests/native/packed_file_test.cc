// Packed checkpoints: places, CRCs, and what a store converts while it is read in parts.
#include "formats/packed_file.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "formats/crc32.h"
#include "formats/packed_writer.h"
#include "formats/weight_store.h"
#include "ops/convert.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

using Shape = std::vector<int64_t>;

struct Tensor {
  Tensor(DType dtype, Shape shape) : view{nullptr, dtype, std::move(shape)} {
    bytes.resize(view.byte_size());
    view.data = bytes.data();
  }
  std::vector<uint8_t> bytes;
  TensorView view;
};

Tensor Ramp(Shape shape) {
  Tensor tensor(DType::kFloat32, std::move(shape));
  for (int64_t i = 0; i < tensor.view.size(); ++i) {
    const float value = std::sin(static_cast<float>(i) * 0.7f);
    std::memcpy(tensor.bytes.data() + 4 * i, &value, 4);
  }
  return tensor;
}

class TemporaryFolder {
 public:
  TemporaryFolder() { GL_CHECK(mkdtemp(name_) != nullptr); }
  ~TemporaryFolder() {
    unlink(file().c_str());
    rmdir(name_);
  }
  std::string file() const { return std::string(name_) + "/model.gemloupe"; }

 private:
  char name_[32] = "/tmp/gemloupe-test-XXXXXX";
};

class PackedFile : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(InitDispatch().ok()); }
  ThreadPool::Pass pass_{2};
};

TEST(Crc32, IsThatOfZlib) {
  EXPECT_EQ(Crc32(0, "123456789", 9), 0xcbf43926u);
  const std::string text = "a longer text, so that eight bytes are taken at a time";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    const uint32_t first = Crc32(0, text.data(), cut);
    EXPECT_EQ(Crc32(first, text.data() + cut, text.size() - cut),
              Crc32(0, text.data(), text.size()));
  }
}

TEST_F(PackedFile, TensorsAreReadAsTheyWereWritten) {
  const Tensor matrix = Ramp({45, 70}), experts = Ramp({3, 33, 40}), vector = Ramp({17});
  const Tensor table = Ramp({50, 64});
  WeightStore store;
  store.AddView("matrix", matrix.view);
  store.AddView("experts", experts.view);
  store.AddView("vector", vector.view);
  store.AddView("table", table.view);
  ASSERT_TRUE(store.SetTarget("matrix", DType::kInt4).ok());
  ASSERT_TRUE(store.SetTarget("experts", DType::kInt8).ok());
  ASSERT_TRUE(store.SetTarget("table", DType::kQ8_0).ok());
  PackedIndex index;
  index.metadata = "{}";
  for (const char* name : {"table", "matrix", "experts", "vector"}) {
    PackedTensor tensor;
    tensor.name = name;
    tensor.rows_only = tensor.name == "table";
    index.tensors.push_back(tensor);
  }
  const TemporaryFolder folder;
  ASSERT_TRUE(WritePackedFile(store, index, folder.file()).ok());
  const auto written = ReadPackedIndex(folder.file());
  ASSERT_TRUE(written.ok()) << written.status();
  EXPECT_EQ(written->tensors.back().name, "table");
  EXPECT_EQ(written->tensors.back().begin % kPackedSection, 0u);
  const auto damaged = DamagedPackedTensors(folder.file(), [](double) { return true; });
  ASSERT_TRUE(damaged.ok());
  EXPECT_TRUE(damaged->empty());

  WeightStore packed;
  std::vector<TensorEntry> entries;
  for (const PackedTensor& tensor : written->tensors) {
    entries.push_back(
        {tensor.name, DTypeName(tensor.dtype), tensor.shape, tensor.begin, tensor.end});
  }
  ASSERT_TRUE(packed.AddFile(folder.file(), entries).ok());
  // Take gives the store's own conversion, and what lies in the file, the same bytes.
  for (const auto& [name, shape] : std::vector<std::pair<std::string, Shape>>{
           {"matrix", {45, 70}}, {"experts", {3, 33, 40}}, {"table", {50, 64}}}) {
    const auto converted = store.Take(name, shape);
    const auto mapped = packed.Take(name, shape);
    ASSERT_TRUE(converted.ok() && mapped.ok()) << name;
    ASSERT_EQ(converted->dtype, mapped->dtype);
    EXPECT_EQ(std::memcmp(converted->data, mapped->data, mapped->byte_size()), 0) << name;
  }
  EXPECT_EQ(packed.copied_bytes(), 0u);
  EXPECT_EQ(packed.TakeFloats("vector", 17).value(), store.TakeFloats("vector", 17).value());
}

TEST_F(PackedFile, ALargeMatrixInPartsIsTheMatrixAtOnce) {
  // Rows of 1 MiB: several parts, the last of which is not a whole panel.
  const Tensor matrix = Ramp({40, 1 << 18});
  for (const DType dtype : {DType::kInt4, DType::kBfloat16}) {
    WeightStore store;
    store.AddView("matrix", matrix.view);
    ASSERT_TRUE(store.SetTarget("matrix", dtype).ok());
    int parts = 0;
    store.SetProgress([&](double fraction) {
      ++parts;
      EXPECT_LE(fraction, 1.0);
      return true;
    });
    const auto taken = store.Take("matrix", {40, 1 << 18});
    ASSERT_TRUE(taken.ok());
    EXPECT_GT(parts, 1);
    std::vector<uint8_t> whole(taken->byte_size());
    ASSERT_TRUE(ConvertRows(matrix.view, 0, 40, dtype, whole.data()).ok());
    EXPECT_EQ(std::memcmp(whole.data(), taken->data, whole.size()), 0) << DTypeName(dtype);
  }
}

TEST_F(PackedFile, ConvertingStopsWhenAsked) {
  const Tensor matrix = Ramp({40, 1 << 18});
  WeightStore store;
  store.AddView("matrix", matrix.view);
  ASSERT_TRUE(store.SetTarget("matrix", DType::kInt8).ok());
  int parts = 0;
  store.SetProgress([&](double) { return ++parts < 2; });
  EXPECT_EQ(store.Take("matrix", {40, 1 << 18}).status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(parts, 2);
}

TEST_F(PackedFile, AFileCutShortIsNoPackedFile) {
  const Tensor matrix = Ramp({1 << 12, 1 << 10});
  WeightStore store;
  store.AddView("matrix", matrix.view);
  PackedIndex index;
  index.tensors.emplace_back().name = "matrix";
  const TemporaryFolder folder;
  store.SetProgress([](double) { return false; });
  EXPECT_EQ(WritePackedFile(store, index, folder.file()).code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(ReadPackedIndex(folder.file()).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(PackedFile, PackQuantizedIsReadInAnyTarget) {
  // 2 rows of 64: elements 0 … 15 repeated, scales 0.5 and 0.25, then −2 and 1.
  std::vector<uint8_t> packed(64);
  for (size_t i = 0; i < packed.size(); ++i) {
    packed[i] = static_cast<uint8_t>((2 * i) % 16 | (2 * i + 1) % 16 << 4);
  }
  const std::vector<float> scales = {0.5f, 0.25f, -2.0f, 1.0f};
  const PackQuantized matrix{packed.data(), {scales.data(), DType::kFloat32, {2, 2}}, true};
  ASSERT_TRUE(ScalesAreExactInFloat16(matrix.scales));
  std::vector<float> values(128), from_blocks(128);
  PackQuantizedToFloat32(matrix, 0, 2, values.data());
  for (size_t i = 0; i < 128; ++i) {
    EXPECT_EQ(values[i], scales[i / 32] * (static_cast<float>(i % 16) - 8.0f)) << i;
  }
  std::vector<uint8_t> blocks(MatrixBytes(DType::kQ4_0, 2, 64));
  PackQuantizedToQ4(matrix, 0, 2, blocks.data());
  ReadRows({blocks.data(), DType::kQ4_0, {2, 64}}, 0, 2, from_blocks.data());
  EXPECT_EQ(from_blocks, values);
  const std::vector<float> small = {0.5f, 0.25f, 1e-12f, 1.0f};
  EXPECT_FALSE(ScalesAreExactInFloat16({small.data(), DType::kFloat32, {2, 2}}));
}

TEST(CheckedTensorBytes, RefusesWhatCanNotBe) {
  EXPECT_EQ(CheckedTensorBytes(DType::kInt4, {3, 33, 40}).value(),
            TensorBytes(DType::kInt4, {3, 33, 40}));
  EXPECT_EQ(CheckedTensorBytes(DType::kFloat32, {}).value(), 4u);
  EXPECT_EQ(CheckedTensorBytes(DType::kFloat32, {0, 5}).value(), 0u);
  for (const Shape& shape :
       {Shape{-1, 4}, Shape{int64_t{1} << 62, 4}, Shape{int64_t{1} << 40, int64_t{1} << 40},
        Shape{0, int64_t{1} << 60}, Shape{1, 1, 1, 1, 1, 1, 1, 1, 1}}) {
    EXPECT_FALSE(CheckedTensorBytes(DType::kInt8, shape).ok()) << ShapeString(shape);
  }
  EXPECT_FALSE(CheckedTensorBytes(DType::kQ8_0, {4, 33}).ok());
}

}  // namespace
}  // namespace gemloupe
