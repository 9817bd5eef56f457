#ifndef GEMLOUPE_KERNELS_SIMD_VEC_H_
#define GEMLOUPE_KERNELS_SIMD_VEC_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"

// The float vector of the instruction set being compiled, for csrc/kernels/simd_*.cc only.
//
// Everything here and every template in those files is in an unnamed namespace: a weak copy from an
// AVX-512 object could be the one that the linker keeps for an older CPU.

#define GEMLOUPE_INLINE inline __attribute__((always_inline))
// For loops over arrays of vectors: the arrays live in registers only when unrolled.
#define GEMLOUPE_UNROLL _Pragma("GCC unroll 32")

namespace gemloupe::GEMLOUPE_KERNEL_ISA {
namespace {

#if defined(GEMLOUPE_KERNEL_ISA_avx512)

constexpr int kWidth = 16;      // floats a vector
constexpr int kRegisters = 32;  // vector registers

using Vec = __m512;
using Tail = __mmask16;  // the first `count` elements

GEMLOUPE_INLINE Tail FirstElements(int64_t count) { return static_cast<Tail>((1u << count) - 1); }

GEMLOUPE_INLINE Vec Set(float x) { return _mm512_set1_ps(x); }
GEMLOUPE_INLINE Vec Load(const float* p) { return _mm512_loadu_ps(p); }
GEMLOUPE_INLINE Vec LoadTail(const float* p, Tail tail) { return _mm512_maskz_loadu_ps(tail, p); }
GEMLOUPE_INLINE void Store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
GEMLOUPE_INLINE void StoreTail(float* p, Vec x, Tail tail) { _mm512_mask_storeu_ps(p, tail, x); }
// Elements of the tail from x, the others from `rest`.
GEMLOUPE_INLINE Vec Select(Tail tail, Vec x, Vec rest) {
  return _mm512_mask_blend_ps(tail, rest, x);
}

GEMLOUPE_INLINE Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
GEMLOUPE_INLINE Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
GEMLOUPE_INLINE Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
GEMLOUPE_INLINE Vec Div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
GEMLOUPE_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The second argument where either is NaN.
GEMLOUPE_INLINE Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
GEMLOUPE_INLINE Vec Min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
GEMLOUPE_INLINE Vec Round(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
GEMLOUPE_INLINE Vec Abs(Vec x) { return _mm512_andnot_ps(Set(-0.0f), x); }
// x, or 0 where x < lowest; NaN stays.
GEMLOUPE_INLINE Vec ZeroBelow(Vec x, Vec lowest) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ), x);
}
GEMLOUPE_INLINE Vec CopySign(Vec magnitude, Vec sign) {
  return _mm512_or_ps(magnitude, _mm512_and_ps(Set(-0.0f), sign));
}
// x · 2^n for whole n, |n| < 250; correctly rounded where the result is subnormal.
GEMLOUPE_INLINE Vec ScaleByPowerOfTwo(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

// Halves are added (or compared) 16 → 8 → 4 → 2 → 1.
GEMLOUPE_INLINE __m256 LowHalf(Vec x) { return _mm512_castps512_ps256(x); }
GEMLOUPE_INLINE __m256 HighHalf(Vec x) { return _mm512_extractf32x8_ps(x, 1); }
GEMLOUPE_INLINE __m256 FoldSum(Vec x) { return _mm256_add_ps(LowHalf(x), HighHalf(x)); }
GEMLOUPE_INLINE __m256 FoldMax(Vec x) { return _mm256_max_ps(LowHalf(x), HighHalf(x)); }

// Sum(a) … Sum(d), bit for bit, in half as many instructions.
struct FourSums {
  float a, b, c, d;
};
GEMLOUPE_INLINE FourSums SumFour(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = Add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const Vec cd = Add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  const Vec four = Add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const Vec two = Add(four, _mm512_permute_ps(four, 0x4e));
  const Vec one = Add(two, _mm512_movehdup_ps(two));
  return {_mm512_cvtss_f32(one), _mm_cvtss_f32(_mm512_extractf32x4_ps(one, 1)),
          _mm_cvtss_f32(_mm512_extractf32x4_ps(one, 2)),
          _mm_cvtss_f32(_mm512_extractf32x4_ps(one, 3))};
}

struct Bfloat16 {
  static constexpr int kBytes = 2;
  static GEMLOUPE_INLINE Vec Widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static GEMLOUPE_INLINE Vec Load(const char* p) {
    return Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static GEMLOUPE_INLINE Vec LoadTail(const char* p, Tail tail) {
    return Widen(_mm256_maskz_loadu_epi16(tail, p));
  }
  static GEMLOUPE_INLINE __m256i Round(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet));
  }
};

