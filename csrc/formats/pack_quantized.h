#ifndef GEMLOUPE_FORMATS_PACK_QUANTIZED_H_
#define GEMLOUPE_FORMATS_PACK_QUANTIZED_H_

#include <cstdint>

#include "base/status.h"
#include "base/tensor.h"

// The "pack-quantized" format of compressed-tensors with 4 bits, symmetric, in groups of 32: a matrix
// [n, k] is weight_packed, int32 [n, k / 8] with element 8 i + j in bits 4 j up of integer i, and
// weight_scale [n, k / 32] in a plain dtype; w = scale · (u − 8).
namespace gemloupe {

inline constexpr int64_t kPackQuantizedGroup = 32;

struct PackQuantized {
  const uint8_t* packed = nullptr;  // n · k / 2 bytes
  TensorView scales;                // [n, k / 32]
  bool exact_in_float16 = false;    // every scale is
};

// Whether float16 holds every one of the scales, so that the matrix may become q4_0 or int4.
bool ScalesAreExactInFloat16(const TensorView& scales);

// Rows [begin, end) as q4_0 (the scales must be exact in float16), or as float32.
void PackQuantizedToQ4(const PackQuantized& matrix, int64_t begin, int64_t end, void* dst);
void PackQuantizedToFloat32(const PackQuantized& matrix, int64_t begin, int64_t end, float* dst);

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_PACK_QUANTIZED_H_
