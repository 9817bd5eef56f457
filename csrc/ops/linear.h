#ifndef GEMLOUPE_OPS_LINEAR_H_
#define GEMLOUPE_OPS_LINEAR_H_

#include <initializer_list>
#include <span>

#include "base/status.h"
#include "base/tensor.h"

namespace gemloupe {

// How a matrix product may be computed.
enum class MatmulPath {
  // Our kernels only: a row's bits depend on neither the other rows nor the threads.
  kRowExact,
  // More than kMaxKernelRows rows may go to oneDNN in float32.
  kFloat32,
  // As kFloat32; bfloat16 weights may meet activations rounded to bfloat16, if the CPU has bf16.
  kBfloat16,
};

// One product of a group that shares its left side: dst [T, n] = src [T, k] · weight [n, k]ᵀ.
struct LinearJob {
  const TensorView* weight;
  Matrix dst;
};

// Computes every job in one fork of the pool. An empty weight is a mistake of the caller.
Status Linear(ConstMatrix src, std::span<const LinearJob> jobs, MatmulPath path);
inline Status Linear(ConstMatrix src, std::initializer_list<LinearJob> jobs, MatmulPath path) {
  return Linear(src, std::span<const LinearJob>(jobs.begin(), jobs.size()), path);
}

// dst [T, end − begin] = src · weight[begin:end]ᵀ on the calling thread alone, for callers that split
// the outputs over threads themselves (experts).
Status LinearSlice(ConstMatrix src, const TensorView& weight, int64_t begin, int64_t end,
                   Matrix dst, MatmulPath path);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_LINEAR_H_
