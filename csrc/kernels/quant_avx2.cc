// The quantised kernels for AVX2: half a panel, 8 rows in 8 lanes, and one group of 32 elements at a
// time. VPMADDUBSW adds two products in 16 bits; as many of its results are added there as surely fit.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/packed_layout.h"
#include "kernels/quant_table.h"

#define GEMLOUPE_INLINE inline __attribute__((always_inline))
#define GEMLOUPE_UNROLL _Pragma("GCC unroll 32")

namespace gemloupe::avx2 {
namespace {

constexpr size_t kAheadBytes = 8192;
constexpr int kHalfRows = 8;

GEMLOUPE_INLINE __m256i Line(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
GEMLOUPE_INLINE __m256 Halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
GEMLOUPE_INLINE __m256 Bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
GEMLOUPE_INLINE __m256i SignedBytes(const uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
GEMLOUPE_INLINE __m256i Four(const int32_t* p) { return _mm256_set1_epi32(*p); }
GEMLOUPE_INLINE __m256i AddPairs(__m256i sum, __m256i pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// The quad of elements 4 j … 4 j + 3 of group `second` of 64 elements, for the 8 rows of one half;
// `lines` points to that half's bytes.
template <int kBits>
GEMLOUPE_INLINE __m256i QuadAt(const uint8_t* lines, bool second, int j) {
  if constexpr (kBits == 8) return Line(lines + 64 * (second ? 8 + j : j));
  const __m256i low_mask = _mm256_set1_epi8(15);
  __m256i low = Line(lines + 64 * j);
  if (second) low = _mm256_srli_epi16(low, 4);
  low = _mm256_and_si256(low, low_mask);
  if constexpr (kBits == 5) {
    __m256i high = Line(lines + 512 + 64 * (j / 4));
    const int bit = j % 4;
    high = second ? _mm256_srli_epi16(high, bit) : _mm256_slli_epi16(high, 4 - bit);
    low = _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(16)));
  }
  if constexpr (kBits == 6) {
    __m256i high = Line(lines + 512 + 64 * (j / 2));
    if (second) {
      if (j % 2 == 1) high = _mm256_srli_epi16(high, 2);
    } else {
      high = _mm256_slli_epi16(high, j % 2 == 0 ? 4 : 2);
    }
    low = _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
  }
  return low;
}

template <int kBits_, int kZero_, size_t kBytes>
struct SimpleFormat {
  static constexpr int kBits = kBits_;
  static constexpr int kZero = kZero_;
  static constexpr bool kHasMin = false;
  static constexpr bool kHasHalfScales = false;
  static constexpr int kParts = 1;
  static constexpr size_t kTileBytes = kBytes;
  static GEMLOUPE_INLINE const uint8_t* Lines(const uint8_t* tile, int) {
    return tile + kTileScaleBytes;
  }
  static GEMLOUPE_INLINE __m256 Scale(const uint8_t* tile, int group, int first_row) {
    return Halves(tile + 32 * group + 2 * first_row);
  }
  static GEMLOUPE_INLINE __m256 Min(const uint8_t*, int, int) { return _mm256_setzero_ps(); }
};
using Int4 = SimpleFormat<4, kInt4Zero, kInt4TileBytes>;
using Int6 = SimpleFormat<6, kInt6Zero, kInt6TileBytes>;
using Int8 = SimpleFormat<8, kInt8Zero, kInt8TileBytes>;

template <int kBits_, size_t kBytes>
struct MinFormat {
  static constexpr int kBits = kBits_;
  static constexpr int kZero = 0;
  static constexpr bool kHasMin = true;
  static constexpr bool kHasHalfScales = false;
  static constexpr int kParts = 4;
  static constexpr size_t kTileBytes = kBytes;
  static GEMLOUPE_INLINE const uint8_t* Lines(const uint8_t* tile, int part) {
    return tile + 320 + part * (kBits == 4 ? 512 : 640);
  }
  static GEMLOUPE_INLINE __m256 Scale(const uint8_t* tile, int group, int first_row) {
    return _mm256_mul_ps(Halves(tile + 2 * first_row), Bytes(tile + 64 + 16 * group + first_row));
  }
  static GEMLOUPE_INLINE __m256 Min(const uint8_t* tile, int group, int first_row) {
    return _mm256_mul_ps(Halves(tile + 32 + 2 * first_row),
                         Bytes(tile + 192 + 16 * group + first_row));
  }
};
using Int4K = MinFormat<4, kInt4KTileBytes>;
using Int5K = MinFormat<5, kInt5KTileBytes>;

struct Int6K {
  static constexpr int kBits = 6;
  static constexpr int kZero = kInt6Zero;
  static constexpr bool kHasMin = false;
  static constexpr bool kHasHalfScales = true;
  static constexpr int kParts = 4;
  static constexpr size_t kTileBytes = kInt6KTileBytes;
  static GEMLOUPE_INLINE const uint8_t* Lines(const uint8_t* tile, int part) {
    return tile + 320 + part * 768;
  }
  static GEMLOUPE_INLINE __m256 Scale(const uint8_t* tile, int, int first_row) {
    return Halves(tile + 2 * first_row);
  }
  static GEMLOUPE_INLINE __m256 Min(const uint8_t*, int, int) { return _mm256_setzero_ps(); }
  static GEMLOUPE_INLINE __m256i HalfScale(const uint8_t* tile, int half, int first_row) {
    return SignedBytes(tile + 64 + 16 * half + first_row);
  }
};

template <class Format>
constexpr int kElementsOf = 64 * Format::kParts;

template <class Format>
GEMLOUPE_INLINE int64_t TilesOf(int64_t k) {
  return (k + kElementsOf<Format> - 1) / kElementsOf<Format>;
}

// Σ u q over quads [kBegin, kEnd) of a group, in 32 bits. 16-bit sums of `kChain` VPMADDUBSW stay below
// 2¹⁵: kChain · 2 · 127 · (2^bits − 1). Bytes are taken as two halves of 4 bits.
template <int kBits, int kBegin, int kEnd>
GEMLOUPE_INLINE __m256i SumQuads(const uint8_t* lines, bool second, const int32_t* q,
                                 int64_t width) {
  __m256i sum = _mm256_setzero_si256();
  if constexpr (kBits == 8) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i low = _mm256_setzero_si256();
    __m256i high = _mm256_setzero_si256();
    GEMLOUPE_UNROLL
    for (int j = kBegin; j < kEnd; ++j) {
      const __m256i u = QuadAt<8>(lines, second, j);
      const __m256i x = Four(q + j * width);
      low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_and_si256(u, mask), x));
      high = _mm256_add_epi16(
          high, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(u, 4), mask), x));
    }
    sum = AddPairs(sum, low);
    return _mm256_add_epi32(sum, _mm256_slli_epi32(AddPairs(_mm256_setzero_si256(), high), 4));
  } else {
    constexpr int kChain = kBits == 4 ? 8 : (kBits == 5 ? 4 : 2);
    GEMLOUPE_UNROLL
    for (int from = kBegin; from < kEnd; from += kChain) {
      __m256i pairs = _mm256_setzero_si256();
      GEMLOUPE_UNROLL
      for (int i = 0; i < kChain; ++i) {
        const int j = from + i;
        if (j >= kEnd) break;
        pairs = _mm256_add_epi16(
            pairs, _mm256_maddubs_epi16(QuadAt<kBits>(lines, second, j), Four(q + j * width)));
      }
      sum = AddPairs(sum, pairs);
    }
    return sum;
  }
}

