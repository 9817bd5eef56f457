#include <cstddef>
#include <cstdint>

#include "kernels/simd_kernels.h"
#include "kernels/simd_vec.h"

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

constexpr int kLineBytes = 64;
// How far ahead of its use a weight is fetched, in each of the rows that are read side by side.
constexpr int64_t kAheadBytes = 1024;

// Weight rows read side by side, and src rows whose sums are kept in registers beside them.
template <int kRows>
constexpr int kOutputs = kRegisters == 32 ? (kRows <= 3 ? 8 : kRows <= 6 ? 4 : 3)
                                          : (kRows == 1 ? 8 : kRows <= 3 ? 4 : 2);
constexpr int kMaxBlockRows = kRegisters == 32 ? 8 : 4;

template <int kRows, int kOutputs>
struct Sums {
  Vec sum[kOutputs][kRows];
};

// One step of k. Each output has one accumulator, whatever the block: see kernel_table.h.
template <class Element, int kRows, int kOutputs>
GEMLOUPE_INLINE void Step(Sums<kRows, kOutputs>& sums, const float* src, int64_t src_stride,
                          const char* weight, int64_t weight_bytes) {
  Vec w[kOutputs];
  GEMLOUPE_UNROLL
  for (int o = 0; o < kOutputs; ++o) w[o] = Element::Load(weight + o * weight_bytes);
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const Vec s = Load(src + r * src_stride);
    GEMLOUPE_UNROLL
    for (int o = 0; o < kOutputs; ++o) sums.sum[o][r] = Fma(s, w[o], sums.sum[o][r]);
  }
}

template <class Element, int kRows, int kOutputs>
GEMLOUPE_INLINE void StepTail(Sums<kRows, kOutputs>& sums, const float* src, int64_t src_stride,
                              const char* weight, int64_t weight_bytes, Tail tail) {
  GEMLOUPE_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    const Vec w = Element::LoadTail(weight + o * weight_bytes, tail);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sums.sum[o][r] = Fma(LoadTail(src + r * src_stride, tail), w, sums.sum[o][r]);
    }
  }
}

// Cache lines [i, end) of every weight row; fetches the line `ahead` bytes after each.
template <class Element, int kRows, int kOutputs>
GEMLOUPE_INLINE int64_t StepLines(Sums<kRows, kOutputs>& sums, const float* src,
                                  int64_t src_stride, const char* weight, int64_t weight_bytes,
                                  int64_t i, int64_t end, int64_t ahead) {
  constexpr int kLine = kLineBytes / Element::kBytes;
  for (; i + kLine <= end; i += kLine) {
    const char* w = weight + i * Element::kBytes;
    GEMLOUPE_UNROLL
    for (int o = 0; o < kOutputs; ++o) _mm_prefetch(w + o * weight_bytes + ahead, _MM_HINT_T0);
    GEMLOUPE_UNROLL
    for (int part = 0; part < kLine; part += kWidth) {
      Step<Element>(sums, src + i + part, src_stride, w + part * Element::kBytes, weight_bytes);
    }
  }
  return i;
}

// dst[r, o] for kRows × kOutputs outputs.
template <class Element, int kRows, int kOutputs>
GEMLOUPE_INLINE void Block(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                           const char* weight, int64_t weight_bytes, int64_t k) {
  Sums<kRows, kOutputs> sums;
  GEMLOUPE_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) sums.sum[o][r] = Set(0.0f);
  }
  // Near the end of the rows the lines ahead are those of the next block.
  constexpr int64_t kAhead = kAheadBytes / Element::kBytes;
  const int64_t next_block = kOutputs * weight_bytes - (k - kAhead) * Element::kBytes;
  int64_t i = StepLines<Element>(sums, src, src_stride, weight, weight_bytes, 0, k - kAhead,
                                 kAheadBytes);
  i = StepLines<Element>(sums, src, src_stride, weight, weight_bytes, i, k, next_block);
  for (; i + kWidth <= k; i += kWidth) {
    Step<Element>(sums, src + i, src_stride, weight + i * Element::kBytes, weight_bytes);
  }
  if (i < k) {
    StepTail<Element>(sums, src + i, src_stride, weight + i * Element::kBytes, weight_bytes,
                      FirstElements(k - i));
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GEMLOUPE_UNROLL
    for (int o = 0; o < kOutputs; ++o) dst[r * dst_stride + o] = Sum(sums.sum[o][r]);
  }
}

// As Block; more rows than registers can hold are done in two passes over the cached weights.
template <class Element, int kRows, int kOutputs>
GEMLOUPE_INLINE void Rows(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                          const char* weight, int64_t weight_bytes, int64_t k) {
  if constexpr (kRows <= kMaxBlockRows) {
    Block<Element, kRows, kOutputs>(dst, dst_stride, src, src_stride, weight, weight_bytes, k);
  } else {
    constexpr int kFirst = kMaxBlockRows;
    Block<Element, kFirst, kOutputs>(dst, dst_stride, src, src_stride, weight, weight_bytes, k);
    Block<Element, kRows - kFirst, kOutputs>(dst + kFirst * dst_stride, dst_stride,
                                             src + kFirst * src_stride, src_stride, weight,
                                             weight_bytes, k);
  }
}

template <class Element, int kRows>
void Outputs(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
             const char* weight, int64_t weight_bytes, int64_t n, int64_t k) {
  constexpr int kSideBySide = kOutputs<kRows>;
  int64_t i = 0;
  for (; i + kSideBySide <= n; i += kSideBySide) {
    Rows<Element, kRows, kSideBySide>(dst + i, dst_stride, src, src_stride,
                                      weight + i * weight_bytes, weight_bytes, k);
  }
  for (; i < n; ++i) {
    Rows<Element, kRows, 1>(dst + i, dst_stride, src, src_stride, weight + i * weight_bytes,
                            weight_bytes, k);
  }
}

template <class Element>
GEMLOUPE_INLINE void Matmul(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                            const void* weight, int64_t weight_stride, int rows, int64_t n,
                            int64_t k) {
  using Function = void (*)(float*, int64_t, const float*, int64_t, const char*, int64_t, int64_t,
                            int64_t);
  static constexpr Function kByRows[] = {
      Outputs<Element, 1>, Outputs<Element, 2>, Outputs<Element, 3>, Outputs<Element, 4>,
      Outputs<Element, 5>, Outputs<Element, 6>, Outputs<Element, 7>, Outputs<Element, 8>};
  kByRows[rows - 1](dst, dst_stride, src, src_stride, static_cast<const char*>(weight),
                    weight_stride * Element::kBytes, n, k);
}

}  // namespace

void MatmulF32(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
               const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k) {
  Matmul<Float32>(dst, dst_stride, src, src_stride, weight, weight_stride, rows, n, k);
}

void MatmulBf16(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k) {
  Matmul<Bfloat16>(dst, dst_stride, src, src_stride, weight, weight_stride, rows, n, k);
}

void MatmulF16(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
               const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k) {
  Matmul<Float16>(dst, dst_stride, src, src_stride, weight, weight_stride, rows, n, k);
}

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
