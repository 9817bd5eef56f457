#ifndef GEMLOUPE_KERNELS_QUANT_FORMATS_H_
#define GEMLOUPE_KERNELS_QUANT_FORMATS_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/packed_layout.h"

// How AVX-512 reads the packed formats (packed_layout.h), for csrc/kernels/quant_vnni.cc and
// quant_amx.cc only. Everything is in an unnamed namespace: see simd_vec.h.

#define GEMLOUPE_INLINE inline __attribute__((always_inline))
#define GEMLOUPE_UNROLL _Pragma("GCC unroll 32")

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

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

}  // namespace
}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA

#endif  // GEMLOUPE_KERNELS_QUANT_FORMATS_H_
