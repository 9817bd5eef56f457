// Attention alone: decode as bytes of keys and values per second beside the read bandwidth, prefill as
// a share of the float32 FMA peak, all measured in the same run, in CPU time with one thread (a shared
// machine takes the core away), on the wall with more; of each, the fastest tenth of short passes.
// Usage: gemloupe_attention_bench [--only WORD]… [threads [positions…]], by default 2 512 4096 32768.
// --only: the lines that have each WORD in them, such as decode, "E2B full", float16, derived.

#include <time.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "ops/attention.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

struct Shape {
  const char* name;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  bool values_are_keys;
};
constexpr Shape kShapes[] = {{"E2B full", 8, 1, 512, false},    {"E4B full", 8, 2, 512, false},
                             {"26B full", 16, 2, 512, true},    {"12B full", 16, 1, 512, true},
                             {"E2B sliding", 8, 1, 256, false}, {"E4B sliding", 8, 2, 256, false},
                             {"26B sliding", 16, 8, 256, false}};

// What --only asked for.
std::vector<std::string> only;

// Whether the line of these words is wanted.
bool Wanted(const char* kind, const Shape& shape, DType dtype, bool derived) {
  const std::string line = std::string(kind) + " " + shape.name + " " + DTypeName(dtype) + " " +
                           (derived ? "derived" : "separate");
  return std::all_of(only.begin(), only.end(),
                     [&](const std::string& word) { return line.find(word) != std::string::npos; });
}

// What is read in turn, so that none of it is still in the caches.
constexpr int64_t kColdBytes = int64_t{1} << 30;

