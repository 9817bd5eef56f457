#include <cstddef>
#include <cstdint>

#include "kernels/simd_kernels.h"
#include "kernels/simd_vec.h"

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

constexpr int kLineBytes = 64;
// Values that all columns pass over before the next ones: they stay in the first-level cache, since two
// blocks of columns can share a line.
constexpr int64_t kBlockValues = 32;

// Vectors of columns whose sums are kept in registers. By rows, for 32 and for 16 registers:
constexpr int kVecs32[] = {16, 8, 8, 4, 4, 4, 3, 3};
constexpr int kVecs16[] = {8, 4, 4, 2, 1, 1, 1, 1};
template <int kRows>
constexpr int kSumVecs = (kRegisters == 32 ? kVecs32 : kVecs16)[kRows - 1];

// dst[r, c] += Σ_j coef[r, j] · value[j, c] for kRows × kVecs vectors of dst.
template <class Element, int kRows, int kVecs>
GEMLOUPE_INLINE void SumBlock(float* dst, int64_t dst_stride, const float* coef,
                              int64_t coef_stride, const char* value, int64_t value_bytes,
                              int64_t count, FetchStream& fetch) {
  constexpr int kStep = kWidth * Element::kBytes;
  Vec sum[kRows][kVecs];
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GEMLOUPE_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Load(dst + r * dst_stride + v * kWidth);
  }
  for (int64_t j = 0; j < count; ++j) {
    const char* row = value + j * value_bytes;
    fetch.Step<(kVecs * kStep + kLineBytes - 1) / kLineBytes>();
    Vec x[kVecs];
    GEMLOUPE_UNROLL
    for (int v = 0; v < kVecs; ++v) x[v] = InRegister(Element::Load(row + v * kStep));
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
GEMLOUPE_INLINE void SumTail(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                             const char* value, int64_t value_bytes, int64_t count, Tail tail) {
  for (int r = 0; r < kRows; ++r) {
    Vec sum = LoadTail(dst + r * dst_stride, tail);
    for (int64_t j = 0; j < count; ++j) {
      const Vec x = Element::LoadTail(value + j * value_bytes, tail);
      sum = Fma(Set(coef[r * coef_stride + j]), x, sum);
    }
    StoreTail(dst + r * dst_stride, sum, tail);
  }
}

template <class Element, int kRows>
void Rows(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride, const char* value,
          int64_t value_bytes, int64_t count, int64_t cols, Fetch fetch) {
  constexpr int kCols = kSumVecs<kRows> * kWidth;
  FetchStream stream(fetch);
  for (int64_t j = 0; j < count; j += kBlockValues) {
    const int64_t values = count - j < kBlockValues ? count - j : kBlockValues;
    const char* row = value + j * value_bytes;
    int64_t c = 0;
    for (; c + kCols <= cols; c += kCols) {
      SumBlock<Element, kRows, kSumVecs<kRows>>(dst + c, dst_stride, coef + j, coef_stride,
                                                row + c * Element::kBytes, value_bytes, values,
                                                stream);
    }
    for (; c + kWidth <= cols; c += kWidth) {
      SumBlock<Element, kRows, 1>(dst + c, dst_stride, coef + j, coef_stride,
                                  row + c * Element::kBytes, value_bytes, values, stream);
    }
    if (c < cols) {
      SumTail<Element, kRows>(dst + c, dst_stride, coef + j, coef_stride, row + c * Element::kBytes,
                              value_bytes, values, FirstElements(cols - c));
    }
  }
}

using ByRows = void (*)(float*, int64_t, const float*, int64_t, const char*, int64_t, int64_t,
                        int64_t, Fetch);

template <class Element>
GEMLOUPE_INLINE void Accumulate(float* dst, int64_t dst_stride, const float* coef,
                                int64_t coef_stride, const void* value, int64_t value_stride,
                                int rows, int64_t count, int64_t cols, Fetch fetch) {
  static constexpr ByRows kByRows[] = {Rows<Element, 1>, Rows<Element, 2>, Rows<Element, 3>,
                                       Rows<Element, 4>, Rows<Element, 5>, Rows<Element, 6>,
                                       Rows<Element, 7>, Rows<Element, 8>};
  kByRows[rows - 1](dst, dst_stride, coef, coef_stride, static_cast<const char*>(value),
                    value_stride * Element::kBytes, count, cols, fetch);
}

}  // namespace

void AccumulateF32(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                   const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols,
                   Fetch fetch) {
  Accumulate<Float32>(dst, dst_stride, coef, coef_stride, value, value_stride, rows, count, cols,
                      fetch);
}

void AccumulateBf16(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                    const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols,
                    Fetch fetch) {
  Accumulate<Bfloat16>(dst, dst_stride, coef, coef_stride, value, value_stride, rows, count, cols,
                       fetch);
}

void AccumulateF16(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                   const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols,
                   Fetch fetch) {
  Accumulate<Float16>(dst, dst_stride, coef, coef_stride, value, value_stride, rows, count, cols,
                      fetch);
}

void AccumulateI8(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                  const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols,
                  Fetch fetch) {
  Accumulate<Int8>(dst, dst_stride, coef, coef_stride, value, value_stride, rows, count, cols,
                   fetch);
}

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