struct Float16 {
  static constexpr int kBytes = 2;
  static GEMLOUPE_INLINE Vec Load(const char* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static GEMLOUPE_INLINE Vec LoadTail(const char* p, Tail tail) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail, p));
  }
  static GEMLOUPE_INLINE __m256i Round(Vec x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

struct Int8 {
  static constexpr int kBytes = 1;
  static GEMLOUPE_INLINE Vec Widen(__m128i bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  static GEMLOUPE_INLINE Vec Load(const char* p) {
    return Widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static GEMLOUPE_INLINE Vec LoadTail(const char* p, Tail tail) {
    return Widen(_mm_maskz_loadu_epi8(tail, p));
  }
  // To nearest even, saturated; 0 where x is NaN.
  static GEMLOUPE_INLINE __m128i Round(Vec x) {
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    return _mm512_cvtsepi32_epi8(_mm512_maskz_cvtps_epi32(number, x));
  }
  static GEMLOUPE_INLINE void StoreBytes(int8_t* p, __m128i bytes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  static GEMLOUPE_INLINE void StoreBytesTail(int8_t* p, __m128i bytes, Tail tail) {
    _mm_mask_storeu_epi8(p, tail, bytes);
  }
};

GEMLOUPE_INLINE void StoreBits(uint16_t* p, __m256i bits) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
GEMLOUPE_INLINE void StoreBitsTail(uint16_t* p, __m256i bits, Tail tail) {
  _mm256_mask_storeu_epi16(p, tail, bits);
}

#elif defined(GEMLOUPE_KERNEL_ISA_avx2)

constexpr int kWidth = 8;       // floats a vector
constexpr int kRegisters = 16;  // vector registers

using Vec = __m256;
struct Tail {  // the first `count` elements
  __m256i mask;
  int64_t count;
};

GEMLOUPE_INLINE Tail FirstElements(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane), count};
}

GEMLOUPE_INLINE Vec Set(float x) { return _mm256_set1_ps(x); }
GEMLOUPE_INLINE Vec Load(const float* p) { return _mm256_loadu_ps(p); }
GEMLOUPE_INLINE Vec LoadTail(const float* p, Tail tail) { return _mm256_maskload_ps(p, tail.mask); }
GEMLOUPE_INLINE void Store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
GEMLOUPE_INLINE void StoreTail(float* p, Vec x, Tail tail) { _mm256_maskstore_ps(p, tail.mask, x); }
// Elements of the tail from x, the others from `rest`.
GEMLOUPE_INLINE Vec Select(Tail tail, Vec x, Vec rest) {
  return _mm256_blendv_ps(rest, x, _mm256_castsi256_ps(tail.mask));
}

GEMLOUPE_INLINE Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
GEMLOUPE_INLINE Vec Sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
GEMLOUPE_INLINE Vec Mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
GEMLOUPE_INLINE Vec Div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
GEMLOUPE_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// The second argument where either is NaN.
GEMLOUPE_INLINE Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
GEMLOUPE_INLINE Vec Min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
GEMLOUPE_INLINE Vec Round(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
GEMLOUPE_INLINE Vec Abs(Vec x) { return _mm256_andnot_ps(Set(-0.0f), x); }
// x, or 0 where x < lowest; NaN stays.
GEMLOUPE_INLINE Vec ZeroBelow(Vec x, Vec lowest) {
  return _mm256_and_ps(x, _mm256_cmp_ps(x, lowest, _CMP_NLT_UQ));
}
GEMLOUPE_INLINE Vec CopySign(Vec magnitude, Vec sign) {
  return _mm256_or_ps(magnitude, _mm256_and_ps(Set(-0.0f), sign));
}
// x · 2^n for whole n, |n| < 250; correctly rounded where the result is subnormal. In two steps,
// because 2^n itself need not be a float.
GEMLOUPE_INLINE Vec ScaleByPowerOfTwo(Vec x, Vec n) {
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i power = _mm256_cvtps_epi32(n);
  const __m256i first = _mm256_srai_epi32(power, 1);
  const __m256i second = _mm256_sub_epi32(power, first);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(first, bias), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(second, bias), 23);
  return Mul(Mul(x, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}

// Halves are added (or compared) 8 → 4 → 2 → 1.
GEMLOUPE_INLINE __m256 FoldSum(Vec x) { return x; }
GEMLOUPE_INLINE __m256 FoldMax(Vec x) { return x; }

// Sum(a) … Sum(d), bit for bit, in half as many instructions.
struct FourSums {
  float a, b, c, d;
};
GEMLOUPE_INLINE FourSums SumFour(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = Add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  const Vec cd = Add(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
  const Vec two = Add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  const Vec one = Add(two, _mm256_movehdup_ps(two));  // a . c . b . d .
  const __m128 ac = _mm256_castps256_ps128(one);
  const __m128 bd = _mm256_extractf128_ps(one, 1);
  return {_mm_cvtss_f32(ac), _mm_cvtss_f32(bd), _mm_cvtss_f32(_mm_movehl_ps(ac, ac)),
          _mm_cvtss_f32(_mm_movehl_ps(bd, bd))};
}

// AVX2 has no masked 16-bit loads and stores.
GEMLOUPE_INLINE __m128i LoadBitsTail(const char* p, Tail tail) {
  uint16_t bits[8] = {};
  for (int64_t i = 0; i < tail.count; ++i) __builtin_memcpy(&bits[i], p + 2 * i, 2);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits));
}

struct Bfloat16 {
  static constexpr int kBytes = 2;
  static GEMLOUPE_INLINE Vec Widen(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static GEMLOUPE_INLINE Vec Load(const char* p) {
    return Widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static GEMLOUPE_INLINE Vec LoadTail(const char* p, Tail tail) {
    return Widen(LoadBitsTail(p, tail));
  }
  static GEMLOUPE_INLINE __m128i Round(Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
  }
};

struct Float16 {
  static constexpr int kBytes = 2;
  static GEMLOUPE_INLINE Vec Load(const char* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static GEMLOUPE_INLINE Vec LoadTail(const char* p, Tail tail) {
    return _mm256_cvtph_ps(LoadBitsTail(p, tail));
  }
  static GEMLOUPE_INLINE __m128i Round(Vec x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

struct Int8 {
  static constexpr int kBytes = 1;
  static GEMLOUPE_INLINE Vec Widen(__m128i bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  static GEMLOUPE_INLINE Vec Load(const char* p) {
    return Widen(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static GEMLOUPE_INLINE Vec LoadTail(const char* p, Tail tail) {
    char bytes[16] = {};
    for (int64_t i = 0; i < tail.count; ++i) bytes[i] = p[i];
    return Widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  // To nearest even, saturated; 0 where x is NaN.
  static GEMLOUPE_INLINE __m128i Round(Vec x) {
    const Vec number = _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
    const __m256i whole = _mm256_cvtps_epi32(number);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    return _mm_packs_epi16(words, words);
  }
  static GEMLOUPE_INLINE void StoreBytes(int8_t* p, __m128i bytes) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  }
  static GEMLOUPE_INLINE void StoreBytesTail(int8_t* p, __m128i bytes, Tail tail) {
    int8_t all[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(all), bytes);
    for (int64_t i = 0; i < tail.count; ++i) p[i] = all[i];
  }
};

GEMLOUPE_INLINE void StoreBits(uint16_t* p, __m128i bits) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}
GEMLOUPE_INLINE void StoreBitsTail(uint16_t* p, __m128i bits, Tail tail) {
  uint16_t all[8];
  StoreBits(all, bits);
  for (int64_t i = 0; i < tail.count; ++i) p[i] = all[i];
}

#else
#error "compile csrc/kernels/simd_*.cc through cmake/kernels.cmake"
#endif

struct Float32 {
  static constexpr int kBytes = 4;
  static GEMLOUPE_INLINE Vec Load(const char* p) {
    return gemloupe::GEMLOUPE_KERNEL_ISA::Load(reinterpret_cast<const float*>(p));
  }
  static GEMLOUPE_INLINE Vec LoadTail(const char* p, Tail tail) {
    return gemloupe::GEMLOUPE_KERNEL_ISA::LoadTail(reinterpret_cast<const float*>(p), tail);
  }
};

// Walks over what a kernel was told to fetch.
class FetchStream {
 public:
  explicit FetchStream(Fetch fetch)
      : at_(static_cast<const char*>(fetch.data)), end_(at_ + fetch.bytes) {}

  template <int kLines>
  GEMLOUPE_INLINE void Step() {
    if (at_ >= end_) return;
    GEMLOUPE_UNROLL
    for (int i = 0; i < kLines; ++i) _mm_prefetch(at_ + 64 * i, _MM_HINT_T1);
    at_ += 64 * kLines;
  }

 private:
  const char* at_;
  const char* end_;
};

// Keeps a loaded vector in a register: GCC would repeat the load in each FMA that uses it.
GEMLOUPE_INLINE Vec InRegister(Vec x) {
  asm("" : "+v"(x));
  return x;
}

// Sum of all elements, always in the same order.
GEMLOUPE_INLINE float Sum(Vec x) {
  const __m256 eight = FoldSum(x);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

GEMLOUPE_INLINE float Largest(Vec x) {
  const __m256 eight = FoldMax(x);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA

#endif  // GEMLOUPE_KERNELS_SIMD_VEC_H_