template <class Format>
GEMLOUPE_INLINE __m256i GroupSum(const uint8_t* tile, int part, bool second, int first_row,
                                 const int32_t* q, int64_t width, int32_t start,
                                 int32_t half_start) {
  constexpr int kFactor = Format::kZero / 8;  // of the starts
  const uint8_t* lines = Format::Lines(tile, part) + 4 * first_row;
  if constexpr (Format::kHasHalfScales) {
    const int half = 4 * part + (second ? 2 : 0);
    const __m256i a = _mm256_add_epi32(SumQuads<Format::kBits, 0, 4>(lines, second, q, width),
                                       _mm256_set1_epi32(kFactor * half_start));
    const __m256i b = _mm256_add_epi32(SumQuads<Format::kBits, 4, 8>(lines, second, q, width),
                                       _mm256_set1_epi32(kFactor * (start - half_start)));
    return _mm256_add_epi32(_mm256_mullo_epi32(a, Format::HalfScale(tile, half, first_row)),
                            _mm256_mullo_epi32(b, Format::HalfScale(tile, half + 1, first_row)));
  }
  return _mm256_add_epi32(SumQuads<Format::kBits, 0, 8>(lines, second, q, width),
                          _mm256_set1_epi32(kFactor * start));
}

GEMLOUPE_INLINE void StoreLanes(float* dst, __m256 x, int64_t begin, int64_t end) {
  if (begin == 0 && end == kHalfRows) {
    _mm256_storeu_ps(dst, x);
    return;
  }
  float all[kHalfRows];
  _mm256_storeu_ps(all, x);
  for (int64_t i = begin; i < end; ++i) dst[i] = all[i];
}

