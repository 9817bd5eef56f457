#ifndef GEMLOUPE_FORMATS_WEIGHT_STORE_H_
#define GEMLOUPE_FORMATS_WEIGHT_STORE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/mapped_file.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"
#include "formats/safetensors.h"

namespace gemloupe {

// The named tensors of a checkpoint: views into mapped files, and what had to be converted. Views
// are valid as long as the store lives.
class WeightStore {
 public:
  // Maps a safetensors file and adds the entries under their names. AlreadyExists for a name that
  // another file gave.
  Status AddFile(std::string_view path, const std::vector<TensorEntry>& entries);
  // Adds a tensor whose memory the caller keeps (models built in tests).
  void AddView(std::string_view name, const TensorView& view);

  // The tensor `name`, which must have exactly this shape.
  StatusOr<TensorView> Take(std::string_view name, const std::vector<int64_t>& shape);
  // The same, rounded to bfloat16 in a private copy unless it is stored so.
  StatusOr<TensorView> TakeBfloat16(std::string_view name, const std::vector<int64_t>& shape);
  // A vector, widened to float32.
  StatusOr<std::vector<float>> TakeFloats(std::string_view name, int64_t size);

  // Bytes of private copies, and of mapped tensors that were taken.
  uint64_t copied_bytes() const { return copied_bytes_; }
  uint64_t mapped_bytes() const { return mapped_bytes_; }

 private:
  struct Tensor {
    TensorView view;
    std::string path;  // where it came from, for messages
  };

  absl::flat_hash_map<std::string, Tensor> tensors_;
  std::vector<std::shared_ptr<const MappedFile>> files_;
  std::vector<AlignedBuffer> copies_;
  uint64_t copied_bytes_ = 0;
  uint64_t mapped_bytes_ = 0;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_WEIGHT_STORE_H_
