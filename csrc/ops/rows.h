#ifndef GEMLOUPE_OPS_ROWS_H_
#define GEMLOUPE_OPS_ROWS_H_

#include <cstdint>

#include "base/tensor.h"

namespace gemloupe {

// Row-wise operations on activations [T, …]; each splits the rows over threads when that pays.

// dst = src · (mean(src²) + eps)^-½ · weight over groups of `width` columns (a row may hold several:
// heads). weight [width], or null: without it. dst may be src.
void RmsNorm(ConstMatrix src, const float* weight, int64_t width, float eps, Matrix dst);

// dst = (src − mean) · (variance + eps)^-½ · weight + bias over whole rows; weight and bias [cols].
void LayerNorm(ConstMatrix src, const float* weight, const float* bias, float eps, Matrix dst);

// dst = gelu_tanh(gate) · up, all [T, F].
void GeluMul(ConstMatrix gate, ConstMatrix up, Matrix dst);

// dst = x · sigmoid(gate), all [T, F]; silu(x) where gate is x.
void SigmoidMul(ConstMatrix x, ConstMatrix gate, Matrix dst);

// dst += src · factor.
void AddScaled(ConstMatrix src, float factor, Matrix dst);

// dst = a + b; dst = src · factor; dst = a · b.
void Add(ConstMatrix a, ConstMatrix b, Matrix dst);
void Scale(ConstMatrix src, float factor, Matrix dst);

// dst = src clamped to [low, high].
void Clamp(ConstMatrix src, float low, float high, Matrix dst);

// x = cap · tanh(x / cap).
void Softcap(float cap, Matrix x);

// Each row of src becomes its softmax in dst.
void Softmax(ConstMatrix src, Matrix dst);

void CopyRows(ConstMatrix src, Matrix dst);

// dst [T, cols] = float(table[ids[t], column : column + cols]) · factor, from stored rows.
void GatherRows(const TensorView& table, const int32_t* ids, int64_t column, float factor,
                Matrix dst);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_ROWS_H_
