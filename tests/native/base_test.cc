// Types, memory, mapped files and CPU detection.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

#include "base/cgroup.h"
#include "base/cpu.h"
#include "base/dtype.h"
#include "base/mapped_file.h"
#include "base/memory.h"
#include "base/tensor.h"
#include "base/thread_pool.h"

namespace gemloupe {
namespace {

// A folder that disappears with the test.
class Folder {
 public:
  Folder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "gemloupe-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  // Writes `text` to the file `name`, making its folders; returns the file's path.
  std::string Write(const std::string& name, const std::string& text) const {
    const std::filesystem::path file = std::filesystem::path(path_) / name;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
    return file.string();
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(DType, EveryHalfSurvivesTheWayThroughFloat) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    if (!std::isnan(Float16ToFloat(half))) {
      ASSERT_EQ(FloatToFloat16(Float16ToFloat(half)), half);
    }
    if (!std::isnan(Bfloat16ToFloat(half))) {
      ASSERT_EQ(FloatToBfloat16(Bfloat16ToFloat(half)), half);
    }
  }
}

// The nearest of all finite halves by brute force, ties to the even one.
template <typename Widen>
uint16_t NearestByScan(float x, uint16_t largest, Widen widen) {
  uint16_t best = 0;
  double best_distance = std::numeric_limits<double>::infinity();
  for (uint32_t bits = 0; bits <= largest; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const double distance = std::fabs(static_cast<double>(widen(half)) - std::fabs(x));
    if (distance < best_distance || (distance == best_distance && bits % 2 == 0)) {
      best = half;
      best_distance = distance;
    }
  }
  return static_cast<uint16_t>(best | (std::signbit(x) ? 0x8000 : 0));
}

TEST(DType, RoundsToTheNearestHalfAndTiesToEven) {
  for (float x : {0.0f, -0.0f, 1.0f, 1.00048828125f, 1.00146484375f, 0.1f, -3.14159f, 65504.0f,
                  65519.0f, 6.0e-8f, 2.98e-8f, 0x1p-25f, 0x1.8p-24f, 0x1p-14f, 0x1.ffcp-15f,
                  0x1.ffep-15f, 1.00390625f, 1.01171875f, -1e-20f}) {
    EXPECT_EQ(FloatToFloat16(x), NearestByScan(x, 0x7bff, Float16ToFloat)) << x;
    EXPECT_EQ(FloatToBfloat16(x), NearestByScan(x, 0x7f7f, Bfloat16ToFloat)) << x;
  }
}

TEST(DType, OverflowIsInfiniteAndNanStaysNan) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(FloatToFloat16(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToFloat16(-1e30f), 0xfc00);
  EXPECT_EQ(FloatToFloat16(infinity), 0x7c00);
  EXPECT_EQ(FloatToBfloat16(std::numeric_limits<float>::max()), 0x7f80);
  float low_payload_nan;
  const uint32_t bits = 0x7f800001u;
  std::memcpy(&low_payload_nan, &bits, sizeof(bits));
  EXPECT_TRUE(std::isnan(Float16ToFloat(FloatToFloat16(low_payload_nan))));
  EXPECT_TRUE(std::isnan(Bfloat16ToFloat(FloatToBfloat16(low_payload_nan))));
}

TEST(DType, NamesAreParsedAndUnknownOnesListed) {
  EXPECT_EQ(ParseDType("bfloat16").value(), DType::kBfloat16);
  const Status status = ParseDType("fp8").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.ToString().find("expected one of float32, float16, bfloat16, q4_0"),
            std::string::npos);
}

TEST(Tensor, SliceWalksTheFirstAxis) {
  const uint16_t values[2 * 3 * 4] = {};
  const TensorView tensor{values, DType::kFloat16, {2, 3, 4}};
  EXPECT_EQ(tensor.byte_size(), 48u);
  const TensorView slice = tensor.Slice(1);
  EXPECT_EQ(slice.data, values + 12);
  EXPECT_EQ(ShapeString(slice.shape), "[3, 4]");
}

TEST(Memory, BuffersAreZeroedAndAligned) {
  for (size_t bytes : {size_t{1}, size_t{100}, size_t{2} << 20, (size_t{5} << 20) + 3}) {
    const AlignedBuffer buffer(bytes);
    const size_t alignment = bytes >= (size_t{2} << 20) ? size_t{2} << 20 : 64;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % alignment, 0u);
    EXPECT_EQ(buffer.data()[0], 0);
    EXPECT_EQ(buffer.data()[bytes - 1], 0);
  }
}

TEST(Memory, ImpossibleSizesThrow) {
  EXPECT_THROW(AlignedBuffer(std::numeric_limits<size_t>::max() - 1), std::bad_alloc);
  EXPECT_THROW(AlignedBuffer(size_t{1} << 60), std::bad_alloc);
}

