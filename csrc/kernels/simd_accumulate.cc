#include <cstddef>
#include <cstdint>

#include "kernels/simd_kernels.h"
#include "kernels/simd_vec.h"

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

// Values j … j + 31 stay in the cache while all columns pass over them and the next are fetched.
constexpr int64_t kBlockValues = 32;
// The fetched values are walked as four streams: one alone does not saturate the memory.
constexpr int64_t kStreams = 4;
constexpr int kLineBytes = 64;

// Vectors of columns whose sums are kept in registers. By rows, for 32 and for 16 registers:
constexpr int kVecs32[] = {16, 8, 8, 4, 4, 4, 2, 2};
constexpr int kVecs16[] = {8, 4, 4, 2, 1, 1, 1, 1};
template <int kRows>
constexpr int kVecs = (kRegisters == 32 ? kVecs32 : kVecs16)[kRows - 1];

// dst[r, c] += Σ_j coef[r, j] · value[j, c] for kRows × kVecs vectors of dst.
template <class Element, int kRows, int kVecs>
GEMLOUPE_INLINE void Block(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                           const char* value, int64_t value_bytes, int64_t count) {
  Vec sum[kRows][kVecs];
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GEMLOUPE_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Load(dst + r * dst_stride + v * kWidth);
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t ahead = kBlockValues + j % kStreams * (kBlockValues / kStreams) + j / kStreams;
    Vec x[kVecs];
    GEMLOUPE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      const int column = v * kWidth * Element::kBytes;
      if (column % kLineBytes == 0) {
        _mm_prefetch(value + ahead * value_bytes + column, _MM_HINT_T0);
      }
      x[v] = InRegister(Element::Load(value + j * value_bytes + column));
    }
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = Set(coef[r * coef_stride + j]);
      GEMLOUPE_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[r][v] = Fma(factor, x[v], sum[r][v]);
    }
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GEMLOUPE_UNROLL
    for (int v = 0; v < kVecs; ++v) Store(dst + r * dst_stride + v * kWidth, sum[r][v]);
  }
}

template <class Element, int kRows>
GEMLOUPE_INLINE void BlockTail(float* dst, int64_t dst_stride, const float* coef,
                               int64_t coef_stride, const char* value, int64_t value_bytes,
                               int64_t count, Tail tail) {
  Vec sum[kRows];
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) sum[r] = LoadTail(dst + r * dst_stride, tail);
  for (int64_t j = 0; j < count; ++j) {
    const Vec x = Element::LoadTail(value + j * value_bytes, tail);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = Fma(Set(coef[r * coef_stride + j]), x, sum[r]);
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) StoreTail(dst + r * dst_stride, sum[r], tail);
}

template <class Element, int kRows>
void Columns(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
             const char* value, int64_t value_bytes, int64_t count, int64_t cols) {
  constexpr int kCols = kVecs<kRows> * kWidth;
  for (int64_t j = 0; j < count; j += kBlockValues) {
    const int64_t values = count - j < kBlockValues ? count - j : kBlockValues;
    const char* row = value + j * value_bytes;
    int64_t c = 0;
    for (; c + kCols <= cols; c += kCols) {
      Block<Element, kRows, kVecs<kRows>>(dst + c, dst_stride, coef + j, coef_stride,
                                          row + c * Element::kBytes, value_bytes, values);
    }
    for (; c + kWidth <= cols; c += kWidth) {
      Block<Element, kRows, 1>(dst + c, dst_stride, coef + j, coef_stride,
                               row + c * Element::kBytes, value_bytes, values);
    }
    if (c < cols) {
      BlockTail<Element, kRows>(dst + c, dst_stride, coef + j, coef_stride,
                                row + c * Element::kBytes, value_bytes, values,
                                FirstElements(cols - c));
    }
  }
}

template <class Element>
GEMLOUPE_INLINE void Accumulate(float* dst, int64_t dst_stride, const float* coef,
                                int64_t coef_stride, const void* value, int64_t value_stride,
                                int rows, int64_t count, int64_t cols) {
  using Function =
      void (*)(float*, int64_t, const float*, int64_t, const char*, int64_t, int64_t, int64_t);
  static constexpr Function kByRows[] = {
      Columns<Element, 1>, Columns<Element, 2>, Columns<Element, 3>, Columns<Element, 4>,
      Columns<Element, 5>, Columns<Element, 6>, Columns<Element, 7>, Columns<Element, 8>};
  kByRows[rows - 1](dst, dst_stride, coef, coef_stride, static_cast<const char*>(value),
                    value_stride * Element::kBytes, count, cols);
}

}  // namespace

void AccumulateF32(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                   const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols) {
  Accumulate<Float32>(dst, dst_stride, coef, coef_stride, value, value_stride, rows, count, cols);
}

void AccumulateBf16(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                    const void* value, int64_t value_stride, int rows, int64_t count,
                    int64_t cols) {
  Accumulate<Bfloat16>(dst, dst_stride, coef, coef_stride, value, value_stride, rows, count, cols);
}

void AccumulateF16(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                   const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols) {
  Accumulate<Float16>(dst, dst_stride, coef, coef_stride, value, value_stride, rows, count, cols);
}

void AccumulateI8(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                  const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols) {
  Accumulate<Int8>(dst, dst_stride, coef, coef_stride, value, value_stride, rows, count, cols);
}

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
