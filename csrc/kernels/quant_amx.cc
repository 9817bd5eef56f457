// Products of many rows with packed weights on AMX. A tile product of 16 rows, 16 outputs and one group
// of 32 elements is exact in 32-bit integers, so the bits are those of the other quantised kernels;
// its sums are scaled and added in float registers while the tiles compute the next groups.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/packed_layout.h"
#include "kernels/quant_formats.h"
#include "kernels/quant_table.h"

namespace gemloupe::amx {
namespace {

constexpr int kTileRows = 16;

// Palette 1: tiles 0–3 hold sums [16 rows, 16 outputs], 4–5 activations [16 rows, 32 bytes], 6–7 weights
// [8 quads, 16 outputs of 4 bytes].
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 32, 32, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 8, 8};
};

// Part of a panel: signed bytes (u − zero), and the factors in float32.
struct UnpackedPanel {
  int8_t* quads;  // [elements / 4, 16, 4]
  float* scale;   // [elements / 32, 16]
  float* min;     // [elements / 32, 16]
};

template <class Format>
GEMLOUPE_INLINE void UnpackSigned(const UnpackedPanel& dst, const uint8_t* panel, int64_t begin,
                                  int64_t end) {
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(Format::kZero));
  int8_t* quads = dst.quads;
  float* scale = dst.scale;
  float* min = dst.min;
  for (int64_t at = begin; at < end; at += kElementsOf<Format>) {
    const uint8_t* tile =
        panel + static_cast<size_t>(at / kElementsOf<Format>) * Format::kTileBytes;
    for (int part = 0; part < Format::kParts; ++part) {
      const uint8_t* lines = Format::Lines(tile, part);
      GEMLOUPE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const Quads both = QuadsAt<Format::kBits>(lines, j);
        _mm512_storeu_si512(quads + 64 * j, _mm512_sub_epi8(both.first, zero));
        _mm512_storeu_si512(quads + 64 * (8 + j), _mm512_sub_epi8(both.second, zero));
      }
      quads += 1024;
      _mm512_storeu_ps(scale, Format::Scale(tile, 2 * part));
      _mm512_storeu_ps(scale + 16, Format::Scale(tile, 2 * part + 1));
      scale += 32;
      if constexpr (Format::kHasMin) {
        _mm512_storeu_ps(min, Format::Min(tile, 2 * part));
        _mm512_storeu_ps(min + 16, Format::Min(tile, 2 * part + 1));
        min += 32;
      }
    }
  }
}

// acc [16 rows] += the integer sums of one group, scaled.
template <class Format>
GEMLOUPE_INLINE void AddGroup(__m512 (&acc)[kTileRows], const int32_t* sums, const float* scale,
                              const float* scaled_sum, __m512 w_scale, __m512 w_min) {
  GEMLOUPE_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * r));
    acc[r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(w_scale, _mm512_set1_ps(scale[r])), acc[r]);
    if constexpr (Format::kHasMin) {
      acc[r] = _mm512_fnmadd_ps(w_min, _mm512_set1_ps(scaled_sum[r]), acc[r]);
    }
  }
}

