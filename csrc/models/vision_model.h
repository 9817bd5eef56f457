#ifndef GEMLOUPE_MODELS_VISION_MODEL_H_
#define GEMLOUPE_MODELS_VISION_MODEL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "formats/weight_store.h"
#include "inspect/hooks.h"
#include "layers/pass_context.h"
#include "models/vision_config.h"

namespace gemloupe {

struct VisionOptions {
  bool bfloat16_matmul = false;  // as in TextModelOptions
  bool invariant = false;
  int threads = 0;
};

// One image as patches [rows · columns, values], row after row, each value in [0, 1]: the pixels of a
// patch row by row, three colours a pixel.
struct PatchGrid {
  ConstMatrix patches;
  int64_t columns = 0;
};

// What turns images into soft tokens.
class VisionModel {
 public:
  virtual ~VisionModel() = default;
  // The encoder or the encoder-free embedder, as the config says.
  static StatusOr<std::unique_ptr<VisionModel>> Load(const VisionConfig& config,
                                                     WeightStore weights,
                                                     const VisionOptions& options);

  // Soft tokens [n, D] as the text model reads them, one a cell of pooling_kernel_size² patches (of
  // the embedder: one a patch). hooks may be null; rows that it sees are numbered from `first_row`.
  struct Request {
    PatchGrid image;
    Hooks* hooks = nullptr;
    int64_t first_row = 0;
    AdapterMix adapters;
    std::function<bool()> stopped;  // asked once a layer; true ends it with Cancelled
  };
  Status Encode(const Request& request, std::vector<float>& soft_tokens);

  const VisionConfig& config() const { return config_; }

 protected:
  VisionModel() = default;
  // Computes soft_tokens [n, D] of a checked image.
  virtual Status Run(const Request& request, PassContext& ctx, Matrix soft_tokens) = 0;
  virtual Status LoadWeights(WeightStore& weights) = 0;

  VisionConfig config_;

 private:
  Status Check(const PatchGrid& image) const;

  VisionOptions options_;
  WeightStore weights_;
  Arena arena_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_VISION_MODEL_H_
