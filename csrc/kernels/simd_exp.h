#ifndef GEMLOUPE_KERNELS_SIMD_EXP_H_
#define GEMLOUPE_KERNELS_SIMD_EXP_H_

#include "kernels/simd_vec.h"

// exp and tanh of a vector, within 2 and 3 units in the last place.

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

// x = n·ln 2 + r, |r| ≤ ½ ln 2, and expm1(r).
struct ReducedExp {
  Vec n;
  Vec expm1;
};

GEMLOUPE_INLINE ReducedExp ReduceExp(Vec x) {
  // ln 2 = high + low; n · high is exact for |n| < 2^9.
  const Vec n = Round(Mul(x, Set(0x1.715476p+0f)));
  Vec r = Fma(n, Set(-0x1.62e4p-1f), x);
  r = Fma(n, Set(-0x1.7f7d1cp-20f), r);
  // Minimax fit of (expm1(r) − r) / r², relative to expm1: error 0.04 · 2^-24.
  Vec p = Set(0x1.a032bep-13f);
  p = Fma(p, r, Set(0x1.6d71f8p-10f));
  p = Fma(p, r, Set(0x1.11118ap-7f));
  p = Fma(p, r, Set(0x1.5554b2p-5f));
  p = Fma(p, r, Set(0x1.555554p-3f));
  p = Fma(p, r, Set(0.5f));
  return {n, Fma(p, Mul(r, r), r)};
}

// exp(−∞) = 0, exp(x) = ∞ above 88.73; subnormal results are kept; NaN stays NaN.
GEMLOUPE_INLINE Vec Exp(Vec x) {
  x = Min(Set(90.0f), Max(Set(-105.0f), x));
  const ReducedExp e = ReduceExp(x);
  return ScaleByPowerOfTwo(Add(Set(1.0f), e.expm1), e.n);
}

// tanh(±∞) = ±1; tanh(x) = x for tiny x, −0 included; NaN stays NaN.
GEMLOUPE_INLINE Vec Tanh(Vec x) {
  const Vec one = Set(1.0f);
  // tanh(10) rounds to 1.
  const ReducedExp e = ReduceExp(Min(Set(20.0f), Abs(Add(x, x))));
  const Vec power = ScaleByPowerOfTwo(one, e.n);
  const Vec expm1 = Fma(power, e.expm1, Sub(power, one));
  return CopySign(Div(expm1, Add(expm1, Set(2.0f))), x);
}

}  // namespace
}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA

#endif  // GEMLOUPE_KERNELS_SIMD_EXP_H_
