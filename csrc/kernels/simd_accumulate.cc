#include <cstddef>
#include <cstdint>

#include "kernels/simd_kernels.h"
#include "kernels/simd_vec.h"

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

// Two orders of the loops, with the same operations for each sum. Narrow elements are read as a stream
// from memory, a few values over all columns; float32 ones, which are mostly copies in the cache, in
// blocks of columns whose sums stay in the registers.

// Values that go over all columns together, each element widened once for all rows: their lines are
// read in order, and dst, which is loaded and stored once for them all, stays in the first-level
// cache. Two vectors of each are 64 bytes of a 16-bit row.
constexpr int kValues = kRegisters == 32 ? 8 : 4;
constexpr int kVecs = 2;
constexpr int kLineBytes = 64;

// dst[r, c] += Σ_j coef[r, j] · value[j, c] for kRows rows, kValues values, kVecs vectors of columns.
template <class Element, int kRows, int kValues, int kVecs>
GEMLOUPE_INLINE void Block(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                           const char* value, int64_t value_bytes) {
  Vec x[kValues][kVecs];
  GEMLOUPE_UNROLL
  for (int j = 0; j < kValues; ++j) {
    GEMLOUPE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      x[j][v] = InRegister(Element::Load(value + j * value_bytes + v * kWidth * Element::kBytes));
    }
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float* row = dst + r * dst_stride;
    Vec sum[kVecs];
    GEMLOUPE_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[v] = Load(row + v * kWidth);
    GEMLOUPE_UNROLL
    for (int j = 0; j < kValues; ++j) {
      const Vec factor = Set(coef[r * coef_stride + j]);
      GEMLOUPE_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[v] = Fma(factor, x[j][v], sum[v]);
    }
    GEMLOUPE_UNROLL
    for (int v = 0; v < kVecs; ++v) Store(row + v * kWidth, sum[v]);
  }
}

template <class Element, int kRows, int kValues>
GEMLOUPE_INLINE void BlockTail(float* dst, int64_t dst_stride, const float* coef,
                               int64_t coef_stride, const char* value, int64_t value_bytes,
                               Tail tail) {
  for (int r = 0; r < kRows; ++r) {
    Vec sum = LoadTail(dst + r * dst_stride, tail);
    for (int j = 0; j < kValues; ++j) {
      const Vec x = Element::LoadTail(value + j * value_bytes, tail);
      sum = Fma(Set(coef[r * coef_stride + j]), x, sum);
    }
    StoreTail(dst + r * dst_stride, sum, tail);
  }
}

// kValues values over all columns. fetch: the values that come next, to be fetched, or null.
template <class Element, int kRows, int kValues>
GEMLOUPE_INLINE void Columns(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                             const char* value, int64_t value_bytes, int64_t cols,
                             const char* fetch) {
  constexpr int kStepBytes = kValues * kVecs * kWidth * Element::kBytes;
  int64_t c = 0;
  for (; c + kVecs * kWidth <= cols; c += kVecs * kWidth) {
    if (fetch != nullptr) {
      // As many lines as this step reads, but in the order of their addresses: the processor's own
      // prefetcher follows one stream, not kValues of them in a page.
      GEMLOUPE_UNROLL
      for (int at = 0; at < kStepBytes; at += kLineBytes) {
        _mm_prefetch(fetch + at, _MM_HINT_T0);
      }
      fetch += kStepBytes;
    }
    Block<Element, kRows, kValues, kVecs>(dst + c, dst_stride, coef, coef_stride,
                                          value + c * Element::kBytes, value_bytes);
  }
  for (; c + kWidth <= cols; c += kWidth) {
    Block<Element, kRows, kValues, 1>(dst + c, dst_stride, coef, coef_stride,
                                      value + c * Element::kBytes, value_bytes);
  }
  if (c < cols) {
    BlockTail<Element, kRows, kValues>(dst + c, dst_stride, coef, coef_stride,
                                       value + c * Element::kBytes, value_bytes,
                                       FirstElements(cols - c));
  }
}

