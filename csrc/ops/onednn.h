#ifndef GEMLOUPE_OPS_ONEDNN_H_
#define GEMLOUPE_OPS_ONEDNN_H_

#include <cstdint>
#include <string>

#include "base/status.h"
#include "base/tensor.h"

namespace gemloupe {

// The only door to oneDNN. Every call computes on the calling thread alone (one OpenMP thread): the
// pool's workers call it side by side, each on its own slice of the outputs.

// dst [m, n] = src [m, k] · weight [n, k]ᵀ, all float32, any strides ≥ the row lengths.
Status OnednnMatmulF32(ConstMatrix src, ConstMatrix weight, Matrix dst);

// dst [m, n] = src [m, k] · right [k, n]: a tenth faster than with a weight's rows.
Status OnednnMatmulColumnsF32(ConstMatrix src, ConstMatrix right, Matrix dst);

// OnednnMatmulF32 with src rounded to bfloat16 bits by the caller and bfloat16 weights; accumulates and
// writes float32. Slow (emulated) where the CPU lacks avx512_bf16 and AMX.
Status OnednnMatmulBf16(MatrixView<const uint16_t> src, MatrixView<const uint16_t> weight,
                        Matrix dst);

// "3.2.0 (…)": the version of the library in use.
std::string OnednnVersion();

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_ONEDNN_H_
