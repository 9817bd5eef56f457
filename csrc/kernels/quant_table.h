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

// Rows that the tiles of `gemm` take at once.
inline constexpr int kGemmRows = 12;

// Quantised activations [rows, padded]; padded is k rounded up to 256, the rest is zero.
struct QuantizedRows {
  int8_t* q;          // [rows, padded]
  float* scale;       // [rows, padded / 32]
  int32_t* sum;       // [rows, padded / 32]: Σ q of the group
  int32_t* half_sum;  // [rows, padded / 32]: Σ q of its first 16 elements
  int64_t padded;
};

// The same, interleaved for gemm: rows in groups of kGemmRows; missing rows are zero.
struct InterleavedRows {
  int32_t* q;      // [groups, padded / 4, kGemmRows]: four int8 each
  float* scale;    // [groups, padded / 32, kGemmRows]
  int32_t* start;  // [groups, padded / 32, kGemmRows]: −zero · Σ q, where the integer sum begins
  int64_t padded;
};

struct QuantKernels {
  const char* name;  // "portable", "avx2" or "avx512_vnni"

  // Rounds src [k] to row `row` of dst: scale = max|x| / 127 of each group of 32, q to nearest even. A
  // group with max|x| < 1e-30 is zero; one with an infinity or NaN gets scale NaN.
  void (*quantize_row)(const QuantizedRows& dst, int64_t row, const float* src, int64_t k);

  // dst[r, i − begin] = Σ_k src[r, k] · weight[i, k] for rows [first_row, first_row + rows), rows 1 … 8,
  // and outputs i in [begin, end) of the matrix whose panels start at `panels`.
  using Matmul = void (*)(float* dst, int64_t dst_stride, const QuantizedRows& src,
                          int64_t first_row, int rows, const uint8_t* panels, int64_t begin,
                          int64_t end, int64_t k);
  Matmul matmul[kNumPackedFormats];

  // As matmul, for any number of rows, over whole panels: outputs [begin, end), begin a multiple of
  // 16. `scratch` has GemmScratchBytes. Null where `matmul` is as fast.
  using Gemm = void (*)(float* dst, int64_t dst_stride, const InterleavedRows& src, int64_t rows,
                        const uint8_t* panels, int64_t begin, int64_t end, int64_t k,
                        uint8_t* scratch);
  Gemm gemm[kNumPackedFormats];

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
inline constexpr size_t kGemmScratchBytes = 16 * kGemmElements + 64 * (kGemmElements / 32);

const QuantKernels& PortableQuantKernels();
const QuantKernels* Avx2QuantKernels();  // null where this build has none; AVX2, FMA, F16C
const QuantKernels* VnniQuantKernels();  // AVX-512 F, BW, DQ, VL, VNNI

}  // namespace gemloupe

#endif  // GEMLOUPE_KERNELS_QUANT_TABLE_H_
