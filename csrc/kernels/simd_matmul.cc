#include <cstddef>
#include <cstdint>

#include "kernels/simd_kernels.h"
#include "kernels/simd_vec.h"

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

constexpr int kLineBytes = 64;
// How far ahead of its use a weight is fetched, in each stream.
constexpr int64_t kAheadBytes = 1024;

// The weight rows are read as kStreams streams, far apart: stream o begins at row o · n / kStreams.
// One stream alone does not saturate the memory. By rows of src, for 32 and for 16 registers:
constexpr int kStreams32[] = {8, 8, 4, 4, 4, 4, 3, 3};
constexpr int kStreams16[] = {8, 4, 4, 2, 2, 2, 2, 2};
template <int kRows>
constexpr int kStreams = (kRegisters == 32 ? kStreams32 : kStreams16)[kRows - 1];
// Rows of src whose sums fit in the registers beside those of the other streams.
constexpr int kMaxBlockRows = kRegisters == 32 ? 8 : 4;

// What one block of outputs reads and writes: dst[r · dst_stride + o · dst_stream] is the product of
// src + r · src_stride and of the weights at weight + o · stream_bytes.
struct Operands {
  float* dst;
  int64_t dst_stride;
  int64_t dst_stream;
  const float* src;
  int64_t src_stride;
  const char* weight;
  int64_t stream_bytes;
  int64_t ahead_bytes;
  int64_t k;
};

template <int kRows, int kOutputs>
struct Sums {
  Vec sum[kOutputs][kRows];
};

// One vector of k. Each output has one accumulator, whatever the block: see kernel_table.h.
template <class Element, int kRows, int kOutputs>
GEMLOUPE_INLINE void Step(Sums<kRows, kOutputs>& sums, const Operands& x, int64_t i) {
  Vec w[kOutputs];
  GEMLOUPE_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    w[o] = Element::Load(x.weight + o * x.stream_bytes + i * Element::kBytes);
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const Vec s = InRegister(Load(x.src + r * x.src_stride + i));
    GEMLOUPE_UNROLL
    for (int o = 0; o < kOutputs; ++o) sums.sum[o][r] = Fma(s, w[o], sums.sum[o][r]);
  }
}

template <class Element, int kRows, int kOutputs>
GEMLOUPE_INLINE void StepTail(Sums<kRows, kOutputs>& sums, const Operands& x, int64_t i) {
  const Tail tail = FirstElements(x.k - i);
  GEMLOUPE_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    const Vec w = Element::LoadTail(x.weight + o * x.stream_bytes + i * Element::kBytes, tail);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sums.sum[o][r] = Fma(LoadTail(x.src + r * x.src_stride + i, tail), w, sums.sum[o][r]);
    }
  }
}

template <int kRows, int kOutputs>
GEMLOUPE_INLINE void StoreSums(const Sums<kRows, kOutputs>& sums, const Operands& x) {
  constexpr int kCount = kRows * kOutputs;
  const auto sum = [&](int i) { return sums.sum[i / kRows][i % kRows]; };
  const auto dst = [&](int i) -> float& {
    return x.dst[i % kRows * x.dst_stride + i / kRows * x.dst_stream];
  };
  GEMLOUPE_UNROLL
  for (int i = 0; i + 4 <= kCount; i += 4) {
    const FourSums four = SumFour(sum(i), sum(i + 1), sum(i + 2), sum(i + 3));
    dst(i) = four.a;
    dst(i + 1) = four.b;
    dst(i + 2) = four.c;
    dst(i + 3) = four.d;
  }
  GEMLOUPE_UNROLL
  for (int i = kCount / 4 * 4; i < kCount; ++i) dst(i) = Sum(sum(i));
}

