#ifndef GEMLOUPE_KERNELS_KERNEL_TABLE_H_
#define GEMLOUPE_KERNELS_KERNEL_TABLE_H_

#include <cstdint>

// Every hand-written kernel, as function pointers: one table per instruction set. bfloat16 and
// float16 are passed as their bits. Weights, keys and values may be unaligned even for their element
// type (they can point into a mapped file); other pointers are aligned to their element type.
//
// Accumulation contract: the float operations behind one output element depend on k (or on `count`)
// only, never on the number of rows, of outputs, or of threads. A row computed among eight is
// bit-identical to the same row computed alone.

namespace gemloupe {

// Most rows that one call of a matmul or accumulate kernel takes.
inline constexpr int kMaxKernelRows = 8;

// What comes next, fetched into the second-level cache while a kernel computes; bytes 0: nothing.
struct Fetch {
  const void* data = nullptr;
  int64_t bytes = 0;
};

// dst[r, i] = Σ_k src[r, k] · weight[i, k] for r < rows (1 … 8) and i < n. Strides in elements.
// Weight elements are float, the bits of bfloat16 or float16, or int8, and may be unaligned.
using MatmulKernel = void (*)(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                              const void* weight, int64_t weight_stride, int rows, int64_t n,
                              int64_t k, Fetch fetch);

// dst[r, c] += Σ_j coef[r, j] · value[j, c] for r < rows (1 … 8), j < count ascending, c < cols.
using AccumulateKernel = void (*)(float* dst, int64_t dst_stride, const float* coef,
                                  int64_t coef_stride, const void* value, int64_t value_stride,
                                  int rows, int64_t count, int64_t cols, Fetch fetch);

struct KernelTable {
  const char* name;  // "portable", "avx2" or "avx512"

  MatmulKernel matmul_f32;
  MatmulKernel matmul_bf16;
  MatmulKernel matmul_f16;
  MatmulKernel matmul_i8;

  AccumulateKernel accumulate_f32;
  AccumulateKernel accumulate_bf16;
  AccumulateKernel accumulate_f16;
  AccumulateKernel accumulate_i8;

  // Exact widening, and rounding to nearest even (NaN stays NaN; float16 overflow gives infinity).
  void (*bf16_to_f32)(float* dst, const void* src, int64_t n);
  void (*f16_to_f32)(float* dst, const void* src, int64_t n);
  void (*f32_to_bf16)(uint16_t* dst, const float* src, int64_t n);
  void (*f32_to_f16)(uint16_t* dst, const float* src, int64_t n);
  void (*i8_to_f32)(float* dst, const void* src, int64_t n);
  // Returns the scale s of n values, max|src| / 127, and dst = src / s rounded to nearest even: then
  // |src − s · dst| ≤ s / 2 up to rounding. Values that are all below 1e-30 become zeros, and s is 0.
  float (*f32_to_i8)(int8_t* dst, const float* src, int64_t n);

  // dst[c, r] = src[r, c] for r < rows, c < cols. Strides in elements.
  void (*transpose)(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                    int64_t rows, int64_t cols);

  // dst = src · (mean(src²) + eps)^-½ · weight; weight null: without it. dst may be src.
  void (*rms_norm)(float* dst, const float* src, const float* weight, int64_t n, float eps);

  // Rotates the pairs (x[i], x[i + half_dim]) for i < pairs in place:
  // x[i] ← x[i]·cos[i] − x[i + half_dim]·sin[i], x[i + half_dim] ← x[i + half_dim]·cos[i] + x[i]·sin[i].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t pairs, int64_t half_dim);

  // dst = gelu_tanh(gate) · up, gelu_tanh(z) = ½ z (1 + tanh(√(2/π) (z + 0.044715 z³))). May alias.
  void (*gelu_mul)(float* dst, const float* gate, const float* up, int64_t n);

  // dst = a + b; dst = src · factor; dst += src · factor. May alias.
  void (*add)(float* dst, const float* a, const float* b, int64_t n);
  void (*scale)(float* dst, const float* src, float factor, int64_t n);
  void (*add_scaled)(float* dst, const float* src, float factor, int64_t n);
  // dst = a · b.
  void (*mul)(float* dst, const float* a, const float* b, int64_t n);

  // dst = x · sigmoid(gate), sigmoid(z) = 1 / (1 + exp(−z)); silu(x) where gate is x. May alias.
  void (*sigmoid_mul)(float* dst, const float* x, const float* gate, int64_t n);
  // dst = src, but low where it is below and high where it is above; NaN stays. May alias.
  void (*clamp)(float* dst, const float* src, float low, float high, int64_t n);

  // x ← cap · tanh(x / cap).
  void (*softcap)(float* x, float cap, int64_t n);

  // Largest element; n ≥ 1. NaN is ignored unless all are NaN (then −infinity).
  float (*max)(const float* x, int64_t n);
  // dst = exp(src − shift), 0 where that is subnormal; returns Σ dst. exp(−infinity) = 0. dst may be src, or null: sum only.
  float (*exp_sum)(float* dst, const float* src, float shift, int64_t n);
};

// The scalar twins: short enough to be believed, runs anywhere.
const KernelTable& PortableKernels();
// Null where this build has none for the architecture. Calling their kernels needs the CPU features.
const KernelTable* Avx2Kernels();    // AVX2, FMA, F16C
const KernelTable* Avx512Kernels();  // AVX-512 F, BW, DQ, VL

}  // namespace gemloupe

#endif  // GEMLOUPE_KERNELS_KERNEL_TABLE_H_
