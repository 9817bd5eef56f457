#ifndef GEMLOUPE_BASE_TENSOR_H_
#define GEMLOUPE_BASE_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace gemloupe {

// A read-only view of a stored tensor, row-major. `data` may be unaligned: it can point anywhere
// into a mapped file.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;

  int64_t size() const;      // elements
  size_t byte_size() const;  // bytes
  // The i-th slice along the first axis.
  TensorView Slice(int64_t i) const;
};

// "[3, 4]", for error messages.
std::string ShapeString(const std::vector<int64_t>& shape);

// Rows of activations: [rows, cols] with `stride` elements from row to row. Owns nothing.
template <typename T>
struct MatrixView {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  MatrixView() = default;
  MatrixView(T* data_in, int64_t rows_in, int64_t cols_in)
      : MatrixView(data_in, rows_in, cols_in, cols_in) {}
  MatrixView(T* data_in, int64_t rows_in, int64_t cols_in, int64_t stride_in)
      : data(data_in), rows(rows_in), cols(cols_in), stride(stride_in) {}
  // A mutable view serves where a read-only one is asked for.
  operator MatrixView<const T>() const {  // NOLINT(google-explicit-constructor)
    return MatrixView<const T>(data, rows, cols, stride);
  }

  T* row(int64_t i) const { return data + i * stride; }
  MatrixView RowRange(int64_t begin, int64_t count) const {
    return MatrixView(data + begin * stride, count, cols, stride);
  }
};

using Matrix = MatrixView<float>;
using ConstMatrix = MatrixView<const float>;

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_TENSOR_H_
