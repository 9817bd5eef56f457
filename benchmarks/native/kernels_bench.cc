// Bytes per second that the matmul kernels read, beside a loop that only reads the same memory.
// Usage: gemloupe_kernels_bench [threads [k [n]]], by default 1 1536 65536.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "base/memory.h"
#include "kernels/kernel_table.h"

namespace gemloupe {
namespace {

// Work is timed in slices short enough to fit between the neighbours of a shared machine; a slice
// has left the caches by the time it is read again.
constexpr int64_t kSliceBytes = 4 << 20;
constexpr int kSlices = 120;  // timed slices of each kind; the fastest tenth counts

// Keeps the compiler from leaving out a loop whose result nobody reads.
volatile uint64_t sink;

// Reads eight parts of [p, p + bytes) side by side: one stream alone does not saturate the memory.
void Read(const uint8_t* p, int64_t bytes) {
  constexpr int kStreams = 8;
  constexpr int kLine = 8;  // words of a cache line
  const int64_t words = bytes / 8 / kStreams / kLine * kLine;
  uint64_t sum[kStreams] = {};
  for (int64_t i = 0; i < words; i += kLine) {
    for (int s = 0; s < kStreams; ++s) {
      const uint64_t* line = reinterpret_cast<const uint64_t*>(p) + s * words + i;
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(line) + 512);
      for (int w = 0; w < kLine; ++w) sum[s] += line[w];
    }
  }
  uint64_t total = 0;
  for (const uint64_t part : sum) total += part;
  sink = total;
}

double FastestTenth(std::vector<double>& seconds) {
  const auto at = seconds.begin() + seconds.size() / 10;
  std::nth_element(seconds.begin(), at, seconds.end());
  return *at;
}

struct Rates {
  double read;  // bytes per second
  double work;
};

// Times reading and `work(thread, offset)` by turns, over slices of [0, bytes).
Rates Measure(int threads, const AlignedBuffer& memory, int64_t slice_bytes,
              const std::function<void(int, int64_t)>& work) {
  const int64_t slices = static_cast<int64_t>(memory.size()) / (slice_bytes * threads);
  std::vector<double> seconds[2];
  std::barrier barrier(threads);
  const auto run = [&](int t) {
    for (int64_t i = 0; i < 2 * kSlices; ++i) {
      const int64_t offset = (i % slices * threads + t) * slice_bytes;
      barrier.arrive_and_wait();
      const auto start = std::chrono::steady_clock::now();
      if (i % 2 == 0) {
        Read(memory.data() + offset, slice_bytes);
      } else {
        work(t, offset);
      }
      barrier.arrive_and_wait();
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      if (t == 0) seconds[i % 2].push_back(taken.count());
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
  run(0);
  for (std::thread& other : others) other.join();
  const double bytes = static_cast<double>(slice_bytes) * threads;
  return {bytes / FastestTenth(seconds[0]), bytes / FastestTenth(seconds[1])};
}

void BenchMatmul(const KernelTable& kernels, int threads, int64_t k, const AlignedBuffer& memory) {
  const struct {
    const char* name;
    MatmulKernel matmul;
    int64_t bytes;
  } dtypes[] = {{"float32", kernels.matmul_f32, 4},
                {"bfloat16", kernels.matmul_bf16, 2},
                {"float16", kernels.matmul_f16, 2}};
  for (const auto& dtype : dtypes) {
    const int64_t n = std::max<int64_t>(8, kSliceBytes / (k * dtype.bytes) / 8 * 8);
    const AlignedBuffer src(kMaxKernelRows * k * 4), dst(threads * kMaxKernelRows * n * 4);
    for (const int rows : {1, 2, 4, 8}) {
      const Rates rates = Measure(threads, memory, n * k * dtype.bytes, [&](int t, int64_t at) {
        dtype.matmul(reinterpret_cast<float*>(dst.data()) + t * kMaxKernelRows * n, n,
                     reinterpret_cast<const float*>(src.data()), k, memory.data() + at, k, rows, n,
                     k, {});
      });
      std::printf("%-8s %-8s  %d rows  %6.2f GB/s  %3.0f %% of %5.2f GB/s read  %6.1f Gflop/s\n",
                  kernels.name, dtype.name, rows, rates.work * 1e-9, 100 * rates.work / rates.read,
                  rates.read * 1e-9, rates.work * 2 * rows / dtype.bytes * 1e-9);
    }
  }
}

int Main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const int64_t k = argc > 2 ? std::atoll(argv[2]) : 1536;
  const int64_t n = argc > 3 ? std::atoll(argv[3]) : 65536;
  if (threads < 1 || k < 1 || n < 1) {
    std::fprintf(stderr, "usage: %s [threads [k [n]]], each at least 1\n", argv[0]);
    return 2;
  }
  std::printf("%s, %d thread(s), k %lld, n %lld\n", CpuModelName().c_str(), threads,
              static_cast<long long>(k), static_cast<long long>(n));
  AlignedBuffer memory(k * n * 4);
  // 1.0 as float32, a normal number as 16 bits.
  for (int64_t i = 0; i < k * n; ++i) reinterpret_cast<uint32_t*>(memory.data())[i] = 0x3f803f80;
  if (DetectedIsa() >= Isa::kAvx512 && Avx512Kernels() != nullptr) {
    BenchMatmul(*Avx512Kernels(), threads, k, memory);
  }
  if (DetectedIsa() >= Isa::kAvx2 && Avx2Kernels() != nullptr) {
    BenchMatmul(*Avx2Kernels(), threads, k, memory);
  }
  return 0;
}

}  // namespace
}  // namespace gemloupe

int main(int argc, char** argv) { return gemloupe::Main(argc, argv); }
