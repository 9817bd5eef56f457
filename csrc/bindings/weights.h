#ifndef GEMLOUPE_BINDINGS_WEIGHTS_H_
#define GEMLOUPE_BINDINGS_WEIGHTS_H_

#include <memory>
#include <utility>

#include "formats/weight_store.h"

namespace gemloupe {

// A WeightStore that Python fills and then gives to a model.
class Weights {
 public:
  // InvalidArgument after Release.
  StatusOr<WeightStore*> Get() {
    if (store_ != nullptr) return store_.get();
    return absl::InvalidArgumentError("these weights were given to a model already");
  }
  StatusOr<WeightStore> Release() {
    GL_ASSIGN_OR_RETURN(WeightStore * store, Get());
    WeightStore released = std::move(*store);
    store_ = nullptr;
    return released;
  }

 private:
  std::unique_ptr<WeightStore> store_ = std::make_unique<WeightStore>();
};

}  // namespace gemloupe

#endif  // GEMLOUPE_BINDINGS_WEIGHTS_H_
