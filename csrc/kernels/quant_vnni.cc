// The quantised kernels for AVX-512 with VNNI: the 16 rows of a panel stand in the 16 lanes, so nothing
// is ever summed across lanes, and one VPDPBUSD multiplies four elements of 16 rows by four
// activations, broadcast from memory.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/packed_layout.h"
#include "kernels/quant_table.h"

#define GEMLOUPE_INLINE inline __attribute__((always_inline))
#define GEMLOUPE_UNROLL _Pragma("GCC unroll 32")

namespace gemloupe::avx512_vnni {
namespace {

// How far ahead of its use a tile is fetched. One core follows one stream: from 4 KiB on this reaches
// the memory's rate, see gemloupe_kernels_bench.
constexpr size_t kAheadBytes = 8192;

GEMLOUPE_INLINE __m512i Line(const uint8_t* p) { return _mm512_loadu_si512(p); }
GEMLOUPE_INLINE __m512i LowHalfBytes(__m512i x) {
  return _mm512_and_si512(x, _mm512_set1_epi8(15));
}
GEMLOUPE_INLINE __m512i HighHalfBytes(__m512i x) { return LowHalfBytes(_mm512_srli_epi16(x, 4)); }
GEMLOUPE_INLINE __m512 Halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
GEMLOUPE_INLINE __m512 Bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
GEMLOUPE_INLINE __m512i SignedBytes(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// acc += four elements of every row times the four activations at p.
GEMLOUPE_INLINE __m512i Dot(__m512i acc, __m512i u, const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(four));
}

// A quad is elements 4 j … 4 j + 3 of all rows, one byte each.
struct Quads {
  __m512i first;   // of the first 32 elements of the 64
  __m512i second;  // of the other 32
};

template <int kBits>
GEMLOUPE_INLINE Quads QuadsAt(const uint8_t* lines, int j) {
  if constexpr (kBits == 8) return {Line(lines + 64 * j), Line(lines + 64 * (8 + j))};
  const __m512i low = Line(lines + 64 * j);
  Quads quads = {LowHalfBytes(low), HighHalfBytes(low)};
  if constexpr (kBits == 5) {
    const __m512i one = _mm512_set1_epi8(16);
    const __m512i high = Line(lines + 512 + 64 * (j / 4));
    const int bit = j % 4;
    const __m512i up = _mm512_slli_epi16(high, 4 - bit);  // bit `bit` → 4
    const __m512i down = _mm512_srli_epi16(high, bit);    // bit 4 + `bit` → 4
    quads.first = _mm512_or_si512(quads.first, _mm512_and_si512(up, one));
    quads.second = _mm512_or_si512(quads.second, _mm512_and_si512(down, one));
  }
  if constexpr (kBits == 6) {
    const __m512i two = _mm512_set1_epi8(0x30);
    const __m512i high = Line(lines + 512 + 64 * (j / 2));
    const __m512i up = _mm512_slli_epi16(high, j % 2 == 0 ? 4 : 2);
    const __m512i down = j % 2 == 0 ? high : _mm512_srli_epi16(high, 2);
    quads.first = _mm512_or_si512(quads.first, _mm512_and_si512(up, two));
    quads.second = _mm512_or_si512(quads.second, _mm512_and_si512(down, two));
  }
  return quads;
}

// The formats: where the lines of each 64 elements are, and the factors of each group of 32.
template <int kBits_, int kZero_, size_t kBytes>
struct SimpleFormat {
  static constexpr int kBits = kBits_;
  static constexpr int kZero = kZero_;
  static constexpr bool kHasMin = false;
  static constexpr bool kHasHalfScales = false;
  static constexpr int kParts = 1;  // of 64 elements
  static constexpr size_t kTileBytes = kBytes;
  static GEMLOUPE_INLINE const uint8_t* Lines(const uint8_t* tile, int) {
    return tile + kTileScaleBytes;
  }
  static GEMLOUPE_INLINE __m512 Scale(const uint8_t* tile, int group) {
    return Halves(tile + 32 * group);
  }
  static GEMLOUPE_INLINE __m512 Min(const uint8_t*, int) { return _mm512_setzero_ps(); }
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
  static GEMLOUPE_INLINE __m512 Scale(const uint8_t* tile, int group) {
    return _mm512_mul_ps(Halves(tile), Bytes(tile + 64 + 16 * group));
  }
  static GEMLOUPE_INLINE __m512 Min(const uint8_t* tile, int group) {
    return _mm512_mul_ps(Halves(tile + 32), Bytes(tile + 192 + 16 * group));
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
  static GEMLOUPE_INLINE __m512 Scale(const uint8_t* tile, int) { return Halves(tile); }
  static GEMLOUPE_INLINE __m512 Min(const uint8_t*, int) { return _mm512_setzero_ps(); }
  static GEMLOUPE_INLINE __m512i HalfScale(const uint8_t* tile, int half) {
    return SignedBytes(tile + 64 + 16 * half);
  }
};

template <class Format>
constexpr int kElementsOf = 64 * Format::kParts;

template <class Format>
GEMLOUPE_INLINE int64_t TilesOf(int64_t k) {
  return (k + kElementsOf<Format> - 1) / kElementsOf<Format>;
}

// The lanes of panel [first, first + 16) that lie in [begin, end).
GEMLOUPE_INLINE __mmask16 LanesIn(int64_t first, int64_t begin, int64_t end) {
  uint32_t lanes = 0xffff;
  if (begin > first) lanes &= 0xffffu << (begin - first);
  if (end < first + kPanelRows) lanes &= 0xffffu >> (first + kPanelRows - end);
  return static_cast<__mmask16>(lanes);
}

// The integer sums of two groups of 32 for kRows rows of activations.
template <class Format, int kRows>
struct IntegerSums {
  __m512i first[kRows];
  __m512i second[kRows];
};

template <class Format, int kRows>
GEMLOUPE_INLINE IntegerSums<Format, kRows> SumQuads(const uint8_t* lines, const int8_t* q,
                                                    int64_t padded, const int32_t* group_sum,
                                                    int64_t groups) {
  IntegerSums<Format, kRows> sums;
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    sums.first[r] = _mm512_set1_epi32(-Format::kZero * group_sum[r * groups]);
    sums.second[r] = _mm512_set1_epi32(-Format::kZero * group_sum[r * groups + 1]);
  }
  GEMLOUPE_UNROLL
  for (int j = 0; j < 8; ++j) {
    const Quads quads = QuadsAt<Format::kBits>(lines, j);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sums.first[r] = Dot(sums.first[r], quads.first, q + r * padded + 4 * j);
      sums.second[r] = Dot(sums.second[r], quads.second, q + r * padded + 32 + 4 * j);
    }
  }
  return sums;
}

// The same for a format with a scale for each 16 elements: the scales enter as integers.
template <class Format, int kRows>
GEMLOUPE_INLINE IntegerSums<Format, kRows> SumScaledQuads(const uint8_t* tile, int part,
                                                          const int8_t* q, int64_t padded,
                                                          const int32_t* group_sum,
                                                          const int32_t* half_sum, int64_t groups) {
  const uint8_t* lines = Format::Lines(tile, part);
  IntegerSums<Format, kRows> sums;
  GEMLOUPE_UNROLL
  for (int half = 0; half < 2; ++half) {
    IntegerSums<Format, kRows> part_sums;
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int32_t* low = half_sum + r * groups;
      const int32_t* all = group_sum + r * groups;
      part_sums.first[r] =
          _mm512_set1_epi32(-Format::kZero * (half == 0 ? low[0] : all[0] - low[0]));
      part_sums.second[r] =
          _mm512_set1_epi32(-Format::kZero * (half == 0 ? low[1] : all[1] - low[1]));
    }
    GEMLOUPE_UNROLL
    for (int j = 4 * half; j < 4 * half + 4; ++j) {
      const Quads quads = QuadsAt<Format::kBits>(lines, j);
      GEMLOUPE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        part_sums.first[r] = Dot(part_sums.first[r], quads.first, q + r * padded + 4 * j);
        part_sums.second[r] = Dot(part_sums.second[r], quads.second, q + r * padded + 32 + 4 * j);
      }
    }
    const __m512i first_scale = Format::HalfScale(tile, 4 * part + half);
    const __m512i second_scale = Format::HalfScale(tile, 4 * part + 2 + half);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512i first = _mm512_mullo_epi32(part_sums.first[r], first_scale);
      const __m512i second = _mm512_mullo_epi32(part_sums.second[r], second_scale);
      sums.first[r] = half == 0 ? first : _mm512_add_epi32(sums.first[r], first);
      sums.second[r] = half == 0 ? second : _mm512_add_epi32(sums.second[r], second);
    }
  }
  return sums;
}