// Rows [first, first + kRows) of one group.
template <class Format, int kRows>
void Panels(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t rows_at,
            const uint8_t* panels, int64_t begin, int64_t end, int64_t k) {
  const int64_t tiles = TilesOf<Format>(k);
  const int64_t width = src.width;
  const int64_t first = rows_at / width * (src.padded / kGroup) * width + rows_at % width;
  const int32_t* quads = src.q + rows_at / width * (src.padded / 4) * width + rows_at % width;
  for (int64_t at = begin / kHalfRows * kHalfRows; at < end; at += kHalfRows) {
    const auto first_row = static_cast<int>(at % kPanelRows);
    const uint8_t* panel =
        panels + static_cast<size_t>(at / kPanelRows * tiles) * Format::kTileBytes;
    __m256 acc[kRows];
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) acc[r] = _mm256_setzero_ps();
    for (int64_t group = 0; group < 2 * Format::kParts * tiles; ++group) {
      const uint8_t* tile =
          panel + static_cast<size_t>(group / (2 * Format::kParts)) * Format::kTileBytes;
      const auto in_tile = static_cast<int>(group % (2 * Format::kParts));
      if (first_row == 0) {
        constexpr size_t kBytes = Format::kTileBytes / static_cast<size_t>(2 * Format::kParts);
        const uint8_t* ahead = tile + kAheadBytes + static_cast<size_t>(in_tile) * kBytes;
        GEMLOUPE_UNROLL
        for (size_t line = 0; line < kBytes + 63; line += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
        }
      }
      const __m256 scale = Format::Scale(tile, in_tile, first_row);
      const __m256 min = Format::Min(tile, in_tile, first_row);
      GEMLOUPE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int64_t group_at = first + group * width + r;
        const int32_t* q = quads + group * (kGroup / 4) * width + r;
        const int32_t start = src.start[group_at];
        // The group's place in its 64 elements is known to the compiler on either side.
        const __m256i dot = in_tile % 2 == 0
                                ? GroupSum<Format>(tile, in_tile / 2, false, first_row, q, width,
                                                   start, src.half_start[group_at])
                                : GroupSum<Format>(tile, in_tile / 2, true, first_row, q, width,
                                                   start, src.half_start[group_at]);
        const float s = src.scale[group_at];
        acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale, _mm256_set1_ps(s)),
                                 acc[r]);
        if constexpr (Format::kHasMin) {
          acc[r] = _mm256_fnmadd_ps(min, _mm256_set1_ps(src.scaled_sum[group_at]), acc[r]);
        }
      }
    }
    const int64_t low = begin > at ? begin - at : 0;
    const int64_t high = end < at + kHalfRows ? end - at : kHalfRows;
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r)
      StoreLanes(dst + r * dst_stride + (at - begin), acc[r], low, high);
  }
}

