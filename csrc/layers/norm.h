#ifndef GEMLOUPE_LAYERS_NORM_H_
#define GEMLOUPE_LAYERS_NORM_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "inspect/hook_points.h"
#include "layers/pass_context.h"
#include "ops/rows.h"

namespace gemloupe {

// Root-mean-square norm over groups of `width` columns (heads), with or without a weight [width] (no
// "1 +" as in earlier Gemmas).
class Norm {
 public:
  Norm() = default;
  Norm(std::vector<float> weight, float eps)
      : weight_(std::move(weight)), width_(static_cast<int64_t>(weight_.size())), eps_(eps) {}
  static Norm WithoutWeight(int64_t width, float eps) {
    Norm norm;
    norm.width_ = width;
    norm.eps_ = eps;
    return norm;
  }

  // dst = norm(x), [T, n · width]; dst may be x.
  void Forward(ConstMatrix x, Matrix dst) const {
    RmsNorm(x, weight_.empty() ? nullptr : weight_.data(), width_, eps_, dst);
  }
  // The same, showing the divisors √(mean(x²) + eps) [T, n] at `scale`: rows whose divisor an edit
  // changes are divided by that. changed, if not null: as in PassContext::Visit.
  void Forward(ConstMatrix x, HookPoint scale, const PassContext& ctx, Matrix dst,
               std::vector<uint8_t>* changed = nullptr) const {
    if (ctx.hooks != nullptr && ctx.Wants(scale)) {
      ForwardShown(x, scale, ctx, dst, changed);
    } else {
      Forward(x, dst);
    }
  }

 private:
  void ForwardShown(ConstMatrix x, HookPoint scale, const PassContext& ctx, Matrix dst,
                    std::vector<uint8_t>* changed) const;

  std::vector<float> weight_;
  int64_t width_ = 0;
  float eps_ = 0.0f;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_NORM_H_
