#include "base/tensor.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace gemloupe {

int64_t TensorView::size() const {
  int64_t count = 1;
  for (int64_t dim : shape) count *= dim;
  return count;
}

size_t TensorView::byte_size() const { return TensorBytes(dtype, shape); }

TensorView TensorView::Slice(int64_t i) const {
  GL_CHECK(!shape.empty() && i >= 0 && i < shape[0]);
  TensorView slice{nullptr, dtype, std::vector<int64_t>(shape.begin() + 1, shape.end())};
  slice.data = static_cast<const uint8_t*>(data) + static_cast<size_t>(i) * slice.byte_size();
  return slice;
}

std::string ShapeString(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

}  // namespace gemloupe