// One panel times kRows rows.
template <class Format, int kRows>
GEMLOUPE_INLINE void Panel(float* dst, int64_t dst_stride, const QuantizedRows& src,
                           int64_t first_row, const uint8_t* panel, int64_t tiles,
                           __mmask16 lanes) {
  const int64_t padded = src.padded;
  const int64_t groups = padded / kGroup;
  const int8_t* q = src.q + first_row * padded;
  const float* scale = src.scale + first_row * groups;
  const int32_t* sum = src.sum + first_row * groups;
  const int32_t* half_sum = src.half_sum + first_row * groups;
  __m512 acc[kRows];
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_ps();
  for (int64_t t = 0; t < tiles; ++t) {
    const uint8_t* tile = panel + static_cast<size_t>(t) * Format::kTileBytes;
    for (int part = 0; part < Format::kParts; ++part) {
      if constexpr (Format::kParts == 1) {
        GEMLOUPE_UNROLL
        for (size_t at = 0; at < Format::kTileBytes; at += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(tile + kAheadBytes + at), _MM_HINT_T0);
        }
      } else {
        constexpr size_t kPartBytes = Format::kTileBytes / 64 / 4 * 64 + 64;
        GEMLOUPE_UNROLL
        for (size_t at = 0; at < kPartBytes; at += 64) {
          _mm_prefetch(
              reinterpret_cast<const char*>(tile + kAheadBytes + part * (kPartBytes - 64) + at),
              _MM_HINT_T0);
        }
      }
      IntegerSums<Format, kRows> sums;
      if constexpr (Format::kHasHalfScales) {
        sums = SumScaledQuads<Format, kRows>(tile, part, q, padded, sum, half_sum, groups);
      } else {
        sums = SumQuads<Format, kRows>(Format::Lines(tile, part), q, padded, sum, groups);
      }
      const __m512 first_scale = Format::Scale(tile, 2 * part);
      const __m512 second_scale = Format::Scale(tile, 2 * part + 1);
      const __m512 first_min = Format::Min(tile, 2 * part);
      const __m512 second_min = Format::Min(tile, 2 * part + 1);
      GEMLOUPE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float* s = scale + r * groups;
        const int32_t* total = sum + r * groups;
        acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.first[r]),
                                 _mm512_mul_ps(first_scale, _mm512_set1_ps(s[0])), acc[r]);
        if constexpr (Format::kHasMin) {
          const float x = s[0] * static_cast<float>(total[0]);
          acc[r] = _mm512_fnmadd_ps(first_min, _mm512_set1_ps(x), acc[r]);
        }
        acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.second[r]),
                                 _mm512_mul_ps(second_scale, _mm512_set1_ps(s[1])), acc[r]);
        if constexpr (Format::kHasMin) {
          const float x = s[1] * static_cast<float>(total[1]);
          acc[r] = _mm512_fnmadd_ps(second_min, _mm512_set1_ps(x), acc[r]);
        }
      }
      q += 64;
      scale += 2;
      sum += 2;
      half_sum += 2;
    }
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) _mm512_mask_storeu_ps(dst + r * dst_stride, lanes, acc[r]);
}

