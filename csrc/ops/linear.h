#ifndef GEMLOUPE_OPS_LINEAR_H_
#define GEMLOUPE_OPS_LINEAR_H_

#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"
#include "kernels/quant_table.h"

namespace gemloupe {

// How a matrix product may be computed.
struct MatmulPath {
  // A row's bits must depend on neither the other rows nor the threads: our kernels only.
  bool row_exact = false;
  // Activations may be rounded to bfloat16 where the CPU multiplies bfloat16 and rows are many.
  bool bfloat16 = false;
  // Products with quantised weights read float32 activations, not int8 ones.
  bool float32_activations = false;
  // The last rows are computed as a product of their own: hooks make a pass compute rows that it
  // would otherwise leave out, which must change no bit of the rows that it would not.
  int64_t tail_rows = 0;
};

enum class Engine {
  kKernels,         // our float kernels, up to kMaxKernelRows rows at a time
  kOnednnFloat32,   // oneDNN on panels widened to float32
  kOnednnBfloat16,  // oneDNN on bfloat16 weights and activations
  kQuantized,       // packed weights times int8 activations
  kPanelsFloat32,   // packed weights, unpacked to float32 panel by panel
};
Engine ChooseEngine(int64_t rows, DType dtype, const MatmulPath& path);

// The left side of one or more products, in the forms that their engines read. Forms are made on the
// driving thread, before the products are split over threads.
class LinearInput {
 public:
  // Memory comes from `arena`.
  LinearInput(ConstMatrix src, Arena& arena) : src_(src), arena_(&arena) {}

  // Makes the form that `engine` reads; quantised rows in groups of `width` (quant_table.h).
  void Prepare(Engine engine, int64_t width = 1);
  ConstMatrix src() const { return src_; }
  const QuantizedRows& quantized(int64_t width = 1) const;
  MatrixView<const uint16_t> bfloat16() const { return bfloat16_; }

 private:
  ConstMatrix src_;
  Arena* arena_;
  std::vector<QuantizedRows> quantized_;  // of different widths
  MatrixView<const uint16_t> bfloat16_;
};

// One product of a group that shares its left side: dst [T, n] = src [T, k] · weight[first : first + n]ᵀ.
struct LinearJob {
  const TensorView* weight;
  Matrix dst;
  int64_t first = 0;
};

// Computes every job in one fork of the pool. An empty weight is a mistake of the caller.
Status Linear(ConstMatrix src, std::span<const LinearJob> jobs, const MatmulPath& path,
              Arena& arena);
inline Status Linear(ConstMatrix src, std::initializer_list<LinearJob> jobs, const MatmulPath& path,
                     Arena& arena) {
  return Linear(src, std::span<const LinearJob>(jobs.begin(), jobs.size()), path, arena);
}

// dst [T, n] = src [T, k] · weight [n, k]ᵀ in float32 by our kernels, with any strides, on the calling
// thread alone: for products of activations.
void LinearAlone(ConstMatrix src, ConstMatrix weight, Matrix dst);

// dst [rows.size(), end − begin] = input[rows] · weight[begin:end]ᵀ on the calling thread alone, for
// callers that split the work themselves (experts). The input was prepared, with width 1, for the
// engine that ChooseEngine gives for this number of rows.
Status LinearSlice(const LinearInput& input, std::span<const int64_t> rows,
                   const TensorView& weight, int64_t begin, int64_t end, Matrix dst,
                   const MatmulPath& path);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_LINEAR_H_
