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

// dst[j, i] = src[i, j] for i, j < 4.
GEMLOUPE_INLINE void TransposeFour(float* dst, int64_t dst_stride, const float* src,
                                   int64_t src_stride) {
  const __m128 a = _mm_loadu_ps(src);
  const __m128 b = _mm_loadu_ps(src + src_stride);
  const __m128 c = _mm_loadu_ps(src + 2 * src_stride);
  const __m128 d = _mm_loadu_ps(src + 3 * src_stride);
  const __m128 ab_low = _mm_unpacklo_ps(a, b);
  const __m128 cd_low = _mm_unpacklo_ps(c, d);
  const __m128 ab_high = _mm_unpackhi_ps(a, b);
  const __m128 cd_high = _mm_unpackhi_ps(c, d);
  _mm_storeu_ps(dst, _mm_movelh_ps(ab_low, cd_low));
  _mm_storeu_ps(dst + dst_stride, _mm_movehl_ps(cd_low, ab_low));
  _mm_storeu_ps(dst + 2 * dst_stride, _mm_movelh_ps(ab_high, cd_high));
  _mm_storeu_ps(dst + 3 * dst_stride, _mm_movehl_ps(cd_high, ab_high));
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

void Transpose(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
               int64_t cols) {
  // Sixteen rows at a time fill a line of dst.
  for (int64_t row = 0; row < rows; row += 16) {
    const int64_t end = row + 16 < rows ? row + 16 : rows;
    const int64_t fours = row + (end - row) / 4 * 4;
    int64_t col = 0;
    for (; col + 4 <= cols; col += 4) {
      for (int64_t i = row; i < fours; i += 4) {
        TransposeFour(dst + col * dst_stride + i, dst_stride, src + i * src_stride + col,
                      src_stride);
      }
    }
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t i = c < col ? fours : row; i < end; ++i) {
        dst[c * dst_stride + i] = src[i * src_stride + c];
      }
    }
  }
}

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
