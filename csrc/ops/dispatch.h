#ifndef GEMLOUPE_OPS_DISPATCH_H_
#define GEMLOUPE_OPS_DISPATCH_H_

#include <cstdint>

#include "base/cpu.h"
#include "base/dtype.h"
#include "base/function_ref.h"
#include "base/status.h"
#include "kernels/kernel_table.h"
#include "kernels/quant_table.h"

namespace gemloupe {

// Work below this many bytes of traffic runs on the driving thread: a fork costs more.
inline constexpr int64_t kInlineBytes = 64 * 1024;

// Checks GEMLOUPE_ISA and chooses the kernels; called once before any model is built.
Status InitDispatch();

// The instruction set in use and its kernels. InitDispatch must have succeeded.
Isa ActiveIsa();
const KernelTable& Kernels();
const QuantKernels& QuantKernelsInUse();

// The kernels that read stored elements of a plain `dtype`.
MatmulKernel MatmulKernelFor(DType dtype);
AccumulateKernel AccumulateKernelFor(DType dtype);

// dst[i] = src[i] for i < n, widened to float32; and rounded to a plain `dtype`.
void WidenToFloat(float* dst, const void* src, DType dtype, int64_t n);
void RoundFromFloat(void* dst, const float* src, DType dtype, int64_t n);

// Calls fn(begin, end) over parts of [0, rows), on several threads if rows · bytes_per_row is worth
// a fork.
void ForRows(int64_t rows, int64_t bytes_per_row, FunctionRef<void(int64_t begin, int64_t end)> fn);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_DISPATCH_H_
