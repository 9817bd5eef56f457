#ifndef GEMLOUPE_BASE_DTYPE_H_
#define GEMLOUPE_BASE_DTYPE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace gemloupe {

// How the elements of a tensor are stored.
enum class DType : uint8_t {
  // Plain: one element after the other.
  kFloat32,
  kFloat16,
  kBfloat16,
  // Row-major blocks, as GGUF files hold them (kernels/blocks.h).
  kQ4_0,
  kQ8_0,
  kQ4K,
  kQ5K,
  kQ6K,
  // Packed: panels of 16 matrix rows, as the quantised kernels read them (kernels/packed_layout.h).
  kInt4,
  kInt6,
  kInt8,
  kInt4K,
  kInt5K,
  kInt6K,
};

inline constexpr int kNumDTypes = static_cast<int>(DType::kInt6K) + 1;

inline bool IsPlain(DType dtype) { return dtype <= DType::kBfloat16; }
inline bool IsBlocked(DType dtype) { return dtype >= DType::kQ4_0 && dtype <= DType::kQ6K; }
inline bool IsPacked(DType dtype) { return dtype >= DType::kInt4; }

// Bytes of one element of a plain dtype.
size_t DTypeSize(DType dtype);
// Elements along a row that are stored together: 1 where plain, 32 or 256 where blocked (rows are
// whole blocks), 64 or 256 where packed (rows are padded to whole tiles).
int64_t BlockElements(DType dtype);
// Bytes of a matrix [rows, cols].
size_t MatrixBytes(DType dtype, int64_t rows, int64_t cols);
// Bytes of a tensor: of its last two axes as matrices, one after the other.
size_t TensorBytes(DType dtype, const std::vector<int64_t>& shape);

// "float32", "bfloat16", "q4_0", "int4", …
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
