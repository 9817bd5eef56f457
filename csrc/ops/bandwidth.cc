#include "ops/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "ops/dispatch.h"

namespace gemloupe {

StatusOr<double> MeasureReadBandwidth(int threads) {
  GL_RETURN_IF_ERROR(InitDispatch());
  constexpr int64_t kBytes = int64_t{512} << 20;
  constexpr int64_t kPart = int64_t{1} << 20;
  if (AvailableMemory() < 2 * static_cast<uint64_t>(kBytes)) {
    return absl::ResourceExhaustedError("measuring the read bandwidth needs 1 GiB of free memory");
  }
  const AlignedBuffer buffer(static_cast<size_t>(kBytes));
  const ThreadPool::Pass pass(std::max(1, threads));
  ThreadPool& pool = ThreadPool::Get();
  // Touching every page first: pages never written all map to one page of zeros.
  pool.ParallelFor(kBytes / kPart, [&](int64_t part, int) {
    std::fill_n(reinterpret_cast<float*>(buffer.data() + part * kPart), kPart / 4, 1.0f);
  });
  std::atomic<int> sink{0};
  double best = 0.0;
  for (int round = 0; round < 3; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    pool.ParallelFor(kBytes / kPart, [&](int64_t part, int) {
      const auto* x = reinterpret_cast<const float*>(buffer.data() + part * kPart);
      if (Kernels().max(x, kPart / 4) > 2.0f) sink.fetch_add(1);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(kBytes) / seconds.count());
  }
  return best;
}

}  // namespace gemloupe
