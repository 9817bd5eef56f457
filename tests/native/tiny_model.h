#ifndef GEMLOUPE_TESTS_NATIVE_TINY_MODEL_H_
#define GEMLOUPE_TESTS_NATIVE_TINY_MODEL_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "models/text_model.h"

namespace gemloupe {

// A random model built from structs, without files: one layer of each kind (sliding, full with
// experts and K = V, and one that shares with each), per-layer inputs, odd sizes.
class TinyModel {
 public:
  explicit TinyModel(DType dtype);

  TextConfig config;
  // The views point into this object. Their addresses are odd: mapped files promise no alignment.
  WeightStore Weights() const;
  // Loaded with `options`; aborts on an error.
  std::shared_ptr<TextModel> Load(const TextModelOptions& options) const;

  // Leaves out the tensor of this name.
  void Remove(const std::string& name);

 private:
  struct Tensor {
    std::string name;
    std::vector<uint8_t> bytes;
    TensorView view;
  };
  void Add(const std::string& name, const std::vector<int64_t>& shape, float mean, float deviation);

  DType dtype_;
  uint32_t seed_ = 0;
  std::deque<Tensor> tensors_;
};

// `count` ids of the model's vocabulary.
std::vector<int32_t> RandomIds(const TextConfig& config, int64_t count, uint32_t seed);

}  // namespace gemloupe

#endif  // GEMLOUPE_TESTS_NATIVE_TINY_MODEL_H_
