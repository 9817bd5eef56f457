#include "formats/safetensors.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

StatusOr<DType> StoredDType(const MappedFile& file, const TensorEntry& entry) {
  if (entry.dtype == "F32") return DType::kFloat32;
  if (entry.dtype == "BF16") return DType::kBfloat16;
  if (entry.dtype == "F16") return DType::kFloat16;
  const StatusOr<DType> dtype = ParseDType(entry.dtype);  // of GGUF and packed files
  if (dtype.ok()) return *dtype;
  return absl::InvalidArgumentError(
      absl::StrCat(file.path(), ": tensor ", entry.name, ": ", dtype.status().message()));
}

}  // namespace

StatusOr<uint64_t> CheckedTensorBytes(DType dtype, const std::vector<int64_t>& shape) {
  // Far above any tensor, and far enough below 2^63 that padding to whole panels can't overflow.
  constexpr int64_t kMostElements = int64_t{1} << 48;
  int64_t elements = 1;
  bool fits = shape.size() <= 8;
  for (const int64_t extent : shape) {
    fits = fits && extent >= 0 && extent <= kMostElements &&
           (extent == 0 || elements <= kMostElements / extent);
    if (fits) elements *= extent;
  }
  // Beside an extent of 0 the others are not limited by their product.
  if (fits && elements == 0) {
    fits = std::all_of(shape.begin(), shape.end(),
                       [](int64_t extent) { return extent <= (int64_t{1} << 28); });
  }
  if (!fits) {
    return absl::InvalidArgumentError(
        absl::StrCat("has the impossible shape ", ShapeString(shape)));
  }
  const int64_t cols = shape.empty() ? 1 : shape.back();
  if (IsBlocked(dtype) && cols % BlockElements(dtype) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("has the shape ", ShapeString(shape),
                                                   "; expected rows of whole ", DTypeName(dtype),
                                                   " blocks of ", BlockElements(dtype)));
  }
  if (elements == 0) return uint64_t{0};
  // Panels of 16 rows and tiles of up to 256 elements make a tiny matrix up to 4096 times as large.
  const int64_t rows = shape.size() > 1 ? shape[shape.size() - 2] : 1;
  const int64_t matrices = elements / (rows * cols);
  const uint64_t matrix = MatrixBytes(dtype, rows, cols);
  if (static_cast<uint64_t>(matrices) > (uint64_t{1} << 60) / matrix) {
    return absl::InvalidArgumentError(
        absl::StrCat("has the impossible shape ", ShapeString(shape)));
  }
  return static_cast<uint64_t>(matrices) * matrix;
}

StatusOr<TensorView> ViewTensor(const MappedFile& file, const TensorEntry& entry) {
  GL_ASSIGN_OR_RETURN(const DType dtype, StoredDType(file, entry));
  const StatusOr<uint64_t> bytes = CheckedTensorBytes(dtype, entry.shape);
  if (!bytes.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": tensor ", entry.name, " ", bytes.status().message()));
  }
  if (entry.begin > entry.end || entry.end > file.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": tensor ", entry.name, " lies at bytes ", entry.begin, " to ",
                     entry.end, ", but the file has ", file.size(),
                     " bytes; it is truncated or damaged: download it again"));
  }
  if (entry.end - entry.begin != *bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        file.path(), ": tensor ", entry.name, " ", entry.dtype, " ", ShapeString(entry.shape),
        " needs ", *bytes, " bytes, the header gives it ", entry.end - entry.begin));
  }
  TensorView view;
  view.data = file.data() + entry.begin;
  view.dtype = dtype;
  view.shape = entry.shape;
  return view;
}

Status CheckNoOverlap(std::string_view path, const std::vector<TensorEntry>& entries) {
  std::vector<const TensorEntry*> by_offset;
  by_offset.reserve(entries.size());
  for (const TensorEntry& entry : entries) {
    if (entry.begin < entry.end) by_offset.push_back(&entry);
  }
  std::sort(by_offset.begin(), by_offset.end(),
            [](const TensorEntry* a, const TensorEntry* b) { return a->begin < b->begin; });
  for (size_t i = 1; i < by_offset.size(); ++i) {
    if (by_offset[i]->begin < by_offset[i - 1]->end) {
      return absl::InvalidArgumentError(absl::StrCat(std::string(path), ": tensors ",
                                                     by_offset[i - 1]->name, " and ",
                                                     by_offset[i]->name, " overlap in the file"));
    }
  }
  return absl::OkStatus();
}

}  // namespace gemloupe
