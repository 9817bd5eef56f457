#include "formats/safetensors.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

StatusOr<DType> StoredDType(const MappedFile& file, const TensorEntry& entry) {
  if (entry.dtype == "F32") return DType::kFloat32;
  if (entry.dtype == "BF16") return DType::kBfloat16;
  if (entry.dtype == "F16") return DType::kFloat16;
  return absl::InvalidArgumentError(absl::StrCat(file.path(), ": tensor ", entry.name,
                                                 " has dtype ", entry.dtype,
                                                 ", expected F32, BF16 or F16"));
}

}  // namespace

StatusOr<TensorView> ViewTensor(const MappedFile& file, const TensorEntry& entry) {
  GL_ASSIGN_OR_RETURN(const DType dtype, StoredDType(file, entry));
  constexpr uint64_t kMostBytes = std::numeric_limits<int64_t>::max();
  uint64_t bytes = DTypeSize(dtype);
  for (const int64_t extent : entry.shape) {
    if (extent < 0 || (extent > 0 && bytes > kMostBytes / static_cast<uint64_t>(extent))) {
      return absl::InvalidArgumentError(absl::StrCat(file.path(), ": tensor ", entry.name,
                                                     " has the impossible shape ",
                                                     ShapeString(entry.shape)));
    }
    bytes *= static_cast<uint64_t>(extent);
  }
  if (entry.begin > entry.end || entry.end > file.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": tensor ", entry.name, " lies at bytes ", entry.begin, " to ",
                     entry.end, ", but the file has ", file.size(),
                     " bytes; it is truncated or damaged: download it again"));
  }
  if (entry.end - entry.begin != bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        file.path(), ": tensor ", entry.name, " ", entry.dtype, " ", ShapeString(entry.shape),
        " needs ", bytes, " bytes, the header gives it ", entry.end - entry.begin));
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
