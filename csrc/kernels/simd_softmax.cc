#include <cstddef>
#include <cstdint>

#include "kernels/simd_exp.h"
#include "kernels/simd_kernels.h"
#include "kernels/simd_vec.h"

namespace gemloupe::GEMLOUPE_KERNEL_ISA {

// The products of softmax weights with values run many times slower on subnormal weights.
constexpr float kSmallestNormal = 0x1p-126f;

float Max(const float* x, int64_t n) {
  const Vec lowest = Set(-__builtin_inff());
  // Max keeps its second argument where x is NaN.
  Vec largest[2] = {lowest, lowest};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    largest[0] = Max(Load(x + i), largest[0]);
    largest[1] = Max(Load(x + i + kWidth), largest[1]);
  }
  for (; i + kWidth <= n; i += kWidth) largest[0] = Max(Load(x + i), largest[0]);
  if (i < n) {
    const Tail tail = FirstElements(n - i);
    largest[1] = Max(Select(tail, LoadTail(x + i, tail), lowest), largest[1]);
  }
  return Largest(Max(largest[0], largest[1]));
}

float ExpSum(float* dst, const float* src, float shift, int64_t n) {
  const Vec offset = Set(shift);
  const Vec normal = Set(kSmallestNormal);
  Vec sum = Set(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec e = ZeroBelow(Exp(Sub(Load(src + i), offset)), normal);
    if (dst != nullptr) Store(dst + i, e);
    sum = Add(sum, e);
  }
  if (i < n) {
    const Tail tail = FirstElements(n - i);
    const Vec e = ZeroBelow(Exp(Sub(LoadTail(src + i, tail), offset)), normal);
    if (dst != nullptr) StoreTail(dst + i, e, tail);
    sum = Add(sum, Select(tail, e, Set(0.0f)));
  }
  return Sum(sum);
}

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
