#include <cstddef>
#include <cstdint>

#include "kernels/simd_kernels.h"
#include "kernels/simd_vec.h"

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

// Σ x². Four accumulators hide the latency of the FMA.
GEMLOUPE_INLINE float SumOfSquares(const float* x, int64_t n) {
  constexpr int kSums = 4;
  Vec sum[kSums] = {Set(0.0f), Set(0.0f), Set(0.0f), Set(0.0f)};
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
    GEMLOUPE_UNROLL
    for (int s = 0; s < kSums; ++s) {
      const Vec v = Load(x + i + s * kWidth);
      sum[s] = Fma(v, v, sum[s]);
    }
  }
  for (; i + kWidth <= n; i += kWidth) {
    const Vec v = Load(x + i);
    sum[0] = Fma(v, v, sum[0]);
  }
  if (i < n) {
    const Vec v = LoadTail(x + i, FirstElements(n - i));
    sum[1] = Fma(v, v, sum[1]);
  }
  return Sum(Add(Add(sum[0], sum[1]), Add(sum[2], sum[3])));
}

}  // namespace

void RmsNorm(float* dst, const float* src, const float* weight, int64_t n, float eps) {
  const __m128 mean_square = _mm_set_ss(SumOfSquares(src, n) / static_cast<float>(n) + eps);
  const Vec inverse = Set(1.0f / _mm_cvtss_f32(_mm_sqrt_ss(mean_square)));
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec x = Mul(Load(src + i), inverse);
    Store(dst + i, weight != nullptr ? Mul(x, Load(weight + i)) : x);
  }
  if (i < n) {
    const Tail tail = FirstElements(n - i);
    const Vec x = Mul(LoadTail(src + i, tail), inverse);
    StoreTail(dst + i, weight != nullptr ? Mul(x, LoadTail(weight + i, tail)) : x, tail);
  }
}

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
