#ifndef GEMLOUPE_KERNELS_QUANT_TABLE_H_
#define GEMLOUPE_KERNELS_QUANT_TABLE_H_

#include <cstddef>
#include <cstdint>

// The kernels of products with packed weights (packed_layout.h), one table per instruction set.
//
// Accumulation contract: with activations quantised in groups of 32 (x = scale · q), an output is
//   acc ← fma(float(Σ u q − zero Σ q), w_scale · x_scale, acc)               int4, int6, int8
//   acc ← fma(float(Σ₁₆ s₁ u q + Σ₁₆ s₂ u q − 32 …), d · x_scale, acc)       int6_k
//   acc ← fma(float(Σ u q), (d · scale) · x_scale, acc), then
//   acc ← fma(−(dmin · min), x_scale · float(Σ q), acc)                      int4_k, int5_k
// group by group, ascending; integer sums are exact. With float32 activations it is
//   acc ← fma(x, w, acc) element by element, ascending.
// So its bits are the same for every instruction set, number of rows and number of threads.

namespace gemloupe {

inline constexpr int kNumPackedFormats =
    6;  // int4, int6, int8, int4_k, int5_k, int6_k, in this order

// Most rows of a group that `matmul` reads.
inline constexpr int kMatmulRows = 8;

// Quantised activations in groups of `width` rows that lie side by side: element (row, i) of an array
// with n entries a row is at ((row / width) · n + i) · width + row % width. Rows that a last group has
// beyond the existing ones are zero. `padded` is k rounded up to 256, the rest is zero.
struct QuantizedRows {
  int32_t* q;           // padded / 4 entries: four int8 each
  float* scale;         // padded / 32 entries
  int32_t* start;       // padded / 32: −8 Σ q, where int4's integer sum begins
  int32_t* half_start;  // padded / 32: −8 Σ q over the group's first 16 elements
  float* scaled_sum;    // padded / 32: scale · Σ q, what a weight's min is multiplied by
  int64_t padded;
  int64_t width;
};

struct QuantKernels {
  const char* name;  // "portable", "avx2" or "avx512_vnni"

  // Rounds src [k] to row `row` of dst: scale = max|x| / 127 of each group of 32, q to nearest even. A
  // group with max|x| < 1e-30 is zero; one with an infinity or NaN gets scale NaN.
  void (*quantize_row)(const QuantizedRows& dst, int64_t row, const float* src, int64_t k);

  // dst[r, i − begin] = Σ_k src[r, k] · weight[i, k] for the first `rows` rows of group `group` (of at
  // most 8 rows) and outputs i in [begin, end) of the matrix whose panels start at `panels`.
  using Matmul = void (*)(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t group,
                          int rows, const uint8_t* panels, int64_t begin, int64_t end, int64_t k);
  Matmul matmul[kNumPackedFormats];

  // As matmul, for any number of rows in groups of gemm_rows, over whole panels: outputs [begin, end),
  // begin a multiple of 16. `scratch` has kGemmScratchBytes. Null where `matmul` is as fast.
  using Gemm = void (*)(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t rows,
                        const uint8_t* panels, int64_t begin, int64_t end, int64_t k,
                        uint8_t* scratch);
  Gemm gemm[kNumPackedFormats];
  int gemm_rows;    // 0 where there is no gemm
  bool gemm_tiles;  // gemm reads q as tiles: in each group, 32 elements of row 0, of row 1, …

  // dst [k, 16] = the float32 values of elements [begin, begin + count) of a panel, transposed; begin and
  // count are multiples of the tile's 64 (or 256) elements.
  using Unpack = void (*)(float* dst, const uint8_t* panel, int64_t begin, int64_t count);
  Unpack unpack[kNumPackedFormats];

  // dst[r, 0 … outputs) (+)= src[r, 0 … k) · panel [k, 16] in float32; `add`: to what dst holds.
  void (*panel_matmul_f32)(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                           int64_t rows, const float* panel, int64_t k, int outputs, bool add);
};

// Elements along k that gemm unpacks at once: the panel stays in L1, the rows' share in L2.
inline constexpr int64_t kGemmElements = 2048;
inline constexpr size_t kGemmScratchBytes = 16 * kGemmElements + 2 * 64 * (kGemmElements / 32);

const QuantKernels& PortableQuantKernels();
const QuantKernels* Avx2QuantKernels();  // null where this build has none; AVX2, FMA, F16C
const QuantKernels* VnniQuantKernels();  // AVX-512 F, BW, DQ, VL, VNNI
const QuantKernels* AmxQuantKernels();   // these and AMX TILE, INT8

}  // namespace gemloupe

#endif  // GEMLOUPE_KERNELS_QUANT_TABLE_H_
