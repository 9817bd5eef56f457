#ifndef GEMLOUPE_OPS_CONVERT_H_
#define GEMLOUPE_OPS_CONVERT_H_

#include <cstdint>

#include "base/status.h"
#include "base/tensor.h"

namespace gemloupe {

// Reads rows [begin, end) of a matrix stored in any dtype as float32 [end − begin, cols]; exact.
// Blocked dtypes give the values of the `gguf` package's dequantize, bit for bit.
void ReadRows(const TensorView& matrix, int64_t begin, int64_t end, float* dst);
// Elements [begin, begin + count) of one row.
void ReadRowPart(const TensorView& matrix, int64_t row, int64_t begin, int64_t count, float* dst);

// The index of a packed dtype in the tables of kernels/quant_table.h.
int PackedFormat(DType dtype);
// The panel of a packed matrix that holds `row`.
const uint8_t* PanelData(const TensorView& matrix, int64_t row);

// Stores rows [begin, end) of the matrix `src` in `dtype` at dst (MatrixBytes(dtype, end − begin,
// cols) bytes), on the threads of the current pass. With a packed dtype, `begin` is a multiple of
// 16, and so is `end` unless it is the last row, so that parts may follow one another.
//
// Same dtype: copied. q4_0 → int4, q8_0 → int8, q4_k → int4_k, q5_k → int5_k, q6_k → int6_k: the same
// values in the other order. To float16 and bfloat16: rounded to nearest. To q4_0 and int4, int6, q8_0
// and int8: quantised in groups of 32 with the scale of least squared error, or exactly where the
// group lies on a lattice (every weight d · u with whole u in range). Anything else: Unimplemented.
Status ConvertRows(const TensorView& src, int64_t begin, int64_t end, DType dtype, void* dst);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_CONVERT_H_
