#ifndef GEMLOUPE_KERNELS_SIMD_KERNELS_H_
#define GEMLOUPE_KERNELS_SIMD_KERNELS_H_

#include <cstdint>

#include "kernels/kernel_table.h"

// The vector kernels of one instruction set, as kernel_table.h describes them.

namespace gemloupe::GEMLOUPE_KERNEL_ISA {

void MatmulF32(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
               const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k,
               Fetch fetch);
void MatmulBf16(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k,
                Fetch fetch);
void MatmulF16(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
               const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k,
               Fetch fetch);
void MatmulI8(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
              const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k,
              Fetch fetch);

void AccumulateF32(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                   const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols,
                   Fetch fetch);
void AccumulateBf16(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                    const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols,
                    Fetch fetch);
void AccumulateF16(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                   const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols,
                   Fetch fetch);
void AccumulateI8(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                  const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols,
                  Fetch fetch);

void Bf16ToF32(float* dst, const void* src, int64_t n);
void F16ToF32(float* dst, const void* src, int64_t n);
void F32ToBf16(uint16_t* dst, const float* src, int64_t n);
void F32ToF16(uint16_t* dst, const float* src, int64_t n);
void I8ToF32(float* dst, const void* src, int64_t n);
float F32ToI8(int8_t* dst, const float* src, int64_t n);
void Transpose(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
               int64_t cols);

void RmsNorm(float* dst, const float* src, const float* weight, int64_t n, float eps);

void Rope(float* x, const float* cos, const float* sin, int64_t pairs, int64_t half_dim);
void Add(float* dst, const float* a, const float* b, int64_t n);
void Scale(float* dst, const float* src, float factor, int64_t n);
void AddScaled(float* dst, const float* src, float factor, int64_t n);
void Mul(float* dst, const float* a, const float* b, int64_t n);

void GeluMul(float* dst, const float* gate, const float* up, int64_t n);
void SigmoidMul(float* dst, const float* x, const float* gate, int64_t n);
void Clamp(float* dst, const float* src, float low, float high, int64_t n);
void Softcap(float* x, float cap, int64_t n);

float Max(const float* x, int64_t n);
float ExpSum(float* dst, const float* src, float shift, int64_t n);

}  // namespace gemloupe::GEMLOUPE_KERNEL_ISA

#endif  // GEMLOUPE_KERNELS_SIMD_KERNELS_H_
