#include "formats/weight_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/packed_layout.h"
#include "ops/convert.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

// Source bytes of one part: enough to keep every thread busy, few beside any model.
constexpr int64_t kPartBytes = int64_t{32} << 20;
constexpr size_t kPackedAlignment = 64;

int64_t Cols(const std::vector<int64_t>& shape) { return shape.empty() ? 1 : shape.back(); }
int64_t Rows(const std::vector<int64_t>& shape) {
  return shape.size() > 1 ? shape[shape.size() - 2] : 1;
}
int64_t Matrices(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) count *= shape[i];
  return count;
}

// Bytes of a row, averaged over the panel where rows are stored in panels.
int64_t RowBytes(DType dtype, int64_t cols) {
  return static_cast<int64_t>(MatrixBytes(dtype, kPanelRows, cols)) / kPanelRows;
}

bool IsAligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kPackedAlignment == 0;
}

// ConvertRows, and to float32 from any dtype.
Status ConvertMatrixRows(const TensorView& matrix, int64_t begin, int64_t end, DType dtype,
                         void* dst) {
  if (dtype != DType::kFloat32 || matrix.dtype == DType::kFloat32) {
    return ConvertRows(matrix, begin, end, dtype, dst);
  }
  const int64_t cols = matrix.shape[1];
  ForRows(end - begin, cols * 4, [&](int64_t first, int64_t last) {
    gemloupe::ReadRows(matrix, begin + first, begin + last,
                       static_cast<float*>(dst) + first * cols);
  });
  return absl::OkStatus();
}

Status Missing(std::string_view name, const std::string& shape) {
  return absl::InvalidArgumentError(
      absl::StrCat("tensor ", std::string(name), shape, " is missing from the checkpoint"));
}

}  // namespace

StatusOr<std::shared_ptr<const MappedFile>> WeightStore::Open(std::string_view path) {
  std::shared_ptr<const MappedFile>& file = files_[std::string(path)];
  if (file == nullptr) {
    StatusOr<std::shared_ptr<const MappedFile>> opened = MappedFile::Open(path);
    if (!opened.ok()) {
      files_.erase(std::string(path));
      return opened.status();
    }
    file = *std::move(opened);
  }
  return file;
}

Status WeightStore::AddFile(std::string_view path, const std::vector<TensorEntry>& entries) {
  GL_ASSIGN_OR_RETURN(std::shared_ptr<const MappedFile> file, Open(path));
  GL_RETURN_IF_ERROR(CheckNoOverlap(path, entries));
  bool packed = false;
  for (const TensorEntry& entry : entries) {
    GL_ASSIGN_OR_RETURN(TensorView view, ViewTensor(*file, entry));
    packed = packed || IsPacked(view.dtype);
    Tensor tensor;
    tensor.view = std::move(view);
    tensor.file = file;
    tensor.path = std::string(path);
    const auto [it, inserted] = tensors_.try_emplace(entry.name, std::move(tensor));
    if (!inserted) {
      return absl::AlreadyExistsError(absl::StrCat("tensor ", entry.name, " is in ",
                                                   it->second.path, " and again in ",
                                                   std::string(path), "; expected it once"));
    }
  }
  // All of it: a vector left out between two matrices would keep the pages around it small.
  if (packed) file->ExpectWhole(file->data(), file->size());
  return absl::OkStatus();
}