template <class Format, int kRows>
void Panels(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t first_row,
            const uint8_t* panels, int64_t begin, int64_t end, int64_t k) {
  const int64_t tiles = TilesOf<Format>(k);
  for (int64_t at = begin / kPanelRows * kPanelRows; at < end; at += kPanelRows) {
    const uint8_t* panel =
        panels + static_cast<size_t>(at / kPanelRows * tiles) * Format::kTileBytes;
    float* first = dst + (at - begin);
    const __mmask16 lanes = LanesIn(at, begin, end);
    // More sums than registers: the second half of the rows finds the panel in the cache.
    constexpr int kMost = Format::kHasHalfScales ? 4 : 8;
    constexpr int kNow = kRows < kMost ? kRows : kMost;
    Panel<Format, kNow>(first, dst_stride, src, first_row, panel, tiles, lanes);
    if constexpr (kRows > kMost) {
      Panel<Format, kRows - kMost>(first + kMost * dst_stride, dst_stride, src, first_row + kMost,
                                   panel, tiles, lanes);
    }
  }
}

template <class Format>
void Matmul(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t first_row, int rows,
            const uint8_t* panels, int64_t begin, int64_t end, int64_t k) {
  using Function = void (*)(float*, int64_t, const QuantizedRows&, int64_t, const uint8_t*, int64_t,
                            int64_t, int64_t);
  static constexpr Function kByRows[] = {Panels<Format, 1>, Panels<Format, 2>, Panels<Format, 3>,
                                         Panels<Format, 4>, Panels<Format, 5>, Panels<Format, 6>,
                                         Panels<Format, 7>, Panels<Format, 8>};
  kByRows[rows - 1](dst, dst_stride, src, first_row, panels, begin, end, k);
}

// Part of a panel as gemm reads it: a byte an element, and the factors in float32.
struct UnpackedPanel {
  uint8_t* quads;  // [elements / 4, 16, 4]
  float* scale;    // [elements / 32, 16]
};

template <class Format>
GEMLOUPE_INLINE void UnpackQuads(const UnpackedPanel& dst, const uint8_t* panel, int64_t begin,
                                 int64_t end) {
  uint8_t* quads = dst.quads;
  float* scale = dst.scale;
  for (int64_t at = begin; at < end; at += kElementsOf<Format>) {
    const uint8_t* tile =
        panel + static_cast<size_t>(at / kElementsOf<Format>) * Format::kTileBytes;
    for (int part = 0; part < Format::kParts; ++part) {
      const uint8_t* lines = Format::Lines(tile, part);
      GEMLOUPE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const Quads both = QuadsAt<Format::kBits>(lines, j);
        _mm512_storeu_si512(quads + 64 * j, both.first);
        _mm512_storeu_si512(quads + 64 * (8 + j), both.second);
      }
      quads += 1024;
      _mm512_storeu_ps(scale, Format::Scale(tile, 2 * part));
      _mm512_storeu_ps(scale + 16, Format::Scale(tile, 2 * part + 1));
      scale += 32;
    }
  }
}

// 16 outputs of kRows interleaved rows over one stretch of k; acc continues what dst holds.
template <int kRows>
GEMLOUPE_INLINE void GemmTile(float* dst, int64_t dst_stride, int rows, const int32_t* q,
                              const float* scale, const int32_t* start, const UnpackedPanel& w,
                              int64_t groups, __mmask16 lanes, bool add) {
  __m512 acc[kRows];
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    acc[r] =
        add && r < rows ? _mm512_maskz_loadu_ps(lanes, dst + r * dst_stride) : _mm512_setzero_ps();
  }
  const uint8_t* quads = w.quads;
  for (int64_t group = 0; group < groups; ++group) {
    __m512i sum[kRows];
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = _mm512_set1_epi32(start[r]);
    GEMLOUPE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const __m512i u = Line(quads + 64 * j);
      GEMLOUPE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r] = _mm512_dpbusd_epi32(sum[r], u, _mm512_set1_epi32(q[kGemmRows * j + r]));
      }
    }
    const __m512 s = _mm512_loadu_ps(w.scale + 16 * group);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]),
                               _mm512_mul_ps(s, _mm512_set1_ps(scale[r])), acc[r]);
    }
    quads += 512;
    q += 8 * kGemmRows;
    scale += kGemmRows;
    start += kGemmRows;
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) _mm512_mask_storeu_ps(dst + r * dst_stride, lanes, acc[r]);
  }
}

