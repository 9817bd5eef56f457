#include <cstddef>
#include <cstdint>

#include "kernels/simd_kernels.h"
#include "kernels/simd_vec.h"

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

template <class Element>
GEMLOUPE_INLINE void Widen(float* dst, const void* src, int64_t n) {
  const char* from = static_cast<const char*>(src);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Store(dst + i, Element::Load(from + i * Element::kBytes));
  if (i < n) {
    const Tail tail = FirstElements(n - i);
    StoreTail(dst + i, Element::LoadTail(from + i * Element::kBytes, tail), tail);
  }
}

template <class Element>
GEMLOUPE_INLINE void Narrow(uint16_t* dst, const float* src, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) StoreBits(dst + i, Element::Round(Load(src + i)));
  if (i < n) {
    const Tail tail = FirstElements(n - i);
    StoreBitsTail(dst + i, Element::Round(LoadTail(src + i, tail)), tail);
  }
}

}  // namespace

void Bf16ToF32(float* dst, const void* src, int64_t n) { Widen<Bfloat16>(dst, src, n); }
void F16ToF32(float* dst, const void* src, int64_t n) { Widen<Float16>(dst, src, n); }
void F32ToBf16(uint16_t* dst, const float* src, int64_t n) { Narrow<Bfloat16>(dst, src, n); }
void F32ToF16(uint16_t* dst, const float* src, int64_t n) { Narrow<Float16>(dst, src, n); }
void I8ToF32(float* dst, const void* src, int64_t n) { Widen<Int8>(dst, src, n); }

float F32ToI8(int8_t* dst, const float* src, int64_t n) {
  // Max keeps its second argument where |x| is NaN.
  Vec largest_of = Set(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) largest_of = Max(Abs(Load(src + i)), largest_of);
  if (i < n) largest_of = Max(Abs(LoadTail(src + i, FirstElements(n - i))), largest_of);
  const float largest = Largest(largest_of);
  const bool none = largest < 1e-30f;  // 127 / largest could overflow
  const Vec inverse = Set(none ? 0.0f : 127.0f / largest);
  for (i = 0; i + kWidth <= n; i += kWidth) {
    Int8::StoreBytes(dst + i, Int8::Round(Mul(Load(src + i), inverse)));
  }
  if (i < n) {
    const Tail tail = FirstElements(n - i);
    Int8::StoreBytesTail(dst + i, Int8::Round(Mul(LoadTail(src + i, tail), inverse)), tail);
  }
  return none ? 0.0f : largest / 127.0f;
}

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