// CPU time where one thread runs. With more, a thread that found no core to run on would count as
// fast in CPU time: the others do its part.
double Now() {
  timespec now;
  clock_gettime(ThreadPool::Get().threads() == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC,
                &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// The machine is shared: the fastest tenth counts, as it does for the bandwidth and the peak.
double FastestTenth(std::vector<double>& seconds) {
  const auto at = seconds.begin() + static_cast<int64_t>(seconds.size()) / 10;
  std::nth_element(seconds.begin(), at, seconds.end());
  return *at;
}

// Multiply-adds per second · 2 of independent FMAs in registers: the matmul kernel on operands that
// stay in the first-level cache, its best block.
double PeakFlops(int threads) {
  constexpr int64_t kK = 64, kN = 16;
  constexpr int kRepeat = 2000;
  double best = 0;
  for (int round = 0; round < 80; ++round) {
    const double begin = Now();
    ThreadPool::Get().ParallelFor(threads, [&](int64_t, int) {
      alignas(64) static thread_local float a[6 * kK], b[kK * kN * 4], c[6 * kN * 4];
      for (int i = 0; i < kRepeat; ++i) {
        Kernels().accumulate_f32(c, kN * 4, a, kK, b, kN * 4, 6, kK, kN * 4, {});
      }
    });
    best = std::max(best, threads * kRepeat * 2.0 * 6 * kK * kN * 4 / (Now() - begin));
  }
  return best;
}

// Bytes per second that the threads read: as MeasureReadBandwidth, in short passes.
double ReadRate(int threads) {
  constexpr int64_t kPart = int64_t{4} << 20, kWidth = 1024, kRows = kPart / 4 / kWidth;
  constexpr int64_t kParts = kColdBytes / kPart;
  const AlignedBuffer buffer(kColdBytes);
  std::memset(buffer.data(), 0, kColdBytes);
  const std::vector<float> src(kWidth, 1.0f);
  std::vector<double> taken;
  for (int round = 0; round < 3; ++round) {
    for (int64_t group = 0; group < kParts; group += 4 * threads) {
      const int64_t parts = std::min<int64_t>(4 * threads, kParts - group);
      if (parts < 4 * threads) break;
      const double begin = Now();
      ThreadPool::Get().ParallelFor(parts, [&](int64_t part, int) {
        std::array<float, kRows> sums;
        Kernels().matmul_f32(sums.data(), kRows, src.data(), kWidth,
                             buffer.data() + (group + part) * kPart, kWidth, 1, kRows, kWidth, {});
      });
      taken.push_back(Now() - begin);
    }
  }
  return 4.0 * threads * kPart / FastestTenth(taken);
}

struct Filled {
  std::vector<std::unique_ptr<AlignedBuffer>> blocks;
  KvView view;
};

Filled Fill(const Shape& shape, DType dtype, bool derived, int64_t positions,
            const std::vector<float>& weight) {
  Filled filled;
  filled.view.layout = {dtype, shape.kv_heads, shape.head_dim, derived ? shape.head_dim / 8 : 0,
                        derived};
  filled.view.key_weight = weight.data();
  const KvBlockLayout& layout = filled.view.layout;
  std::vector<float> row(static_cast<size_t>(shape.kv_heads * shape.head_dim));
  for (int64_t block = 0; block * kKvBlock < positions; ++block) {
    filled.blocks.push_back(std::make_unique<AlignedBuffer>(static_cast<size_t>(layout.bytes())));
    for (int64_t at = 0; at < kKvBlock; ++at) {
      for (size_t i = 0; i < row.size(); ++i) {
        row[i] = static_cast<float>(static_cast<int>((i * 37 + at * 11) % 64) - 32) / 64.0f;
      }
      WriteKv(layout, filled.blocks.back()->data(), at, row.data(), row.data());
    }
    filled.view.blocks.push_back(filled.blocks.back()->data());
  }
  return filled;
}

Filled Copy(const Filled& from) {
  Filled copy;
  copy.view = from.view;
  for (size_t i = 0; i < from.blocks.size(); ++i) {
    copy.blocks.push_back(std::make_unique<AlignedBuffer>(from.blocks[i]->size()));
    std::memcpy(copy.blocks[i]->data(), from.blocks[i]->data(), from.blocks[i]->size());
    copy.view.blocks[i] = copy.blocks[i]->data();
  }
  return copy;
}

// Seconds of the fastest tenth of `repeat` passes.
double FastSeconds(const Shape& shape, const Filled& kv, int64_t rows, int64_t positions,
                   int repeat) {
  std::vector<float> q(static_cast<size_t>(rows * shape.heads * shape.head_dim), 0.01f);
  std::vector<float> z(q.size());
  std::vector<KeyRange> ranges;
  for (int64_t t = 0; t < rows; ++t) ranges.push_back({0, positions - rows + t + 1});
  std::vector<double> taken;
  for (int i = 0; i < repeat; ++i) {
    const double begin = Now();
    Attention(ConstMatrix(q.data(), rows, shape.heads * shape.head_dim), kv.view, ranges.data(),
              Matrix(z.data(), rows, shape.heads * shape.head_dim));
    taken.push_back(Now() - begin);
  }
  return FastestTenth(taken);
}

void Decode(int64_t positions, double bandwidth) {
  for (const Shape& shape : kShapes) {
    const std::vector<float> weight(static_cast<size_t>(shape.head_dim), 1.0f);
    for (const DType dtype : {DType::kFloat16, DType::kBfloat16, DType::kInt8}) {
      for (const bool derived : {false, true}) {
        if (derived && !shape.values_are_keys) continue;
        if (!derived && shape.values_are_keys && dtype == DType::kBfloat16) continue;
        if (!Wanted("decode", shape, dtype, derived)) continue;
        const int64_t per_position =
            KvBlockLayout{dtype, shape.kv_heads, shape.head_dim, shape.head_dim / 8, derived}
                .bytes() /
            kKvBlock;
        const int64_t copies = std::max<int64_t>(1, kColdBytes / (per_position * positions));
        std::vector<Filled> kv;
        kv.push_back(Fill(shape, dtype, derived, positions, weight));
        while (static_cast<int64_t>(kv.size()) < copies) kv.push_back(Copy(kv.front()));
        std::vector<double> taken;
        for (int round = 0; round < 2 || taken.size() < 60; ++round) {
          for (const Filled& one : kv) taken.push_back(FastSeconds(shape, one, 1, positions, 1));
        }
        const double seconds = FastestTenth(taken);
        const double rate = static_cast<double>(per_position * positions) / seconds;
        std::printf(
            "decode  %-12s %-8s %-8s %7lld positions %5lld B each %8.0f us %6.2f GB/s %3.0f %%\n",
            shape.name, DTypeName(dtype), derived ? "derived" : "separate",
            static_cast<long long>(positions), static_cast<long long>(per_position), seconds * 1e6,
            rate * 1e-9, 100 * rate / bandwidth);
      }
    }
  }
}

void Prefill(int64_t positions, double peak) {
  constexpr int64_t kRows = 512;
  for (const Shape& shape : kShapes) {
    const std::vector<float> weight(static_cast<size_t>(shape.head_dim), 1.0f);
    for (const DType dtype : {DType::kFloat16, DType::kInt8}) {
      if (!Wanted("prefill", shape, dtype, shape.values_are_keys)) continue;
      const Filled kv = Fill(shape, dtype, shape.values_are_keys, positions, weight);
      const double seconds = FastSeconds(shape, kv, kRows, positions, positions > 8192 ? 1 : 5);
      const double pairs = kRows * (static_cast<double>(positions) - (kRows - 1) / 2.0);
      const double flops =
          4.0 * static_cast<double>(shape.heads * shape.head_dim) * pairs / seconds;
      std::printf("prefill %-12s %-8s %7lld positions %9.1f ms %7.1f Gflop/s %3.0f %%\n",
                  shape.name, DTypeName(dtype), static_cast<long long>(positions), seconds * 1e3,
                  flops * 1e-9, 100 * flops / peak);
    }
  }
}

int Main(int argc, char** argv) {
  std::vector<int64_t> numbers;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
      only.emplace_back(argv[++i]);
    } else {
      numbers.push_back(std::atoll(argv[i]));
    }
  }
  const int threads = numbers.empty() ? 2 : static_cast<int>(numbers[0]);
  std::vector<int64_t> depths(numbers.begin() + (numbers.empty() ? 0 : 1), numbers.end());
  if (depths.empty()) depths = {512, 4096, 32768};
  if (threads < 1 || *std::min_element(depths.begin(), depths.end()) < 512) {
    std::fprintf(stderr, "usage: %s [--only WORD]… [threads [positions…]]; at least 1 and 512\n",
                 argv[0]);
    return 2;
  }
  if (!InitDispatch().ok()) return 1;
  const ThreadPool::Pass pass(threads);
  const double bandwidth = ReadRate(threads);
  const double peak = PeakFlops(threads);
  std::printf("%s, %s kernels, %d thread(s), %.2f GB/s read, %.1f Gflop/s float32\n",
              CpuModelName().c_str(), Kernels().name, threads, bandwidth * 1e-9, peak * 1e-9);
  for (const int64_t positions : depths) Decode(positions, bandwidth);
  for (const int64_t positions : depths) {
    if (positions <= 32768) Prefill(positions, peak);
  }
  return 0;
}

}  // namespace
}  // namespace gemloupe

int main(int argc, char** argv) { return gemloupe::Main(argc, argv); }
