#ifndef GEMLOUPE_BASE_DTYPE_H_
#define GEMLOUPE_BASE_DTYPE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "base/status.h"

namespace gemloupe {

enum class DType : uint8_t { kFloat32, kFloat16, kBfloat16 };

// Bytes of one element.
size_t DTypeSize(DType dtype);
// "float32", "float16" or "bfloat16".
const char* DTypeName(DType dtype);
// Accepts the names above; InvalidArgument otherwise.
StatusOr<DType> ParseDType(std::string_view name);

// Rounds to nearest even; NaN stays NaN.
uint16_t FloatToBfloat16(float x);
uint16_t FloatToFloat16(float x);
float Bfloat16ToFloat(uint16_t x);
float Float16ToFloat(uint16_t x);

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_DTYPE_H_