template <class Format>
void Matmul(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t group, int rows,
            const uint8_t* panels, int64_t begin, int64_t end, int64_t k) {
  using Function = void (*)(float*, int64_t, const QuantizedRows&, int64_t, const uint8_t*, int64_t,
                            int64_t, int64_t);
  static constexpr Function kByRows[] = {Panels<Format, 1>, Panels<Format, 2>, Panels<Format, 3>,
                                         Panels<Format, 4>};
  // One panel at a time, so that the second half of eight rows finds it in the cache.
  for (int64_t at = begin; at < end;) {
    const int64_t panel_end = (at / kPanelRows + 1) * kPanelRows;
    const int64_t stop = end < panel_end ? end : panel_end;
    for (int row = 0; row < rows; row += 4) {
      const int now = rows - row < 4 ? rows - row : 4;
      kByRows[now - 1](dst + row * dst_stride + (at - begin), dst_stride, src,
                       group * src.width + row, panels, at, stop, k);
    }
    at = stop;
  }
}

template <class Format>
void Unpack(float* dst, const uint8_t* panel, int64_t begin, int64_t count) {
  for (int64_t at = begin; at < begin + count; at += kGroup) {
    const uint8_t* tile =
        panel + static_cast<size_t>(at / kElementsOf<Format>) * Format::kTileBytes;
    const auto group = static_cast<int>(at % kElementsOf<Format> / kGroup);
    for (int first_row = 0; first_row < kPanelRows; first_row += kHalfRows) {
      const uint8_t* lines = Format::Lines(tile, group / 2) + 4 * first_row;
      const __m256 group_scale = Format::Scale(tile, group, first_row);
      const __m256 min = Format::Min(tile, group, first_row);
      GEMLOUPE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const __m256i quad = group % 2 == 0 ? QuadAt<Format::kBits>(lines, false, j)
                                            : QuadAt<Format::kBits>(lines, true, j);
        __m256 scale = group_scale;
        if constexpr (Format::kHasHalfScales) {
          scale = _mm256_mul_ps(
              scale, _mm256_cvtepi32_ps(Format::HalfScale(tile, 2 * group + j / 4, first_row)));
        }
        GEMLOUPE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const __m256i u =
              _mm256_and_si256(_mm256_srli_epi32(quad, 8 * i), _mm256_set1_epi32(255));
          const __m256i centred = _mm256_sub_epi32(u, _mm256_set1_epi32(Format::kZero));
          const __m256 w = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(centred));
          _mm256_storeu_ps(dst + (at - begin + 4 * j + i) * kPanelRows + first_row,
                           Format::kHasMin ? _mm256_sub_ps(w, min) : w);
        }
      }
    }
  }
}

