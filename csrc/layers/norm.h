#ifndef GEMLOUPE_LAYERS_NORM_H_
#define GEMLOUPE_LAYERS_NORM_H_

#include <utility>
#include <vector>

#include "ops/rows.h"

namespace gemloupe {

// Root-mean-square norm with weight w [D] (no "1 +" as in earlier Gemmas).
class Norm {
 public:
  Norm() = default;
  Norm(std::vector<float> weight, float eps) : weight_(std::move(weight)), eps_(eps) {}

  // dst = norm(x) over groups of D columns; dst may be x. [T, n · D].
  void Forward(ConstMatrix x, Matrix dst) const {
    RmsNorm(x, weight_.data(), static_cast<int64_t>(weight_.size()), eps_, dst);
  }

 private:
  std::vector<float> weight_;
  float eps_ = 0.0f;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_NORM_H_
