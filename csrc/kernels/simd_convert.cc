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

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
