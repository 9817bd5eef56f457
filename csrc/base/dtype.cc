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

size_t DTypeSize(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBfloat16: return "bfloat16";
  }
  return "unknown";
}

StatusOr<DType> ParseDType(std::string_view name) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return absl::InvalidArgumentError(absl::StrCat("unknown dtype '", std::string(name),
                                                 "'; expected float32, float16 or bfloat16"));
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
