// Attention alone: decode as bytes of keys and values per second beside the read bandwidth, prefill as
// a share of the float32 FMA peak, both measured in the same run. Prefill and its peak count CPU time
// over threads: passes of 100 ms never get a shared machine to themselves.
// Usage: gemloupe_attention_bench [threads [positions…]], by default 2 512 4096 32768.

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "base/cpu.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "ops/attention.h"
#include "ops/bandwidth.h"
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
constexpr Shape kShapes[] = {{"E2B full", 8, 1, 512, false},
                             {"26B full", 16, 2, 512, true},
                             {"12B full", 16, 1, 512, true},
                             {"E2B sliding", 8, 1, 256, false}};

double Seconds(const std::chrono::steady_clock::time_point& begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
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
  constexpr int kRepeat = 8000;
  double best = 0;
  for (int round = 0; round < 20; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    ThreadPool::Get().ParallelFor(threads, [&](int64_t, int) {
      alignas(64) static thread_local float a[6 * kK], b[kK * kN * 4], c[6 * kN * 4];
      for (int i = 0; i < kRepeat; ++i) {
        Kernels().accumulate_f32(c, kN * 4, a, kK, b, kN * 4, 6, kK, kN * 4);
      }
    });
    best = std::max(best, threads * kRepeat * 2.0 * 6 * kK * kN * 4 / Seconds(begin));
  }
  return best;
}

// Seconds of CPU that all threads of the process have used.
double CpuSeconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
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

double FastSeconds(const Shape& shape, const Filled& kv, int64_t rows, int64_t positions,
                   int repeat, bool cpu_time) {
  std::vector<float> q(static_cast<size_t>(rows * shape.heads * shape.head_dim), 0.01f);
  std::vector<float> z(q.size());
  std::vector<KeyRange> ranges;
  for (int64_t t = 0; t < rows; ++t) ranges.push_back({0, positions - rows + t + 1});
  std::vector<double> taken;
  for (int i = 0; i < repeat; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const double cpu_begin = CpuSeconds();
    Attention(ConstMatrix(q.data(), rows, shape.heads * shape.head_dim), kv.view, ranges.data(),
              Matrix(z.data(), rows, shape.heads * shape.head_dim));
    const double cpu = (CpuSeconds() - cpu_begin) / ThreadPool::Get().threads();
    taken.push_back(cpu_time ? cpu : Seconds(begin));
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
        const int64_t per_position =
            KvBlockLayout{dtype, shape.kv_heads, shape.head_dim, shape.head_dim / 8, derived}
                .bytes() /
            kKvBlock;
        // Enough copies, read in turn, that none is still in the caches.
        const int64_t copies =
            std::max<int64_t>(1, (int64_t{400} << 20) / (per_position * positions));
        std::vector<Filled> kv;
        for (int64_t i = 0; i < std::min<int64_t>(copies, 200); ++i) {
          kv.push_back(Fill(shape, dtype, derived, positions, weight));
        }
        std::vector<double> taken;
        for (int round = 0; round < 2 || taken.size() < 20; ++round) {
          for (const Filled& one : kv)
            taken.push_back(FastSeconds(shape, one, 1, positions, 1, false));
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
      const Filled kv = Fill(shape, dtype, shape.values_are_keys, positions, weight);
      const double seconds =
          FastSeconds(shape, kv, kRows, positions, positions > 8192 ? 1 : 5, true);
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
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  std::vector<int64_t> depths;
  for (int i = 2; i < argc; ++i) depths.push_back(std::atoll(argv[i]));
  if (depths.empty()) depths = {512, 4096, 32768};
  if (threads < 1 || *std::min_element(depths.begin(), depths.end()) < 512) {
    std::fprintf(stderr, "usage: %s [threads [positions…]]; at least 1 and 512\n", argv[0]);
    return 2;
  }
  if (!InitDispatch().ok()) return 1;
  const StatusOr<double> bandwidth = MeasureReadBandwidth(threads);
  if (!bandwidth.ok()) return 1;
  const ThreadPool::Pass pass(threads);
  const double peak = PeakFlops(threads);
  std::printf("%s, %s kernels, %d thread(s), %.2f GB/s read, %.1f Gflop/s float32\n",
              CpuModelName().c_str(), Kernels().name, threads, *bandwidth * 1e-9, peak * 1e-9);
  for (const int64_t positions : depths) Decode(positions, *bandwidth);
  for (const int64_t positions : depths) {
    if (positions <= 32768) Prefill(positions, peak);
  }
  return 0;
}

}  // namespace
}  // namespace gemloupe

int main(int argc, char** argv) { return gemloupe::Main(argc, argv); }