template <class Element, int kRows, int kOutputs>
GEMLOUPE_INLINE void Block(const Operands& x, FetchStream& fetch) {
  Sums<kRows, kOutputs> sums;
  GEMLOUPE_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) sums.sum[o][r] = Set(0.0f);
  }
  constexpr int kLine = kLineBytes / Element::kBytes;
  int64_t i = 0;
  for (; i + kLine <= x.k; i += kLine) {
    const char* ahead = x.weight + i * Element::kBytes + x.ahead_bytes;
    GEMLOUPE_UNROLL
    for (int o = 0; o < kOutputs; ++o) _mm_prefetch(ahead + o * x.stream_bytes, _MM_HINT_T0);
    fetch.Step<kOutputs>();
    GEMLOUPE_UNROLL
    for (int part = 0; part < kLine; part += kWidth) Step<Element>(sums, x, i + part);
  }
  for (; i + kWidth <= x.k; i += kWidth) Step<Element>(sums, x, i);
  if (i < x.k) StepTail<Element>(sums, x, i);
  StoreSums(sums, x);
}

// As Block; more rows than the registers hold are done in two passes over the cached weights.
template <class Element, int kRows, int kOutputs>
GEMLOUPE_INLINE void Rows(Operands x, FetchStream& fetch) {
  if constexpr (kRows <= kMaxBlockRows) {
    Block<Element, kRows, kOutputs>(x, fetch);
  } else {
    Block<Element, kMaxBlockRows, kOutputs>(x, fetch);
    x.dst += kMaxBlockRows * x.dst_stride;
    x.src += kMaxBlockRows * x.src_stride;
    Block<Element, kRows - kMaxBlockRows, kOutputs>(x, fetch);
  }
}

template <class Element, int kRows>
void Outputs(Operands x, int64_t row_bytes, int64_t n, Fetch next) {
  FetchStream fetch(next);
  x.dst_stream = n / kStreams<kRows>;
  x.stream_bytes = x.dst_stream * row_bytes;
  for (int64_t i = 0; i < x.dst_stream; ++i) {
    Rows<Element, kRows, kStreams<kRows>>(x, fetch);
    ++x.dst;
    x.weight += row_bytes;
  }
  // The outputs that the streams leave over.
  x.dst += (kStreams<kRows> - 1) * x.dst_stream;
  x.weight += (kStreams<kRows> - 1) * x.stream_bytes;
  for (int64_t i = kStreams<kRows> * x.dst_stream; i < n; ++i) {
    Rows<Element, kRows, 1>(x, fetch);
    ++x.dst;
    x.weight += row_bytes;
  }
}

template <class Element>
GEMLOUPE_INLINE void Matmul(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                            const void* weight, int64_t weight_stride, int rows, int64_t n,
                            int64_t k, Fetch fetch) {
  const int64_t row_bytes = weight_stride * Element::kBytes;
  Operands x = {.dst = dst,
                .dst_stride = dst_stride,
                .dst_stream = 0,
                .src = src,
                .src_stride = src_stride,
                .weight = static_cast<const char*>(weight),
                .stream_bytes = 0,
                // Between rows with gaps only the same place in the next row is surely wanted.
                .ahead_bytes = weight_stride == k ? kAheadBytes : row_bytes,
                .k = k};
  using Function = void (*)(Operands, int64_t, int64_t, Fetch);
  static constexpr Function kByRows[] = {
      Outputs<Element, 1>, Outputs<Element, 2>, Outputs<Element, 3>, Outputs<Element, 4>,
      Outputs<Element, 5>, Outputs<Element, 6>, Outputs<Element, 7>, Outputs<Element, 8>};
  kByRows[rows - 1](x, row_bytes, n, fetch);
}

}  // namespace

void MatmulF32(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
               const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k,
               Fetch fetch) {
  Matmul<Float32>(dst, dst_stride, src, src_stride, weight, weight_stride, rows, n, k, fetch);
}

void MatmulBf16(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k,
                Fetch fetch) {
  Matmul<Bfloat16>(dst, dst_stride, src, src_stride, weight, weight_stride, rows, n, k, fetch);
}

void MatmulF16(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
               const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k,
               Fetch fetch) {
  Matmul<Float16>(dst, dst_stride, src, src_stride, weight, weight_stride, rows, n, k, fetch);
}

void MatmulI8(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
              const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k,
              Fetch fetch) {
  Matmul<Int8>(dst, dst_stride, src, src_stride, weight, weight_stride, rows, n, k, fetch);
}

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA
