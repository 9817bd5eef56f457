// The quantised kernels for AVX-512 with VNNI: the 16 rows of a panel stand in the 16 lanes, so nothing
// is ever summed across lanes, and one VPDPBUSD multiplies four elements of 16 rows by four
// activations, broadcast from memory.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/packed_layout.h"
#include "kernels/quant_formats.h"
#include "kernels/quant_table.h"

namespace gemloupe::avx512_vnni {
namespace {

// Rows of the tile of sums that gemm holds in registers.
constexpr int kGemmRows = 12;

// How far ahead of its use a tile is fetched. One core follows one stream: from 4 KiB on this reaches
// the memory's rate, see gemloupe_kernels_bench.
constexpr size_t kAheadBytes = 2048;

// acc += four elements of every row times the four activations at p. In assembly, because GCC 12 makes
// two instructions of it, a broadcast and a product.
GEMLOUPE_INLINE __m512i Dot(__m512i acc, __m512i u, const void* p) {
  const auto& four = *static_cast<const int32_t(*)[1]>(p);
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "m"(four));
  return acc;
}

// A number as a type, to choose a template by.
template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// Panels that are read side by side with few rows.
constexpr int kMostStreams = 4;

// The integer sums of two groups of 32 for kRows rows of activations.
template <class Format, int kRows>
struct IntegerSums {
  __m512i first[kRows];
  __m512i second[kRows];
};

// A stored −8 Σ q as the start for this format's zero.
template <class Format>
GEMLOUPE_INLINE __m512i Start(int32_t start) {
  if constexpr (Format::kZero == 0) return _mm512_setzero_si512();
  constexpr int kShift = Format::kZero == 8 ? 0 : (Format::kZero == 32 ? 2 : 4);
  const __m512i all = _mm512_set1_epi32(start);
  return kShift == 0 ? all : _mm512_slli_epi32(all, kShift);
}

template <class Format, int kRows, int kWidth>
GEMLOUPE_INLINE IntegerSums<Format, kRows> SumQuads(const uint8_t* lines, const int32_t* q,
                                                    const int32_t* start) {
  IntegerSums<Format, kRows> sums;
  GEMLOUPE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    sums.first[r] = Start<Format>(start[r]);
    sums.second[r] = Start<Format>(start[kWidth + r]);
  }
  GEMLOUPE_UNROLL
  for (int j = 0; j < 8; ++j) {
    const Quads quads = QuadsAt<Format::kBits>(lines, j);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sums.first[r] = Dot(sums.first[r], quads.first, q + kWidth * j + r);
      sums.second[r] = Dot(sums.second[r], quads.second, q + kWidth * (8 + j) + r);
    }
  }
  return sums;
}

// The same for a format with a scale for each 16 elements: the scales enter as integers.
template <class Format, int kRows, int kWidth>
GEMLOUPE_INLINE IntegerSums<Format, kRows> SumScaledQuads(const uint8_t* tile, int part,
                                                          const int32_t* q, const int32_t* start,
                                                          const int32_t* half_start) {
  const uint8_t* lines = Format::Lines(tile, part);
  IntegerSums<Format, kRows> sums;
  GEMLOUPE_UNROLL
  for (int half = 0; half < 2; ++half) {
    IntegerSums<Format, kRows> half_sums;
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int32_t* low = half_start + r;
      const int32_t* all = start + r;
      half_sums.first[r] = Start<Format>(half == 0 ? low[0] : all[0] - low[0]);
      half_sums.second[r] = Start<Format>(half == 0 ? low[kWidth] : all[kWidth] - low[kWidth]);
    }
    GEMLOUPE_UNROLL
    for (int j = 4 * half; j < 4 * half + 4; ++j) {
      const Quads quads = QuadsAt<Format::kBits>(lines, j);
      GEMLOUPE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        half_sums.first[r] = Dot(half_sums.first[r], quads.first, q + kWidth * j + r);
        half_sums.second[r] = Dot(half_sums.second[r], quads.second, q + kWidth * (8 + j) + r);
      }
    }
    const __m512i first_scale = Format::HalfScale(tile, 4 * part + half);
    const __m512i second_scale = Format::HalfScale(tile, 4 * part + 2 + half);
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512i first = _mm512_mullo_epi32(half_sums.first[r], first_scale);
      const __m512i second = _mm512_mullo_epi32(half_sums.second[r], second_scale);
      sums.first[r] = half == 0 ? first : _mm512_add_epi32(sums.first[r], first);
      sums.second[r] = half == 0 ? second : _mm512_add_epi32(sums.second[r], second);
    }
  }
  return sums;
}

