#ifndef GEMLOUPE_FORMATS_SAFETENSORS_H_
#define GEMLOUPE_FORMATS_SAFETENSORS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapped_file.h"
#include "base/status.h"
#include "base/tensor.h"

namespace gemloupe {

// One row of a safetensors header, as Python parsed it, or of another file's table. Offsets count from the start of the file.
struct TensorEntry {
  std::string name;
  std::string dtype;  // "F32", "BF16", "F16", or a DTypeName
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

// TensorBytes of a shape that a stranger wrote. InvalidArgument ("has …") where it is negative, or too
// large for any file, or where rows are no whole blocks of a blocked dtype.
StatusOr<uint64_t> CheckedTensorBytes(DType dtype, const std::vector<int64_t>& shape);

// The view of `entry` into `file`. Trusts nothing: InvalidArgument, naming file and tensor, for a
// negative or overflowing shape, a dtype that is not weights, bounds outside the file, or a length
// that does not fit the shape.
StatusOr<TensorView> ViewTensor(const MappedFile& file, const TensorEntry& entry);

// InvalidArgument if two entries of one file overlap.
Status CheckNoOverlap(std::string_view path, const std::vector<TensorEntry>& entries);

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_SAFETENSORS_H_