Status WeightStore::AddPackQuantized(std::string_view name, const std::vector<int64_t>& shape,
                                     std::string_view packed_path, const TensorEntry& packed,
                                     std::string_view scales_path, const TensorEntry& scales) {
  const auto refuse = [&](std::string_view path, std::string_view what) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(path), ": tensor ", std::string(name), " ", std::string(what)));
  };
  if (shape.size() != 2 || shape[1] % kPackQuantizedGroup != 0) {
    return refuse(packed_path,
                  absl::StrCat("has the shape ", ShapeString(shape),
                               "; expected rows of whole groups of ", kPackQuantizedGroup));
  }
  Tensor tensor;
  tensor.path = std::string(packed_path);
  tensor.view.shape = shape;
  tensor.view.dtype = DType::kInt4;
  GL_ASSIGN_OR_RETURN(tensor.file, Open(packed_path));
  GL_ASSIGN_OR_RETURN(tensor.scales_file, Open(scales_path));
  // The integers are looked at as that many float32 values; only their bytes are read.
  TensorEntry integers = packed;
  integers.dtype = "F32";
  GL_ASSIGN_OR_RETURN(const TensorView packed_view, ViewTensor(*tensor.file, integers));
  GL_ASSIGN_OR_RETURN(TensorView scales_view, ViewTensor(*tensor.scales_file, scales));
  const std::vector<int64_t> packed_shape = {shape[0], shape[1] / 8};
  const std::vector<int64_t> scales_shape = {shape[0], shape[1] / kPackQuantizedGroup};
  if (packed_view.shape != packed_shape) {
    return refuse(packed_path, absl::StrCat("is packed in ", ShapeString(packed_view.shape),
                                            " integers, expected ", ShapeString(packed_shape)));
  }
  if (scales_view.shape != scales_shape || !IsPlain(scales_view.dtype)) {
    return refuse(scales_path, absl::StrCat("has scales ", DTypeName(scales_view.dtype), " ",
                                            ShapeString(scales_view.shape), ", expected plain ",
                                            ShapeString(scales_shape)));
  }
  tensor.quantized =
      PackQuantized{static_cast<const uint8_t*>(packed_view.data), std::move(scales_view), false};
  if (!tensors_.try_emplace(std::string(name), std::move(tensor)).second) {
    return absl::AlreadyExistsError(
        absl::StrCat("tensor ", std::string(name), " is given twice; expected it once"));
  }
  return absl::OkStatus();
}

Status WeightStore::AddValues(std::string_view name, const std::vector<int64_t>& shape,
                              const float* values) {
  Tensor tensor;
  tensor.path = "memory";
  tensor.view = {nullptr, DType::kFloat32, shape};
  const size_t bytes = tensor.view.byte_size();
  uint8_t* copy = NewCopy(bytes);
  std::memcpy(copy, values, bytes);
  tensor.view.data = copy;
  copied_bytes_ += bytes;
  if (!tensors_.try_emplace(std::string(name), std::move(tensor)).second) {
    return absl::AlreadyExistsError(
        absl::StrCat("tensor ", std::string(name), " is given twice; expected it once"));
  }
  return absl::OkStatus();
}

WeightStore WeightStore::Borrow() const {
  WeightStore borrowed;
  borrowed.tensors_ = tensors_;
  return borrowed;
}

Status WeightStore::Replace(std::string_view name, const TensorView& values, DType dtype) {
  GL_ASSIGN_OR_RETURN(Tensor * tensor, Find(name, values.shape));
  *tensor = Tensor();
  tensor->path = "memory";
  tensor->view = values;
  if (dtype != values.dtype && values.shape.size() > 1) {
    tensor->target = dtype;
    return absl::OkStatus();
  }
  const size_t bytes = values.byte_size();
  uint8_t* copy = NewCopy(bytes);
  std::memcpy(copy, values.data, bytes);
  tensor->view.data = copy;
  copied_bytes_ += bytes;
  return absl::OkStatus();
}

void WeightStore::AddView(std::string_view name, const TensorView& view) {
  Tensor tensor;
  tensor.view = view;
  tensor.path = "memory";
  tensors_[std::string(name)] = std::move(tensor);
}

Status WeightStore::SetTarget(std::string_view name, DType dtype) {
  const auto it = tensors_.find(std::string(name));
  if (it == tensors_.end()) return Missing(name, "");
  it->second.target = dtype;
  return absl::OkStatus();
}

