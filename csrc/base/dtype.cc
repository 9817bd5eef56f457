#include "base/dtype.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

uint32_t FloatBits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

float BitsFloat(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// value · 2^-shift, rounded to nearest even; 1 ≤ shift ≤ 31.
uint32_t ShiftRightToNearestEven(uint32_t value, int shift) {
  const uint32_t quotient = value >> shift;
  const uint32_t rest = value & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  return quotient + (rest > half || (rest == half && (quotient & 1)));
}

}  // namespace

namespace {

struct Layout {
  const char* name;
  int64_t rows;      // matrix rows stored together
  int64_t elements;  // elements of each row stored together
  size_t bytes;      // of these
};

// In the order of DType. The sizes follow from kernels/blocks.h and kernels/packed_layout.h, whose
// static_asserts check them.
constexpr Layout kLayouts[kNumDTypes] = {
    {"float32", 1, 1, 4},      {"float16", 1, 1, 2},      {"bfloat16", 1, 1, 2},
    {"q4_0", 1, 32, 18},       {"q8_0", 1, 32, 34},       {"q4_k", 1, 256, 144},
    {"q5_k", 1, 256, 176},     {"q6_k", 1, 256, 210},     {"int4", 16, 64, 576},
    {"int6", 16, 64, 832},     {"int8", 16, 64, 1088},    {"int4_k", 16, 256, 2368},
    {"int5_k", 16, 256, 2880}, {"int6_k", 16, 256, 3392},
};

const Layout& LayoutOf(DType dtype) { return kLayouts[static_cast<size_t>(dtype)]; }

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

size_t DTypeSize(DType dtype) {
  GL_CHECK(IsPlain(dtype));
  return LayoutOf(dtype).bytes;
}

int64_t BlockElements(DType dtype) { return LayoutOf(dtype).elements; }

size_t MatrixBytes(DType dtype, int64_t rows, int64_t cols) {
  const Layout& layout = LayoutOf(dtype);
  return static_cast<size_t>(DivideUp(rows, layout.rows) * DivideUp(cols, layout.elements)) *
         layout.bytes;
}

size_t TensorBytes(DType dtype, const std::vector<int64_t>& shape) {
  const size_t axes = shape.size();
  const int64_t cols = axes > 0 ? shape[axes - 1] : 1;
  const int64_t rows = axes > 1 ? shape[axes - 2] : 1;
  size_t matrices = 1;
  for (size_t i = 0; i + 2 < axes; ++i) matrices *= static_cast<size_t>(shape[i]);
  return matrices * MatrixBytes(dtype, rows, cols);
}

const char* DTypeName(DType dtype) { return LayoutOf(dtype).name; }

StatusOr<DType> ParseDType(std::string_view name) {
  for (int i = 0; i < kNumDTypes; ++i) {
    if (name == kLayouts[i].name) return static_cast<DType>(i);
  }
  std::string names;
  for (const Layout& layout : kLayouts)
    absl::StrAppend(&names, names.empty() ? "" : ", ", layout.name);
  return absl::InvalidArgumentError(
      absl::StrCat("unknown dtype '", std::string(name), "'; expected one of ", names));
}

uint16_t FloatToBfloat16(float x) {
  const uint32_t bits = FloatBits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN: keep sign and upper payload, make it quiet
    return static_cast<uint16_t>((bits >> 16) | 0x40u);
  }
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float Bfloat16ToFloat(uint16_t x) { return BitsFloat(static_cast<uint32_t>(x) << 16); }

uint16_t FloatToFloat16(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // NaN: as VCVTPS2PH does
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  }
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  uint32_t half;
  if (exponent >= 16) {
    half = 0x7c00u;
  } else if (exponent >= -14) {  // normal: a carry out of the mantissa is right, up to infinity
    half = ShiftRightToNearestEven(magnitude - (112u << 23), 13);
  } else if (exponent >= -25) {  // subnormal: units of 2^-24
    half = ShiftRightToNearestEven((magnitude & 0x7fffffu) | 0x800000u, -1 - exponent);
  } else {
    half = 0;
  }
  return static_cast<uint16_t>(sign | half);
}

float Float16ToFloat(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t exponent = (x >> 10) & 0x1fu;
  const uint32_t mantissa = x & 0x3ffu;
  if (exponent == 31) {
    const uint32_t quiet = mantissa ? 0x400000u : 0u;  // as VCVTPH2PS does
    return BitsFloat(sign | 0x7f800000u | quiet | (mantissa << 13));
  }
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  return BitsFloat(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

}  // namespace gemloupe
