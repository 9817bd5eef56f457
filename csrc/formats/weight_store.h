#ifndef GEMLOUPE_FORMATS_WEIGHT_STORE_H_
#define GEMLOUPE_FORMATS_WEIGHT_STORE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/function_ref.h"
#include "base/mapped_file.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"
#include "formats/pack_quantized.h"
#include "formats/row_table.h"
#include "formats/safetensors.h"

namespace gemloupe {

// Called now and then during long work, with the fraction done; false stops it.
using ProgressFn = std::function<bool(double)>;

// The named tensors of a checkpoint: views into mapped files, and what had to be converted. Views
// are valid as long as the store lives.
class WeightStore {
 public:
  // Maps a file and adds the entries under their names. AlreadyExists for a name that is there.
  Status AddFile(std::string_view path, const std::vector<TensorEntry>& entries);
  // Adds the matrix [n, k] that compressed-tensors stores in two tensors, maybe of two files:
  // `packed` (int32 [n, k / 8]) and `scales` ([n, k / 32], plain).
  Status AddPackQuantized(std::string_view name, const std::vector<int64_t>& shape,
                          std::string_view packed_path, const TensorEntry& packed,
                          std::string_view scales_path, const TensorEntry& scales);
  // Adds float32 values, which are copied. AlreadyExists for a name that is there.
  Status AddValues(std::string_view name, const std::vector<int64_t>& shape, const float* values);
  // A store of the same tensors, as they were taken; it reads this one's memory.
  WeightStore Borrow() const;
  // Gives the tensor `name` other values, which are copied, or converted when they are taken as
  // `dtype`: until then the caller keeps them. InvalidArgument for a name or shape that is not there.
  Status Replace(std::string_view name, const TensorView& values, DType dtype);
  // Adds a tensor whose memory the caller keeps (models built in tests).
  void AddView(std::string_view name, const TensorView& view);

  // The dtype in which Take gives the tensor; without one, as it is stored. Say so before taking it.
  Status SetTarget(std::string_view name, DType dtype);
  // Take copies what it need not convert, too: private 2 MiB pages, filled on all threads.
  void SetResident(bool resident) { resident_ = resident; }
  // Told the fraction of all bytes to convert, between parts of tensors.
  void SetProgress(ProgressFn progress);

  // The tensor `name`, which must have exactly this shape, in its target dtype. Conversion runs on
  // the threads of the current pass, in parts behind which the source's pages are dropped: beside the
  // result it needs a few of these parts. Cancelled if the progress function said so.
  StatusOr<TensorView> Take(std::string_view name, const std::vector<int64_t>& shape);
  // A table of which single rows are read: left in its file unless it must be converted.
  StatusOr<RowTable> TakeTable(std::string_view name, const std::vector<int64_t>& shape);
  // A tensor that the caller reads from its file, part by part: nothing is mapped for it.
  // FailedPrecondition where it would have to be converted.
  struct FilePart {
    TensorView view;
    std::shared_ptr<const MappedFile> file;
  };
  StatusOr<FilePart> TakeInFile(std::string_view name, const std::vector<int64_t>& shape);
  // A vector, widened to float32.
  StatusOr<std::vector<float>> TakeFloats(std::string_view name, int64_t size);

  // Any tensor, as it was taken, or else as it is stored (InvalidArgument if compressed-tensors
  // stores it and it was not taken).
  StatusOr<TensorView> Find(std::string_view name) const;
  // Rows of Find(name) as float32 [ids, cols]. A tensor of more than two axes is read as the rows of
  // its matrices, one matrix after the other, a vector as one row.
  StatusOr<std::vector<float>> ReadRows(std::string_view name,
                                        const std::vector<int64_t>& ids) const;
  // The dtype in which Take gives a tensor: its target unless its values would not fit that.
  StatusOr<DType> ResolvedDType(std::string_view name);
  StatusOr<std::vector<int64_t>> ShapeOf(std::string_view name) const;
  // Gives `sink` the bytes of the tensor as Take would store them, in order, in parts of at most
  // about 64 MiB, without keeping any.
  Status Stream(std::string_view name, FunctionRef<Status(const uint8_t* data, size_t bytes)> sink);

  // Bytes of private copies, and of mapped tensors that were taken.
  uint64_t copied_bytes() const { return copied_bytes_; }
  uint64_t mapped_bytes() const { return mapped_bytes_; }

 private:
  struct Tensor {
    TensorView view;                         // no data where quantized has it
    std::shared_ptr<const MappedFile> file;  // null: the memory is not a file's
    std::string path;                        // where it came from, for messages
    std::optional<DType> target;
    std::optional<PackQuantized> quantized;
    std::shared_ptr<const MappedFile> scales_file;
    bool resolved = false;  // quantized->exact_in_float16 is known
  };
  // Rows [begin, end) of one matrix of a tensor.
  struct Part {
    TensorView matrix;
    int64_t begin = 0;
    int64_t end = 0;
    size_t offset = 0;  // of their bytes in the converted tensor
    size_t bytes = 0;
  };

  StatusOr<std::shared_ptr<const MappedFile>> Open(std::string_view path);
  StatusOr<Tensor*> Find(std::string_view name, const std::vector<int64_t>& shape);
  bool MustCopy(const Tensor& tensor, bool resident);
  DType Resolve(Tensor& tensor);
  StatusOr<TensorView> TakeCopy(Tensor& tensor);
  uint8_t* NewCopy(size_t bytes);
  Status ForParts(const Tensor& tensor, DType dtype, FunctionRef<Status(const Part&)> fn);
  Status ConvertPart(const Tensor& tensor, const Part& part, DType dtype, void* dst) const;

  absl::flat_hash_map<std::string, Tensor> tensors_;
  absl::flat_hash_map<std::string, std::shared_ptr<const MappedFile>> files_;
  std::vector<AlignedBuffer> copies_;
  size_t copy_used_ = 0;  // bytes of copies_.back() that are taken
  bool resident_ = false;
  ProgressFn progress_;
  uint64_t bytes_to_convert_ = 0;
  uint64_t converted_bytes_ = 0;
  uint64_t copied_bytes_ = 0;
  uint64_t mapped_bytes_ = 0;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_WEIGHT_STORE_H_