void WeightStore::SetProgress(ProgressFn progress) {
  progress_ = std::move(progress);
  bytes_to_convert_ = converted_bytes_ = 0;
  for (const auto& [name, tensor] : tensors_) {
    const bool resident = resident_ && tensor.view.shape.size() > 1;
    if (MustCopy(tensor, resident)) bytes_to_convert_ += tensor.view.byte_size();
  }
}

StatusOr<WeightStore::Tensor*> WeightStore::Find(std::string_view name,
                                                 const std::vector<int64_t>& shape) {
  const auto it = tensors_.find(std::string(name));
  if (it == tensors_.end()) return Missing(name, absl::StrCat(" ", ShapeString(shape)));
  if (it->second.view.shape != shape) {
    return absl::InvalidArgumentError(
        absl::StrCat(it->second.path, ": tensor ", std::string(name), " has shape ",
                     ShapeString(it->second.view.shape), ", expected ", ShapeString(shape)));
  }
  return &it->second;
}

StatusOr<TensorView> WeightStore::Find(std::string_view name) const {
  const auto it = tensors_.find(std::string(name));
  if (it == tensors_.end()) return Missing(name, "");
  if (it->second.quantized.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", std::string(name), " was not loaded"));
  }
  return it->second.view;
}

StatusOr<std::vector<float>> WeightStore::ReadRows(std::string_view name,
                                                   const std::vector<int64_t>& ids) const {
  GL_ASSIGN_OR_RETURN(const TensorView view, Find(name));
  const int64_t rows = Rows(view.shape), cols = Cols(view.shape);
  const size_t matrix_bytes = MatrixBytes(view.dtype, rows, cols);
  std::vector<float> values(ids.size() * static_cast<size_t>(cols));
  float* dst = values.data();
  for (size_t i = 0; i < ids.size();) {
    if (ids[i] < 0 || ids[i] >= rows * Matrices(view.shape)) {
      return absl::OutOfRangeError(absl::StrCat(
          "row ", ids[i], " of tensor ", std::string(name), " ", ShapeString(view.shape),
          " is not one of its rows, 0 to ", rows * Matrices(view.shape) - 1));
    }
    // Neighbours of one matrix in one go.
    const int64_t matrix = ids[i] / rows, begin = ids[i] % rows;
    int64_t count = 1;
    while (i + static_cast<size_t>(count) < ids.size() && begin + count < rows &&
           ids[i + static_cast<size_t>(count)] == ids[i] + count) {
      ++count;
    }
    const TensorView one{
        static_cast<const uint8_t*>(view.data) + static_cast<size_t>(matrix) * matrix_bytes,
        view.dtype,
        {rows, cols}};
    gemloupe::ReadRows(one, begin, begin + count, dst);
    dst += count * cols;
    i += static_cast<size_t>(count);
  }
  return values;
}

bool WeightStore::MustCopy(const Tensor& tensor, bool resident) {
  const TensorView& view = tensor.view;
  return resident || tensor.quantized.has_value() ||
         tensor.target.value_or(view.dtype) != view.dtype ||
         (IsPacked(view.dtype) && !IsAligned(view.data));
}

DType WeightStore::Resolve(Tensor& tensor) {
  if (!tensor.quantized.has_value()) return tensor.target.value_or(tensor.view.dtype);
  PackQuantized& quantized = *tensor.quantized;
  if (!tensor.resolved) quantized.exact_in_float16 = ScalesAreExactInFloat16(quantized.scales);
  tensor.resolved = true;
  const DType wanted = tensor.target.value_or(DType::kInt4);
  const bool loses = wanted == DType::kInt4 || wanted == DType::kQ4_0;
  return loses && !quantized.exact_in_float16 ? DType::kFloat32 : wanted;
}

StatusOr<DType> WeightStore::ResolvedDType(std::string_view name) {
  const auto it = tensors_.find(std::string(name));
  if (it == tensors_.end()) return Missing(name, "");
  return Resolve(it->second);
}

