#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/dtype.h"
#include "kernels/kernel_table.h"

namespace gemloupe {
namespace {

// Element i of an array that need not be aligned, as a float.
float ElementF32(const void* p, int64_t i) {
  float x;
  std::memcpy(&x, static_cast<const char*>(p) + 4 * i, 4);
  return x;
}

uint16_t Bits16(const void* p, int64_t i) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(p) + 2 * i, 2);
  return bits;
}

float ElementBf16(const void* p, int64_t i) {
  return std::bit_cast<float>(static_cast<uint32_t>(Bits16(p, i)) << 16);
}

float ElementF16(const void* p, int64_t i) { return Float16ToFloat(Bits16(p, i)); }

float ElementI8(const void* p, int64_t i) { return static_cast<const int8_t*>(p)[i]; }

using Element = float(const void*, int64_t);

template <Element kElement>
void Matmul(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
            const void* weight, int64_t weight_stride, int rows, int64_t n, int64_t k, Fetch) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < k; ++j) {
        sum += src[r * src_stride + j] * kElement(weight, i * weight_stride + j);
      }
      dst[r * dst_stride + i] = sum;
    }
  }
}

template <Element kElement>
void Accumulate(float* dst, int64_t dst_stride, const float* coef, int64_t coef_stride,
                const void* value, int64_t value_stride, int rows, int64_t count, int64_t cols,
                Fetch) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t c = 0; c < cols; ++c) {
        dst[r * dst_stride + c] +=
            coef[r * coef_stride + j] * kElement(value, j * value_stride + c);
      }
    }
  }
}

template <Element kElement>
void Widen(float* dst, const void* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = kElement(src, i);
}

template <uint16_t kRound(float)>
void Narrow(uint16_t* dst, const float* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = kRound(src[i]);
}

float QuantizeI8(int8_t* dst, const float* src, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i)
    largest = std::fabs(src[i]) > largest ? std::fabs(src[i]) : largest;
  const float scale = largest < 1e-30f ? 0.0f : largest / 127.0f;
  const float inverse = largest < 1e-30f ? 0.0f : 127.0f / largest;
  for (int64_t i = 0; i < n; ++i) {
    const float x = src[i] * inverse;
    dst[i] = std::isnan(x) ? int8_t{0} : static_cast<int8_t>(std::nearbyint(x));
  }
  return scale;
}

void RmsNorm(float* dst, const float* src, const float* weight, int64_t n, float eps) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += src[i] * src[i];
  const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) {
    dst[i] = weight != nullptr ? src[i] * inverse * weight[i] : src[i] * inverse;
  }
}

void Transpose(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
               int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
}

void Rope(float* x, const float* cos, const float* sin, int64_t pairs, int64_t half_dim) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[i];
    const float b = x[i + half_dim];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half_dim] = b * cos[i] + a * sin[i];
  }
}

void GeluMul(float* dst, const float* gate, const float* up, int64_t n) {
  constexpr float kRootTwoOverPi = 0.7978845608f;
  for (int64_t i = 0; i < n; ++i) {
    const float z = gate[i];
    const float u = kRootTwoOverPi * (z + 0.044715f * z * z * z);
    dst[i] = 0.5f * z * (1.0f + std::tanh(u)) * up[i];
  }
}

void Add(float* dst, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = a[i] + b[i];
}

void Scale(float* dst, const float* src, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i] * factor;
}

void AddScaled(float* dst, const float* src, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += src[i] * factor;
}

void Mul(float* dst, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = a[i] * b[i];
}

void SigmoidMul(float* dst, const float* x, const float* gate, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = x[i] / (1.0f + std::exp(-gate[i]));
}

void Clamp(float* dst, const float* src, float low, float high, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i] < low ? low : src[i] > high ? high : src[i];
}

void Softcap(float* x, float cap, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

float Max(const float* x, int64_t n) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

float ExpSum(float* dst, const float* src, float shift, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float exact = std::exp(src[i] - shift);
    const float e = exact < 0x1p-126f ? 0.0f : exact;
    if (dst != nullptr) dst[i] = e;
    sum += e;
  }
  return sum;
}

constinit const KernelTable kTable = {
    .name = "portable",
    .matmul_f32 = Matmul<ElementF32>,
    .matmul_bf16 = Matmul<ElementBf16>,
    .matmul_f16 = Matmul<ElementF16>,
    .matmul_i8 = Matmul<ElementI8>,
    .accumulate_f32 = Accumulate<ElementF32>,
    .accumulate_bf16 = Accumulate<ElementBf16>,
    .accumulate_f16 = Accumulate<ElementF16>,
    .accumulate_i8 = Accumulate<ElementI8>,
    .bf16_to_f32 = Widen<ElementBf16>,
    .f16_to_f32 = Widen<ElementF16>,
    .f32_to_bf16 = Narrow<FloatToBfloat16>,
    .f32_to_f16 = Narrow<FloatToFloat16>,
    .i8_to_f32 = Widen<ElementI8>,
    .f32_to_i8 = QuantizeI8,
    .transpose = Transpose,
    .rms_norm = RmsNorm,
    .rope = Rope,
    .gelu_mul = GeluMul,
    .add = Add,
    .scale = Scale,
    .add_scaled = AddScaled,
    .mul = Mul,
    .sigmoid_mul = SigmoidMul,
    .clamp = Clamp,
    .softcap = Softcap,
    .max = Max,
    .exp_sum = ExpSum,
};

}  // namespace

const KernelTable& PortableKernels() { return kTable; }

}  // namespace gemloupe