// 16 outputs of 16 rows over `groups` groups of 32; acc continues what dst holds. The tiles work one
// pair of groups ahead of the float registers.
template <class Format>
GEMLOUPE_INLINE void GemmTile(float* dst, int64_t dst_stride, int rows, const int32_t* q,
                              const float* scale, const float* scaled_sum, const UnpackedPanel& w,
                              int64_t groups, __mmask16 lanes, bool add) {
  alignas(64) int32_t sums[4][kTileRows * 16];
  __m512 acc[kTileRows];
  GEMLOUPE_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    acc[r] =
        add && r < rows ? _mm512_maskz_loadu_ps(lanes, dst + r * dst_stride) : _mm512_setzero_ps();
  }
  constexpr int64_t kTileWords = kTileRows * kGroup / 4;
  const auto first_pair = [&](int64_t group) __attribute__((always_inline)) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, q + group * kTileWords, 32);
    _tile_loadd(6, w.quads + group * 512, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, q + (group + 1) * kTileWords, 32);
    _tile_loadd(7, w.quads + (group + 1) * 512, 64);
    _tile_dpbssd(1, 5, 7);
  };
  const auto second_pair = [&](int64_t group) __attribute__((always_inline)) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, q + group * kTileWords, 32);
    _tile_loadd(6, w.quads + group * 512, 64);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(5, q + (group + 1) * kTileWords, 32);
    _tile_loadd(7, w.quads + (group + 1) * 512, 64);
    _tile_dpbssd(3, 5, 7);
  };
  const auto add_pair = [&](int64_t group, const int32_t* a, const int32_t* b)
      __attribute__((always_inline)) {
    const __m512 zero = _mm512_setzero_ps();
    AddGroup<Format>(acc, a, scale + group * kTileRows, scaled_sum + group * kTileRows,
                     _mm512_loadu_ps(w.scale + 16 * group),
                     Format::kHasMin ? _mm512_loadu_ps(w.min + 16 * group) : zero);
    AddGroup<Format>(acc, b, scale + (group + 1) * kTileRows, scaled_sum + (group + 1) * kTileRows,
                     _mm512_loadu_ps(w.scale + 16 * (group + 1)),
                     Format::kHasMin ? _mm512_loadu_ps(w.min + 16 * (group + 1)) : zero);
  };
  // Groups come in pairs: a tile of every format has at least 64 elements.
  first_pair(0);
  int64_t group = 0;
  while (true) {
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (group + 2 < groups) second_pair(group + 2);
    add_pair(group, sums[0], sums[1]);
    group += 2;
    if (group >= groups) break;
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    if (group + 2 < groups) first_pair(group + 2);
    add_pair(group, sums[2], sums[3]);
    group += 2;
    if (group >= groups) break;
  }
  GEMLOUPE_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    if (r < rows) _mm512_mask_storeu_ps(dst + r * dst_stride, lanes, acc[r]);
  }
}

template <class Format>
void Gemm(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t rows,
          const uint8_t* panels, int64_t begin, int64_t end, int64_t k, uint8_t* scratch) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t tiles = TilesOf<Format>(k);
  const int64_t elements = tiles * kElementsOf<Format>;
  auto* factors = reinterpret_cast<float*>(scratch + 16 * kGemmElements);
  const UnpackedPanel unpacked = {reinterpret_cast<int8_t*>(scratch), factors,
                                  factors + 16 * (kGemmElements / kGroup)};
  for (int64_t at = 0; at < elements; at += kGemmElements) {
    const int64_t stop = at + kGemmElements < elements ? at + kGemmElements : elements;
    for (int64_t panel = begin; panel < end; panel += kPanelRows) {
      UnpackSigned<Format>(
          unpacked, panels + static_cast<size_t>(panel / kPanelRows * tiles) * Format::kTileBytes,
          at, stop);
      const __mmask16 lanes = LanesIn(panel, begin, end);
      for (int64_t row = 0; row < rows; row += kTileRows) {
        const int64_t quad = (row / kTileRows * (src.padded / 4) + at / 4) * kTileRows;
        const int64_t group = (row / kTileRows * (src.padded / kGroup) + at / kGroup) * kTileRows;
        const int here = static_cast<int>(rows - row < kTileRows ? rows - row : kTileRows);
        GemmTile<Format>(dst + row * dst_stride + (panel - begin), dst_stride, here, src.q + quad,
                         src.scale + group, src.scaled_sum + group, unpacked, (stop - at) / kGroup,
                         lanes, at > 0);
      }
    }
  }
  _tile_release();
}

}  // namespace

extern const QuantKernels::Gemm kGemms[kNumPackedFormats];
constinit const QuantKernels::Gemm kGemms[kNumPackedFormats] = {
    Gemm<Int4>, Gemm<Int6>, Gemm<Int8>, Gemm<Int4K>, Gemm<Int5K>, nullptr};

}  // namespace gemloupe::amx
