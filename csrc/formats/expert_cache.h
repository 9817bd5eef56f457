#ifndef GEMLOUPE_FORMATS_EXPERT_CACHE_H_
#define GEMLOUPE_FORMATS_EXPERT_CACHE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/mapped_file.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"

namespace gemloupe {

// One expert's matrices: gate and up [2 F, D], down [D, F].
struct ExpertView {
  TensorView gate_up_proj;
  TensorView down_proj;
};

// The experts of a model whose files are larger than the memory it may use. Experts are read from the
// file when a token needs them; those used last stay. All layers have experts of the same size.
class ExpertCache {
 public:
  // `bytes`: memory for experts; at least one fits, whatever it is.
  explicit ExpertCache(size_t bytes) : bytes_(bytes) {}

  // Tells where the experts of the next layer lie: [E, 2 F, D] and [E, D, F], in mapped files. Returns
  // the layer's number. InvalidArgument unless all layers' experts have the same size.
  StatusOr<int> AddLayer(const TensorView& gate_up_proj,
                         std::shared_ptr<const MappedFile> gate_up_file,
                         const TensorView& down_proj, std::shared_ptr<const MappedFile> down_file);

  // Most experts that can be held at once; at least 1 after the first layer was added.
  int64_t capacity() const;

  // Makes `experts` (distinct, at most capacity()) of a layer present, reading on the threads of the
  // current pass what is not. The views are valid until the next call.
  StatusOr<std::vector<ExpertView>> Fetch(int layer, std::span<const int32_t> experts);

  struct Counts {
    int64_t capacity = 0;
    int64_t found = 0;  // experts that were present when a pass asked for them
    int64_t read = 0;   // experts that were read from the file
    uint64_t bytes_read = 0;
  };
  Counts counts() const;

 private:
  struct Layer {
    TensorView gate_up_proj;
    TensorView down_proj;
    std::shared_ptr<const MappedFile> gate_up_file;
    std::shared_ptr<const MappedFile> down_file;
    std::vector<int64_t> slot;  // of each expert; -1 where it is not held
  };
  struct Slot {
    int layer = -1;
    int32_t expert = -1;
    uint64_t last_use = 0;
  };

  size_t GateUpBytes() const { return layers_[0].gate_up_proj.Slice(0).byte_size(); }
  size_t DownBytes() const { return layers_[0].down_proj.Slice(0).byte_size(); }
  size_t SlotBytes() const;
  int64_t FreeSlot(uint64_t now);

  size_t bytes_;
  std::vector<Layer> layers_;
  std::vector<Slot> slots_;
  AlignedBuffer memory_;
  uint64_t clock_ = 0;
  // Read by other threads while a pass runs.
  std::atomic<int64_t> found_{0};
  std::atomic<int64_t> read_{0};
};

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_EXPERT_CACHE_H_
