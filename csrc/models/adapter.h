#ifndef GEMLOUPE_MODELS_ADAPTER_H_
#define GEMLOUPE_MODELS_ADAPTER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "layers/lora.h"
#include "models/config.h"

namespace gemloupe {

// The shape of a text decoder's matrix in a model of this config: [out, in], of experts [E, out, in], of
// embeddings [V, cols]. NotFound where the layer has none, such as k_proj of a layer that reads
// another's keys.
StatusOr<std::vector<int64_t>> AdaptedModuleShape(const TextConfig& config, AdaptedModule module,
                                                  int layer);
// The name of that matrix in a checkpoint, as in weight_names.h; the head is tied to the embeddings.
std::string AdaptedModuleTensor(AdaptedModule module, int layer);

// Values that an adapter is made of: float32, row-major.
struct AdapterValues {
  const float* data = nullptr;
  std::vector<int64_t> shape;
};

// Adds changes to adapters of models with `config`; A, B and matrices are held in `dtype` (float32,
// bfloat16 or float16). InvalidArgument, naming the module and both shapes, for values that do not fit.
// Sizes of towers are not in `config`: theirs are checked when a tower runs (AdaptedLinear).
class AdapterBuilder {
 public:
  AdapterBuilder(TextConfig config, DType dtype) : config_(std::move(config)), dtype_(dtype) {}

  struct LowRank {
    AdapterValues a;
    AdapterValues b;
    float scale = 1.0f;
    std::vector<float> gain;
  };
  Status AddLowRank(AdaptedModule module, int layer, const LowRank& values, Adapter& adapter) const;
  Status Replace(AdaptedModule module, int layer, const AdapterValues& weight,
                 Adapter& adapter) const;
  // Of a linear module, beside its other change or alone.
  Status Shift(AdaptedModule module, int layer, std::vector<float> shift, Adapter& adapter) const;
  Status ReplaceRows(AdaptedModule module, const std::vector<int32_t>& ids,
                     const AdapterValues& rows, Adapter& adapter) const;

 private:
  // The shape of a module's matrix, of towers that of the change itself.
  StatusOr<std::vector<int64_t>> ShapeFor(AdaptedModule module, int layer,
                                          std::vector<int64_t> own) const;
  TensorView Hold(const AdapterValues& values, Adapter& adapter) const;

  TextConfig config_;
  DType dtype_;
};

// InvalidArgument, naming the first module, if an adapter was made for a text model of other sizes.
Status CheckAdapter(const TextConfig& config, const Adapter& adapter);

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_ADAPTER_H_