StatusOr<std::vector<int64_t>> WeightStore::ShapeOf(std::string_view name) const {
  const auto it = tensors_.find(std::string(name));
  if (it == tensors_.end()) return Missing(name, "");
  return it->second.view.shape;
}

StatusOr<TensorView> WeightStore::Take(std::string_view name, const std::vector<int64_t>& shape) {
  GL_ASSIGN_OR_RETURN(Tensor * tensor, Find(name, shape));
  if (MustCopy(*tensor, resident_)) return TakeCopy(*tensor);
  const TensorView& view = tensor->view;
  mapped_bytes_ += view.byte_size();
  return view;
}

StatusOr<RowTable> WeightStore::TakeTable(std::string_view name,
                                          const std::vector<int64_t>& shape) {
  GL_ASSIGN_OR_RETURN(Tensor * tensor, Find(name, shape));
  if (MustCopy(*tensor, false)) {
    GL_ASSIGN_OR_RETURN(TensorView copy, TakeCopy(*tensor));
    return RowTable(std::move(copy), nullptr);
  }
  return RowTable(tensor->view, tensor->file);
}

StatusOr<WeightStore::FilePart> WeightStore::TakeInFile(std::string_view name,
                                                        const std::vector<int64_t>& shape) {
  GL_ASSIGN_OR_RETURN(Tensor * tensor, Find(name, shape));
  if (tensor->file == nullptr || MustCopy(*tensor, false)) {
    return absl::FailedPreconditionError(absl::StrCat(
        tensor->path, ": tensor ", std::string(name), " is stored as ",
        DTypeName(tensor->view.dtype),
        " and would have to be converted; only a checkpoint that is stored in the wanted dtype can "
        "stay on disk: convert it first"));
  }
  return FilePart{tensor->view, tensor->file};
}

StatusOr<std::vector<float>> WeightStore::TakeFloats(std::string_view name, int64_t size) {
  GL_ASSIGN_OR_RETURN(const Tensor* tensor, Find(name, {size}));
  if (!IsPlain(tensor->view.dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(
        tensor->path, ": tensor ", std::string(name), " is ", DTypeName(tensor->view.dtype),
        ", expected float32, bfloat16 or float16: it is a vector"));
  }
  std::vector<float> values(static_cast<size_t>(size));
  WidenToFloat(values.data(), tensor->view.data, tensor->view.dtype, size);
  return values;
}