GEMLOUPE_INLINE float LargestLane(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

void QuantizeRow(const QuantizedRows& dst, int64_t row, const float* src, int64_t k) {
  const int64_t groups = dst.padded / kGroup;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256 infinity = _mm256_set1_ps(__builtin_inff());
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t at = group * kGroup;
    float x[kGroup] = {};
    const int64_t left = k - at;
    if (left > 0) {
      __builtin_memcpy(x, src + at, static_cast<size_t>(left < kGroup ? left : kGroup) * 4);
    }
    __m256 most_of = _mm256_setzero_ps();
    __m256 finite_of = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    for (int i = 0; i < kGroup; i += 8) {
      const __m256 size = _mm256_and_ps(_mm256_loadu_ps(x + i), magnitude);
      most_of = _mm256_max_ps(most_of, size);
      finite_of = _mm256_and_ps(finite_of, _mm256_cmp_ps(size, infinity, _CMP_LT_OQ));
    }
    const float most = LargestLane(most_of);
    const bool finite = _mm256_movemask_ps(finite_of) == 0xff;
    const bool zero = !finite || most < 1e-30f;
    const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : 127.0f / most);
    int32_t sums[2] = {0, 0};
    int32_t* q =
        dst.q + (row / dst.width * (dst.padded / 4) + at / 4) * dst.width + row % dst.width;
    for (int i = 0; i < kGroup; i += 8) {
      __m256i rounded = _mm256_setzero_si256();
      if (!zero) rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
      int32_t each[8];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(each), rounded);
      for (int quad = 0; quad < 2; ++quad) {
        int8_t four[4];
        for (int e = 0; e < 4; ++e) {
          four[e] = static_cast<int8_t>(each[4 * quad + e]);
          sums[i / 16] += each[4 * quad + e];
        }
        __builtin_memcpy(q + (i / 4 + quad) * dst.width, four, 4);
      }
    }
    const int64_t place = (row / dst.width * groups + group) * dst.width + row % dst.width;
    const float scale = !finite ? __builtin_nanf("") : (zero ? 0.0f : most / 127.0f);
    dst.scale[place] = scale;
    dst.start[place] = -8 * (sums[0] + sums[1]);
    dst.half_start[place] = -8 * sums[0];
    dst.scaled_sum[place] = scale * static_cast<float>(sums[0] + sums[1]);
  }
}

template <int kRows>
GEMLOUPE_INLINE void PanelTileF32(float* dst, int64_t dst_stride, const float* src,
                                  int64_t src_stride, const float* panel, int64_t k, int outputs,
                                  bool add) {
  __m256 low[kRows];
  __m256 high[kRows];
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float held[kPanelRows] = {};
    if (add) __builtin_memcpy(held, dst + r * dst_stride, static_cast<size_t>(outputs) * 4);
    low[r] = _mm256_loadu_ps(held);
    high[r] = _mm256_loadu_ps(held + 8);
  }
  for (int64_t i = 0; i < k; ++i) {
    const __m256 a = _mm256_loadu_ps(panel + i * kPanelRows);
    const __m256 b = _mm256_loadu_ps(panel + i * kPanelRows + 8);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m256 x = _mm256_set1_ps(src[r * src_stride + i]);
      low[r] = _mm256_fmadd_ps(x, a, low[r]);
      high[r] = _mm256_fmadd_ps(x, b, high[r]);
    }
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float held[kPanelRows];
    _mm256_storeu_ps(held, low[r]);
    _mm256_storeu_ps(held + 8, high[r]);
    __builtin_memcpy(dst + r * dst_stride, held, static_cast<size_t>(outputs) * 4);
  }
}

void PanelMatmulF32(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                    int64_t rows, const float* panel, int64_t k, int outputs, bool add) {
  using Function =
      void (*)(float*, int64_t, const float*, int64_t, const float*, int64_t, int, bool);
  static constexpr Function kByRows[] = {PanelTileF32<1>, PanelTileF32<2>, PanelTileF32<3>,
                                         PanelTileF32<4>, PanelTileF32<5>};
  for (int64_t row = 0; row < rows;) {
    const int64_t now = rows - row < 5 ? rows - row : 5;
    kByRows[now - 1](dst + row * dst_stride, dst_stride, src + row * src_stride, src_stride, panel,
                     k, outputs, add);
    row += now;
  }
}

}  // namespace

extern const QuantKernels kQuantTable;
constinit const QuantKernels kQuantTable = {
    .name = "avx2",
    .quantize_row = QuantizeRow,
    .matmul = {Matmul<Int4>, Matmul<Int6>, Matmul<Int8>, Matmul<Int4K>, Matmul<Int5K>,
               Matmul<Int6K>},
    .gemm = {},
    .gemm_rows = 0,
    .gemm_tiles = false,
    .unpack = {Unpack<Int4>, Unpack<Int6>, Unpack<Int8>, Unpack<Int4K>, Unpack<Int5K>,
               Unpack<Int6K>},
    .panel_matmul_f32 = PanelMatmulF32,
};

}  // namespace gemloupe::avx2