template <class Element, int kRows>
void Rows(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride, const char* value,
          int64_t value_bytes, int64_t count, int64_t cols) {
  int64_t j = 0;
  for (; j + kValues <= count; j += kValues) {
    const char* these = value + j * value_bytes;
    const char* next = j + 2 * kValues <= count ? these + kValues * value_bytes : nullptr;
    Columns<Element, kRows, kValues>(dst, dst_stride, coef + j, coef_stride, these, value_bytes,
                                     cols, next);
  }
  for (; j < count; ++j) {
    Columns<Element, kRows, 1>(dst, dst_stride, coef + j, coef_stride, value + j * value_bytes,
                               value_bytes, cols, nullptr);
  }
}

// Values j … j + 31 stay in the cache while all columns pass over them and the next are fetched.
constexpr int64_t kBlockValues = 32;
// The fetched values are walked as four streams: one alone does not saturate the memory.
constexpr int64_t kStreams = 4;

// Vectors of columns whose sums are kept in registers. By rows, for 32 and for 16 registers:
constexpr int kVecs32[] = {16, 8, 8, 4, 4, 4, 2, 2};
constexpr int kVecs16[] = {8, 4, 4, 2, 1, 1, 1, 1};
template <int kRows>
constexpr int kSumVecs = (kRegisters == 32 ? kVecs32 : kVecs16)[kRows - 1];

// dst[r, c] += Σ_j coef[r, j] · value[j, c] for kRows × kVecs vectors of dst.
template <int kRows, int kVecs>
GEMLOUPE_INLINE void SumBlock(float* dst, int64_t dst_stride, const float* coef,
                              int64_t coef_stride, const char* value, int64_t value_bytes,
                              int64_t count) {
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
      const int column = v * kWidth * Float32::kBytes;
      if (column % kLineBytes == 0) {
        _mm_prefetch(value + ahead * value_bytes + column, _MM_HINT_T0);
      }
      x[v] = InRegister(Float32::Load(value + j * value_bytes + column));
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

template <int kRows>
void SumRows(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
             const char* value, int64_t value_bytes, int64_t count, int64_t cols) {
  constexpr int kCols = kSumVecs<kRows> * kWidth;
  for (int64_t j = 0; j < count; j += kBlockValues) {
    const int64_t values = count - j < kBlockValues ? count - j : kBlockValues;
    const char* row = value + j * value_bytes;
    int64_t c = 0;
    for (; c + kCols <= cols; c += kCols) {
      SumBlock<kRows, kSumVecs<kRows>>(dst + c, dst_stride, coef + j, coef_stride,
                                       row + c * Float32::kBytes, value_bytes, values);
    }
    for (; c + kWidth <= cols; c += kWidth) {
      SumBlock<kRows, 1>(dst + c, dst_stride, coef + j, coef_stride, row + c * Float32::kBytes,
                         value_bytes, values);
    }
    for (int64_t i = 0; c < cols && i < values; ++i) {
      BlockTail<Float32, kRows, 1>(dst + c, dst_stride, coef + j + i, coef_stride,
                                   row + i * value_bytes + c * Float32::kBytes, value_bytes,
                                   FirstElements(cols - c));
    }
  }
}

using ByRows = void (*)(float*, int64_t, const float*, int64_t, const char*, int64_t, int64_t,
                        int64_t);

template <class Element>
GEMLOUPE_INLINE void Accumulate(float* dst, int64_t dst_stride, const float* coef,
                                int64_t coef_stride, const void* value, int64_t value_stride,
                                int rows, int64_t count, int64_t cols) {
  static constexpr ByRows kByRows[] = {Rows<Element, 1>, Rows<Element, 2>, Rows<Element, 3>,
                                       Rows<Element, 4>, Rows<Element, 5>, Rows<Element, 6>,
                                       Rows<Element, 7>, Rows<Element, 8>};
  kByRows[rows - 1](dst, dst_stride, coef, coef_stride, static_cast<const char*>(value),
                    value_stride * Element::kBytes, count, cols);
}

}  // namespace

void AccumulateF32(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                   const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols) {
  static constexpr ByRows kByRows[] = {SumRows<1>, SumRows<2>, SumRows<3>, SumRows<4>,
                                       SumRows<5>, SumRows<6>, SumRows<7>, SumRows<8>};
  kByRows[rows - 1](dst, dst_stride, coef, coef_stride, static_cast<const char*>(value),
                    value_stride * Float32::kBytes, count, cols);
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