// kStreams panels, `panel_step` bytes apart, times kRows rows, from row kFirst on, of a group of kWidth;
// `rows` of the group exist. One stream of weights does not reach the memory's rate.
template <class Format, int kStreams, int kRows, int kWidth, int kFirst>
GEMLOUPE_INLINE void PanelStreams(float* dst, int64_t dst_stride, int64_t dst_step,
                                  const QuantizedRows& src, int64_t group, int rows,
                                  const uint8_t* panel, size_t panel_step, int64_t tiles,
                                  __mmask16 lanes) {
  const int64_t groups = src.padded / kGroup;
  const int32_t* q = src.q + group * (src.padded / 4) * kWidth + kFirst;
  const float* scale = src.scale + group * groups * kWidth + kFirst;
  const int32_t* start = src.start + group * groups * kWidth + kFirst;
  const int32_t* half_start = src.half_start + group * groups * kWidth + kFirst;
  const float* scaled_sum = src.scaled_sum + group * groups * kWidth + kFirst;
  __m512 acc[kStreams][kRows];
  GEMLOUPE_UNROLL
  for (int s = 0; s < kStreams; ++s) {
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) acc[s][r] = _mm512_setzero_ps();
  }
  for (int64_t t = 0; t < tiles; ++t) {
    for (int part = 0; part < Format::kParts; ++part) {
      GEMLOUPE_UNROLL
      for (int s = 0; s < kStreams; ++s) {
        const uint8_t* tile = panel + static_cast<size_t>(s) * panel_step +
                              static_cast<size_t>(t) * Format::kTileBytes;
        // The lines of this part of the tile, a little more where they don't divide evenly.
        constexpr size_t kLines = Format::kTileBytes / 64;
        constexpr size_t kPartLines = (kLines + Format::kParts - 1) / Format::kParts;
        const uint8_t* ahead =
            tile + kAheadBytes + static_cast<size_t>(part) * (kLines / Format::kParts) * 64;
        GEMLOUPE_UNROLL
        for (size_t line = 0; line < kPartLines; ++line) {
          _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * line), _MM_HINT_T0);
        }
        IntegerSums<Format, kRows> sums;
        if constexpr (Format::kHasHalfScales) {
          sums = SumScaledQuads<Format, kRows, kWidth>(tile, part, q, start, half_start);
        } else {
          sums = SumQuads<Format, kRows, kWidth>(Format::Lines(tile, part), q, start);
        }
        const __m512 first_scale = Format::Scale(tile, 2 * part);
        const __m512 second_scale = Format::Scale(tile, 2 * part + 1);
        const __m512 first_min = Format::Min(tile, 2 * part);
        const __m512 second_min = Format::Min(tile, 2 * part + 1);
        GEMLOUPE_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const __m512 first = _mm512_mul_ps(first_scale, _mm512_set1_ps(scale[r]));
          acc[s][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.first[r]), first, acc[s][r]);
          if constexpr (Format::kHasMin) {
            acc[s][r] = _mm512_fnmadd_ps(first_min, _mm512_set1_ps(scaled_sum[r]), acc[s][r]);
          }
          const __m512 second = _mm512_mul_ps(second_scale, _mm512_set1_ps(scale[kWidth + r]));
          acc[s][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.second[r]), second, acc[s][r]);
          if constexpr (Format::kHasMin) {
            acc[s][r] =
                _mm512_fnmadd_ps(second_min, _mm512_set1_ps(scaled_sum[kWidth + r]), acc[s][r]);
          }
        }
      }
      q += 16 * kWidth;
      scale += 2 * kWidth;
      start += 2 * kWidth;
      half_start += 2 * kWidth;
      scaled_sum += 2 * kWidth;
    }
  }
  GEMLOUPE_UNROLL
  for (int s = 0; s < kStreams; ++s) {
    GEMLOUPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (kFirst + r < rows) {
        _mm512_mask_storeu_ps(dst + (kFirst + r) * dst_stride + s * dst_step, lanes, acc[s][r]);
      }
    }
  }
}