// Tensors lie side by side in large buffers: one of 2 MiB pages for each would waste a page a tensor. The
// part of a buffer that no tensor fits in is never touched, so it is no memory.
uint8_t* WeightStore::NewCopy(size_t bytes) {
  constexpr size_t kBuffer = size_t{256} << 20;
  const size_t needed = (bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
  if (copies_.empty() || copies_.back().size() - copy_used_ < needed) {
    copies_.emplace_back(std::max(kBuffer, needed));
    copy_used_ = 0;
  }
  uint8_t* at = copies_.back().data() + copy_used_;
  copy_used_ += needed;
  return at;
}

StatusOr<TensorView> WeightStore::TakeCopy(Tensor& tensor) {
  const DType dtype = Resolve(tensor);
  TensorView view{nullptr, dtype, tensor.view.shape};
  uint8_t* copy = NewCopy(view.byte_size());
  GL_RETURN_IF_ERROR(ForParts(tensor, dtype, [&](const Part& part) {
    return ConvertPart(tensor, part, dtype, copy + part.offset);
  }));
  view.data = copy;
  copied_bytes_ += view.byte_size();
  tensor.view = view;
  tensor.target.reset();
  tensor.quantized.reset();
  tensor.file.reset();
  tensor.scales_file.reset();
  return view;
}

Status WeightStore::Stream(std::string_view name,
                           FunctionRef<Status(const uint8_t* data, size_t bytes)> sink) {
  const auto it = tensors_.find(std::string(name));
  if (it == tensors_.end()) return Missing(name, "");
  Tensor& tensor = it->second;
  const DType dtype = Resolve(tensor);
  AlignedBuffer buffer;
  return ForParts(tensor, dtype, [&](const Part& part) -> Status {
    if (buffer.size() < part.bytes) buffer = AlignedBuffer(part.bytes);
    GL_RETURN_IF_ERROR(ConvertPart(tensor, part, dtype, buffer.data()));
    return sink(buffer.data(), part.bytes);
  });
}

// Calls fn for the tensor's parts in order; then drops their source pages and tells the progress.
Status WeightStore::ForParts(const Tensor& tensor, DType dtype,
                             FunctionRef<Status(const Part&)> fn) {
  const std::vector<int64_t>& shape = tensor.view.shape;
  const int64_t rows = Rows(shape), cols = Cols(shape);
  const bool quantized = tensor.quantized.has_value();
  const uint8_t* source =
      quantized ? tensor.quantized->packed : static_cast<const uint8_t*>(tensor.view.data);
  const DType stored = tensor.view.dtype;
  // A quantized tensor's view only tells its shape: 16 rows of packed integers are 8 bytes a column.
  const auto stored_bytes = [&](int64_t count) {
    return quantized ? static_cast<size_t>(count * cols / 2) : MatrixBytes(stored, count, cols);
  };
  const int64_t widest = std::max(RowBytes(stored, cols), RowBytes(dtype, cols));
  const int64_t step = std::max<int64_t>(
      kPanelRows, kPartBytes / std::max<int64_t>(widest, 1) / kPanelRows * kPanelRows);
  Part part;
  for (int64_t matrix = 0; matrix < Matrices(shape); ++matrix) {
    part.matrix = {source, stored, {rows, cols}};
    for (part.begin = 0; part.begin < rows; part.begin += step) {
      part.end = std::min(rows, part.begin + step);
      part.bytes = MatrixBytes(dtype, part.end - part.begin, cols);
      const uint8_t* begin = source + stored_bytes(part.begin);
      const size_t bytes = stored_bytes(part.end - part.begin);
      if (tensor.file != nullptr) tensor.file->Prefetch(begin, 2 * bytes);
      GL_RETURN_IF_ERROR(fn(part));
      part.offset += part.bytes;
      if (tensor.file != nullptr) tensor.file->Drop(begin, bytes);
      converted_bytes_ += bytes;
      const double total = static_cast<double>(std::max(bytes_to_convert_, converted_bytes_));
      if (progress_ && !progress_(static_cast<double>(converted_bytes_) / total)) {
        return absl::CancelledError("converting was interrupted");
      }
    }
    source += stored_bytes(rows);
  }
  if (tensor.scales_file != nullptr) {
    const TensorView& scales = tensor.quantized->scales;
    tensor.scales_file->Drop(scales.data, scales.byte_size());
  }
  return absl::OkStatus();
}

Status WeightStore::ConvertPart(const Tensor& tensor, const Part& part, DType dtype,
                                void* dst) const {
  if (part.bytes == 0) return absl::OkStatus();
  if (!tensor.quantized.has_value())
    return ConvertMatrixRows(part.matrix, part.begin, part.end, dtype, dst);
  const PackQuantized& quantized = *tensor.quantized;
  const int64_t rows = part.end - part.begin, cols = part.matrix.shape[1];
  const bool in_blocks = dtype == DType::kInt4 || dtype == DType::kQ4_0;
  TensorView unpacked{nullptr, in_blocks ? DType::kQ4_0 : DType::kFloat32, {rows, cols}};
  AlignedBuffer buffer(unpacked.byte_size());
  unpacked.data = buffer.data();
  if (in_blocks) {
    PackQuantizedToQ4(quantized, part.begin, part.end, buffer.data());
  } else {
    PackQuantizedToFloat32(quantized, part.begin, part.end,
                           reinterpret_cast<float*>(buffer.data()));
  }
  return ConvertMatrixRows(unpacked, 0, rows, dtype, dst);
}

}  // namespace gemloupe
