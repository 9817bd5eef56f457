#include <cstddef>
#include <cstdint>

#include "kernels/simd_exp.h"
#include "kernels/simd_kernels.h"
#include "kernels/simd_vec.h"

// Products and sums are rounded one by one, as in the scalar twins and in the reference.

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

// dst[i] = function(a[i], b[i]).
template <class Function>
GEMLOUPE_INLINE void Map(float* dst, const float* a, const float* b, int64_t n, Function function) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Store(dst + i, function(Load(a + i), Load(b + i)));
  if (i < n) {
    const Tail tail = FirstElements(n - i);
    StoreTail(dst + i, function(LoadTail(a + i, tail), LoadTail(b + i, tail)), tail);
  }
}

// dst[i] = function(src[i]).
template <class Function>
GEMLOUPE_INLINE void Map(float* dst, const float* src, int64_t n, Function function) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Store(dst + i, function(Load(src + i)));
  if (i < n) {
    const Tail tail = FirstElements(n - i);
    StoreTail(dst + i, function(LoadTail(src + i, tail)), tail);
  }
}

// ½ z (1 + tanh(u)) = z / (1 + exp(−2u)): without the cancellation where tanh(u) is close to −1.
GEMLOUPE_INLINE Vec GeluTanh(Vec z) {
  constexpr float kMinusTwoRootTwoOverPi = -0x1.988454p+0f;  // −2 √(2/π)
  const Vec cubic = Fma(Mul(Mul(z, z), z), Set(0.044715f), z);
  return Div(z, Add(Set(1.0f), Exp(Mul(cubic, Set(kMinusTwoRootTwoOverPi)))));
}

}  // namespace

void Rope(float* x, const float* cos, const float* sin, int64_t pairs, int64_t half_dim) {
  float* y = x + half_dim;
  int64_t i = 0;
  for (; i + kWidth <= pairs; i += kWidth) {
    const Vec a = Load(x + i), b = Load(y + i), c = Load(cos + i), s = Load(sin + i);
    Store(x + i, Sub(Mul(a, c), Mul(b, s)));
    Store(y + i, Add(Mul(b, c), Mul(a, s)));
  }
  if (i < pairs) {
    const Tail tail = FirstElements(pairs - i);
    const Vec a = LoadTail(x + i, tail), b = LoadTail(y + i, tail);
    const Vec c = LoadTail(cos + i, tail), s = LoadTail(sin + i, tail);
    StoreTail(x + i, Sub(Mul(a, c), Mul(b, s)), tail);
    StoreTail(y + i, Add(Mul(b, c), Mul(a, s)), tail);
  }
}

void Add(float* dst, const float* a, const float* b, int64_t n) {
  Map(dst, a, b, n, [](Vec x, Vec y) { return Add(x, y); });
}

void Mul(float* dst, const float* a, const float* b, int64_t n) {
  Map(dst, a, b, n, [](Vec x, Vec y) { return Mul(x, y); });
}

void Scale(float* dst, const float* src, float factor, int64_t n) {
  const Vec f = Set(factor);
  Map(dst, src, n, [f](Vec x) { return Mul(x, f); });
}

void AddScaled(float* dst, const float* src, float factor, int64_t n) {
  const Vec f = Set(factor);
  Map(dst, dst, src, n, [f](Vec y, Vec x) { return Add(y, Mul(x, f)); });
}

void GeluMul(float* dst, const float* gate, const float* up, int64_t n) {
  Map(dst, gate, up, n, [](Vec z, Vec y) { return Mul(GeluTanh(z), y); });
}

void SigmoidMul(float* dst, const float* x, const float* gate, int64_t n) {
  Map(dst, x, gate, n, [](Vec v, Vec z) { return Div(v, Add(Set(1.0f), Exp(Sub(Set(0.0f), z)))); });
}

void Clamp(float* dst, const float* src, float low, float high, int64_t n) {
  const Vec lowest = Set(low), highest = Set(high);
  Map(dst, src, n, [=](Vec x) { return Min(highest, Max(lowest, x)); });
}

void Softcap(float* x, float cap, int64_t n) {
  const Vec c = Set(cap);
  Map(x, x, n, [c](Vec v) { return Mul(c, Tanh(Div(v, c))); });
}

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