template <class Format, int kWidth>
void Panels(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t group, int rows,
            const uint8_t* panels, int64_t begin, int64_t end, int64_t k) {
  const int64_t tiles = TilesOf<Format>(k);
  const size_t panel_bytes = static_cast<size_t>(tiles) * Format::kTileBytes;
  const auto run = [&](auto streams, int64_t at, int64_t step) __attribute__((always_inline)) {
    constexpr int kStreams = decltype(streams)::value;
    const uint8_t* panel = panels + static_cast<size_t>(at / kPanelRows) * panel_bytes;
    float* first = dst + (at - begin);
    const __mmask16 lanes = LanesIn(at, begin, end);
    const size_t panel_step = static_cast<size_t>(step) * panel_bytes;
    // More sums than registers: the second half of the rows finds the panel in the cache.
    constexpr int kMost = Format::kHasHalfScales ? 4 : 8;
    constexpr int kNow = kWidth < kMost ? kWidth : kMost;
    PanelStreams<Format, kStreams, kNow, kWidth, 0>(first, dst_stride, step * kPanelRows, src,
                                                    group, rows, panel, panel_step, tiles, lanes);
    if constexpr (kWidth > kMost) {
      PanelStreams<Format, kStreams, kWidth - kMost, kWidth, kMost>(
          first, dst_stride, step * kPanelRows, src, group, rows, panel, panel_step, tiles, lanes);
    }
  };
  // Whole panels in streams, those at either end that are cut alone.
  constexpr int kStreams = kWidth <= 2 ? kMostStreams : (kWidth <= 4 ? 2 : 1);
  int64_t at = begin / kPanelRows * kPanelRows;
  if (at < begin) {
    run(Number<1>(), at, 0);
    at += kPanelRows;
  }
  const int64_t step = at < end ? (end - at) / kPanelRows / kStreams : 0;
  for (int64_t i = 0; i < step; ++i) run(Number<kStreams>(), at + i * kPanelRows, step);
  for (at += step * kStreams * kPanelRows; at < end; at += kPanelRows) run(Number<1>(), at, 0);
}

template <class Format>
void Matmul(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t group, int rows,
            const uint8_t* panels, int64_t begin, int64_t end, int64_t k) {
  using Function = void (*)(float*, int64_t, const QuantizedRows&, int64_t, int, const uint8_t*,
                            int64_t, int64_t, int64_t);
  static constexpr Function kByWidth[] = {Panels<Format, 1>, Panels<Format, 2>, Panels<Format, 3>,
                                          Panels<Format, 4>, Panels<Format, 5>, Panels<Format, 6>,
                                          Panels<Format, 7>, Panels<Format, 8>};
  kByWidth[src.width - 1](dst, dst_stride, src, group, rows, panels, begin, end, k);
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
template <class Format, int kRows>
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
    for (int r = 0; r < kRows; ++r) sum[r] = Start<Format>(start[r]);
    GEMLOUPE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const __m512i u = Line(quads + 64 * j);
      GEMLOUPE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r] = Dot(sum[r], u, q + kGemmRows * j + r);
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
void Gemm(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t rows,
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
        const auto tile = here > 8   ? GemmTile<Format, 12>
                          : here > 4 ? GemmTile<Format, 8>
                                     : GemmTile<Format, 4>;
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

// Four quads, `width` apart.
GEMLOUPE_INLINE void StoreQuads(int32_t* q, int64_t width, __m128i quads) {
  if (width == 1) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), quads);
    return;
  }
  q[0] = _mm_extract_epi32(quads, 0);
  q[width] = _mm_extract_epi32(quads, 1);
  q[2 * width] = _mm_extract_epi32(quads, 2);
  q[3 * width] = _mm_extract_epi32(quads, 3);
}

void QuantizeRow(const QuantizedRows& dst, int64_t row, const float* src, int64_t k) {
  const int64_t groups = dst.padded / kGroup;
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
    int32_t* q =
        dst.q + (row / dst.width * (dst.padded / 4) + at / 4) * dst.width + row % dst.width;
    StoreQuads(q, dst.width, _mm512_cvtepi32_epi8(qa));
    StoreQuads(q + 4 * dst.width, dst.width, _mm512_cvtepi32_epi8(qb));
    const int32_t half = _mm512_reduce_add_epi32(qa);
    const int32_t sum = half + _mm512_reduce_add_epi32(qb);
    const int64_t place = (row / dst.width * groups + group) * dst.width + row % dst.width;
    const float scale = !finite ? __builtin_nanf("") : (zero ? 0.0f : most / 127.0f);
    dst.scale[place] = scale;
    dst.start[place] = -8 * sum;
    dst.half_start[place] = -8 * half;
    dst.scaled_sum[place] = scale * static_cast<float>(sum);
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
    .gemm_rows = kGemmRows,
    .gemm_tiles = false,
    .unpack = {Unpack<Int4>, Unpack<Int6>, Unpack<Int8>, Unpack<Int4K>, Unpack<Int5K>,
               Unpack<Int6K>},
    .panel_matmul_f32 = PanelMatmulF32,
};

}  // namespace gemloupe::avx512_vnni
