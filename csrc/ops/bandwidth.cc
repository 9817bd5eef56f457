#include "ops/bandwidth.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

// Four times the last cache, so that little of one round is left for the next: the weights of a token
// are no smaller. (Servers lend a virtual machine hundreds of megabytes of cache.)
int64_t BytesToRead() {
  int64_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  cache = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
#endif
  return std::clamp<int64_t>(4 * cache >> 22 << 22, int64_t{512} << 20, int64_t{2} << 30);
}

}  // namespace

StatusOr<double> MeasureReadBandwidth(int threads) {
  GL_RETURN_IF_ERROR(InitDispatch());
  const int64_t bytes = BytesToRead();
  constexpr int64_t kPart = int64_t{4} << 20;
  constexpr int64_t kWidth = 1024;  // a part is a float matrix [kPart / 4 / kWidth, kWidth]
  constexpr int64_t kRows = kPart / static_cast<int64_t>(sizeof(float)) / kWidth;
  if (AvailableMemory() < 2 * static_cast<uint64_t>(bytes)) {
    return absl::ResourceExhaustedError(absl::StrCat("measuring the read bandwidth needs ",
                                                     2 * bytes >> 20, " MiB of free memory"));
  }
  const AlignedBuffer buffer(static_cast<size_t>(bytes));
  const ThreadPool::Pass pass(std::max(1, threads));
  ThreadPool& pool = ThreadPool::Get();
  // Touching every page first: pages never written all map to one page of zeros.
  pool.ParallelFor(bytes / kPart, [&](int64_t part, int) {
    std::fill_n(reinterpret_cast<float*>(buffer.data() + part * kPart), kRows * kWidth, 1.0f);
  });
  const std::vector<float> src(kWidth, 1.0f);
  double best = 0.0;
  for (int round = 0; round < 3; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    // The kernel reads as several streams a core; one alone does not reach the memory's limit.
    pool.ParallelFor(bytes / kPart, [&](int64_t part, int) {
      std::array<float, kRows> sums;
      Kernels().matmul_f32(sums.data(), kRows, src.data(), kWidth, buffer.data() + part * kPart,
                           kWidth, 1, kRows, kWidth, {});
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(bytes) / seconds.count());
  }
  return best;
}

}  // namespace gemloupe