TEST(Memory, ArenaScopesGiveBackAndLaterPassesReuse) {
  Arena arena;
  const auto pass = [&arena] {
    const Arena::Scope scope(arena);
    for (size_t bytes : {size_t{1}, size_t{70}, size_t{900000}, size_t{3} << 20, size_t{64}}) {
      auto* taken = static_cast<uint8_t*>(arena.Bytes(bytes));
      EXPECT_EQ(reinterpret_cast<uintptr_t>(taken) % 64, 0u);
      std::memset(taken, 0xff, bytes);  // an overlap would be caught by AddressSanitizer
    }
    const Matrix matrix = arena.NewMatrix(3, 5);
    EXPECT_EQ(matrix.stride, 5);
  };
  pass();
  pass();
  const size_t settled = arena.capacity();
  for (int i = 0; i < 5; ++i) pass();
  EXPECT_EQ(arena.capacity(), settled);
  arena.ShrinkTo(0);
  EXPECT_EQ(arena.capacity(), 0u);
}

TEST(Memory, ArenaPiecesDoNotOverlap) {
  Arena arena;
  const Arena::Scope scope(arena);
  int* first = arena.New<int>(1000);
  first[999] = 1;
  {
    const Arena::Scope inner(arena);
    arena.New<int>(1 << 20)[0] = 2;
  }
  int* second = arena.New<int>(1000);
  second[0] = 3;
  EXPECT_EQ(first[999], 1);
  EXPECT_EQ(second - first, 1008);  // 4000 bytes, rounded up to cache lines
}

TEST(Memory, SomeMemoryIsAvailable) { EXPECT_GT(AvailableMemory(), uint64_t{1} << 20); }

TEST(MappedFile, ShowsTheBytesOfTheFile) {
  const Folder folder;
  const auto file = MappedFile::Open(folder.Write("weights", "0123456789"));
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  EXPECT_EQ(std::string((*file)->data(), (*file)->data() + (*file)->size()), "0123456789");
  const auto empty = MappedFile::Open(folder.Write("empty", ""));
  ASSERT_TRUE(empty.ok());
  EXPECT_EQ((*empty)->size(), 0u);
}

TEST(MappedFile, SaysWhatIsWrongAndWhere) {
  const Folder folder;
  const Status missing = MappedFile::Open(folder.path() + "/none").status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_NE(missing.ToString().find(folder.path() + "/none"), std::string::npos);
  const Status is_folder = MappedFile::Open(folder.path()).status();
  EXPECT_EQ(is_folder.code(), absl::StatusCode::kInvalidArgument);
  const std::string fifo = folder.path() + "/fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_EQ(MappedFile::Open(fifo).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Cgroup, Version2TakesTheStrictestOfTheGroupAndItsParents) {
  const Folder root;
  root.Write("proc/self/cgroup", "0::/slice/job\n");
  root.Write("sys/fs/cgroup/slice/job/cpu.max", "max 100000\n");
  root.Write("sys/fs/cgroup/slice/cpu.max", "150000 100000\n");
  root.Write("sys/fs/cgroup/slice/job/memory.max", "max\n");
  root.Write("sys/fs/cgroup/slice/memory.max", "1000\n");
  root.Write("sys/fs/cgroup/slice/memory.current", "700\n");
  root.Write("sys/fs/cgroup/slice/memory.stat", "anon 5\ninactive_file 100\n");
  EXPECT_EQ(CgroupCpuQuota(root.path()), 1.5);
  EXPECT_EQ(CgroupAvailableMemory(root.path()), 400u);
}

TEST(Cgroup, Version1IsReadWhereItsPathIsTheHosts) {
  const Folder root;
  root.Write("proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n");
  root.Write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "200000\n");
  root.Write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  root.Write("sys/fs/cgroup/memory/memory.limit_in_bytes", "5000\n");
  root.Write("sys/fs/cgroup/memory/memory.usage_in_bytes", "6000\n");
  EXPECT_EQ(CgroupCpuQuota(root.path()), 2.0);
  EXPECT_EQ(CgroupAvailableMemory(root.path()), 0u);
}

TEST(Cgroup, NoLimitIsEmpty) {
  const Folder root;
  root.Write("proc/self/cgroup", "0::/\n");
  EXPECT_FALSE(CgroupCpuQuota(root.path()).has_value());
  EXPECT_FALSE(CgroupAvailableMemory(root.path()).has_value());
}

TEST(Cpu, TheSelectedIsaIsOneThatTheCpuHas) {
  const auto selected = SelectedIsa();
  ASSERT_TRUE(selected.ok()) << selected.status().ToString();
  EXPECT_LE(*selected, DetectedIsa());
  EXPECT_FALSE(CpuModelName().empty());
  EXPECT_GE(AvailableCpus(), 1);
}

// SelectedIsa reads the variable once per process, hence the process of its own.
void ExitUnlessIsaIsRefused(const char* name) {
  setenv("GEMLOUPE_ISA", name, 1);
  const Status status = SelectedIsa().status();
  const bool refused = status.code() == absl::StatusCode::kInvalidArgument &&
                       status.ToString().find("choose one of portable") != std::string::npos;
  std::exit(refused ? 0 : 1);
}

TEST(CpuDeathTest, UnknownIsaIsRefusedWithTheChoices) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(ExitUnlessIsaIsRefused("sse9"), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace gemloupe