template <class Format>
void Gemm(float* dst, int64_t dst_stride, const InterleavedRows& src, int64_t rows,
          const uint8_t* panels, int64_t begin, int64_t end, int64_t k, uint8_t* scratch) {
  const int64_t tiles = TilesOf<Format>(k);
  const int64_t elements = tiles * kElementsOf<Format>;
  const UnpackedPanel unpacked = {scratch, reinterpret_cast<float*>(scratch + 16 * kGemmElements)};
  for (int64_t at = 0; at < elements; at += kGemmElements) {
    const int64_t stop = at + kGemmElements < elements ? at + kGemmElements : elements;
    for (int64_t panel = begin; panel < end; panel += kPanelRows) {
      const __mmask16 lanes = LanesIn(panel, begin, end);
      UnpackQuads<Format>(
          unpacked, panels + static_cast<size_t>(panel / kPanelRows * tiles) * Format::kTileBytes,
          at, stop);
      for (int64_t row = 0; row < rows; row += kGemmRows) {
        const int64_t quad = (row / kGemmRows * (src.padded / 4) + at / 4) * kGemmRows;
        const int64_t group = (row / kGemmRows * (src.padded / kGroup) + at / kGroup) * kGemmRows;
        float* out = dst + row * dst_stride + (panel - begin);
        const int here = static_cast<int>(rows - row < kGemmRows ? rows - row : kGemmRows);
        const auto tile = here > 8 ? GemmTile<12> : here > 4 ? GemmTile<8> : GemmTile<4>;
        tile(out, dst_stride, here, src.q + quad, src.scale + group, src.start + group, unpacked,
             (stop - at) / kGroup, lanes, at > 0);
      }
    }
  }
}

// Four quads' bytes to floats: element i of every row, i = 0 … 3.
template <class Format>
GEMLOUPE_INLINE void StoreQuad(float* dst, __m512i quad, __m512 scale, __m512 min) {
  GEMLOUPE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512i u = _mm512_and_si512(_mm512_srli_epi32(quad, 8 * i), _mm512_set1_epi32(255));
    const __m512i centred = _mm512_sub_epi32(u, _mm512_set1_epi32(Format::kZero));
    const __m512 w = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(centred));
    _mm512_storeu_ps(dst + 16 * i, Format::kHasMin ? _mm512_sub_ps(w, min) : w);
  }
}

template <class Format>
void Unpack(float* dst, const uint8_t* panel, int64_t begin, int64_t count) {
  for (int64_t at = begin; at < begin + count; at += kElementsOf<Format>) {
    const uint8_t* tile =
        panel + static_cast<size_t>(at / kElementsOf<Format>) * Format::kTileBytes;
    for (int part = 0; part < Format::kParts; ++part) {
      const uint8_t* lines = Format::Lines(tile, part);
      GEMLOUPE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const Quads both = QuadsAt<Format::kBits>(lines, j);
        __m512 first_scale = Format::Scale(tile, 2 * part);
        __m512 second_scale = Format::Scale(tile, 2 * part + 1);
        if constexpr (Format::kHasHalfScales) {
          const __m512i first = Format::HalfScale(tile, 4 * part + j / 4);
          const __m512i second = Format::HalfScale(tile, 4 * part + 2 + j / 4);
          first_scale = _mm512_mul_ps(first_scale, _mm512_cvtepi32_ps(first));
          second_scale = _mm512_mul_ps(second_scale, _mm512_cvtepi32_ps(second));
        }
        StoreQuad<Format>(dst + 64 * j, both.first, first_scale, Format::Min(tile, 2 * part));
        StoreQuad<Format>(dst + 64 * (8 + j), both.second, second_scale,
                          Format::Min(tile, 2 * part + 1));
      }
      dst += 64 * kPanelRows;
    }
  }
}

