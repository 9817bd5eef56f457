#include "formats/weight_store.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "ops/dispatch.h"

namespace gemloupe {

Status WeightStore::AddFile(std::string_view path, const std::vector<TensorEntry>& entries) {
  GL_ASSIGN_OR_RETURN(std::shared_ptr<const MappedFile> file, MappedFile::Open(path));
  GL_RETURN_IF_ERROR(CheckNoOverlap(path, entries));
  for (const TensorEntry& entry : entries) {
    GL_ASSIGN_OR_RETURN(TensorView view, ViewTensor(*file, entry));
    const auto [it, inserted] =
        tensors_.try_emplace(entry.name, Tensor{std::move(view), std::string(path)});
    if (!inserted) {
      return absl::AlreadyExistsError(absl::StrCat("tensor ", entry.name, " is in ",
                                                   it->second.path, " and again in ",
                                                   std::string(path), "; expected it once"));
    }
  }
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

void WeightStore::AddView(std::string_view name, const TensorView& view) {
  tensors_[std::string(name)] = Tensor{view, "memory"};
}

StatusOr<TensorView> WeightStore::Take(std::string_view name, const std::vector<int64_t>& shape) {
  const auto it = tensors_.find(std::string(name));
  if (it == tensors_.end()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", std::string(name), " ", ShapeString(shape), " is missing from the checkpoint"));
  }
  const Tensor& tensor = it->second;
  if (tensor.view.shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat(tensor.path, ": tensor ", std::string(name),
                                                   " has shape ", ShapeString(tensor.view.shape),
                                                   ", expected ", ShapeString(shape)));
  }
  mapped_bytes_ += tensor.view.byte_size();
  return tensor.view;
}

StatusOr<TensorView> WeightStore::TakeBfloat16(std::string_view name,
                                               const std::vector<int64_t>& shape) {
  GL_ASSIGN_OR_RETURN(TensorView view, Take(name, shape));
  if (view.dtype == DType::kBfloat16) return view;
  AlignedBuffer copy(static_cast<size_t>(view.size()) * sizeof(uint16_t));
  const int64_t width = shape.empty() ? 1 : shape.back();
  const auto stored_row = width * static_cast<int64_t>(DTypeSize(view.dtype));
  auto* rounded = reinterpret_cast<uint16_t*>(copy.data());
  const auto* stored = static_cast<const uint8_t*>(view.data);
  ForRows(width == 0 ? 0 : view.size() / width, stored_row, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(width));
    for (int64_t i = begin; i < end; ++i) {
      WidenToFloat(row.data(), stored + i * stored_row, view.dtype, width);
      RoundFromFloat(rounded + i * width, row.data(), DType::kBfloat16, width);
    }
  });
  mapped_bytes_ -= view.byte_size();
  copied_bytes_ += copy.size();
  view.data = copy.data();
  view.dtype = DType::kBfloat16;
  copies_.push_back(std::move(copy));
  return view;
}

StatusOr<std::vector<float>> WeightStore::TakeFloats(std::string_view name, int64_t size) {
  GL_ASSIGN_OR_RETURN(const TensorView view, Take(name, {size}));
  std::vector<float> values(static_cast<size_t>(size));
  WidenToFloat(values.data(), view.data, view.dtype, size);
  return values;
}

}  // namespace gemloupe