void QuantizeRow(const QuantizedRows& dst, int64_t row, const float* src, int64_t k) {
  const int64_t groups = dst.padded / kGroup;
  int8_t* q = dst.q + row * dst.padded;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t at = group * kGroup;
    const int64_t left = k - at;
    __mmask32 present = 0;
    if (left > 0) present = left >= kGroup ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    const __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present), src + at);
    const __m512 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present >> 16), src + at + 16);
    const __m512 most_of = _mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b));
    const float most = _mm512_reduce_max_ps(most_of);
    // QNaN or either infinity.
    const bool finite = (_mm512_fpclass_ps_mask(a, 0x99) | _mm512_fpclass_ps_mask(b, 0x99)) == 0;
    const bool zero = !finite || most < 1e-30f;
    const float inverse = zero ? 0.0f : 127.0f / most;
    const __m512 factor = _mm512_set1_ps(inverse);
    __m512i qa = _mm512_setzero_si512();
    __m512i qb = _mm512_setzero_si512();
    if (!zero) {
      qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, factor));
      qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, factor));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + at), _mm512_cvtepi32_epi8(qa));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + at + 16), _mm512_cvtepi32_epi8(qb));
    const int32_t half = _mm512_reduce_add_epi32(qa);
    const int64_t group_at = row * groups + group;
    dst.scale[group_at] = !finite ? __builtin_nanf("") : (zero ? 0.0f : most / 127.0f);
    dst.sum[group_at] = half + _mm512_reduce_add_epi32(qb);
    dst.half_sum[group_at] = half;
  }
}

template <int kRows>
GEMLOUPE_INLINE void PanelTileF32(float* dst, int64_t dst_stride, const float* src,
                                  int64_t src_stride, const float* panel, int64_t k,
                                  __mmask16 lanes, bool add) {
  __m512 acc[kRows];
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    acc[r] = add ? _mm512_maskz_loadu_ps(lanes, dst + r * dst_stride) : _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < k; ++i) {
    const __m512 w = _mm512_loadu_ps(panel + i * kPanelRows);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(src[r * src_stride + i]), w, acc[r]);
    }
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) _mm512_mask_storeu_ps(dst + r * dst_stride, lanes, acc[r]);
}

void PanelMatmulF32(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                    int64_t rows, const float* panel, int64_t k, int outputs, bool add) {
  const auto lanes = static_cast<__mmask16>((1u << outputs) - 1);
  using Function =
      void (*)(float*, int64_t, const float*, int64_t, const float*, int64_t, __mmask16, bool);
  static constexpr Function kByRows[] = {PanelTileF32<1>, PanelTileF32<2>, PanelTileF32<3>,
                                         PanelTileF32<4>, PanelTileF32<5>, PanelTileF32<6>,
                                         PanelTileF32<7>, PanelTileF32<8>};
  int64_t row = 0;
  for (; row + 14 <= rows; row += 14) {
    PanelTileF32<14>(dst + row * dst_stride, dst_stride, src + row * src_stride, src_stride, panel,
                     k, lanes, add);
  }
  while (row < rows) {
    const int64_t now = rows - row < 8 ? rows - row : 8;
    kByRows[now - 1](dst + row * dst_stride, dst_stride, src + row * src_stride, src_stride, panel,
                     k, lanes, add);
    row += now;
  }
}

}  // namespace

extern const QuantKernels kQuantTable;
constinit const QuantKernels kQuantTable = {
    .name = "avx512_vnni",
    .quantize_row = QuantizeRow,
    .matmul = {Matmul<Int4>, Matmul<Int6>, Matmul<Int8>, Matmul<Int4K>, Matmul<Int5K>,
               Matmul<Int6K>},
    .gemm = {Gemm<Int4>, Gemm<Int6>, Gemm<Int8>, nullptr, nullptr, nullptr},
    .unpack = {Unpack<Int4>, Unpack<Int6>, Unpack<Int8>, Unpack<Int4K>, Unpack<Int5K>,
               Unpack<Int6K>},
    .panel_matmul_f32 = PanelMatmulF32,
};

}  // namespace gemloupe::avx512_vnni
