#include "layers/norm.h"

#include <cmath>

namespace gemloupe {

void Norm::ForwardShown(ConstMatrix x, HookPoint scale, const PassContext& ctx, Matrix dst,
                        std::vector<uint8_t>* changed) const {
  const Arena::Scope scope(*ctx.arena);
  const int64_t groups = x.cols / width_;
  const Matrix divisors = ctx.arena->NewMatrix(x.rows, groups);
  const Matrix before = ctx.arena->NewMatrix(x.rows, groups);
  const Matrix input = ctx.arena->NewMatrix(x.rows, x.cols);  // dst may be x
  CopyRows(x, input);
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      double sum = 0.0;
      for (int64_t i = group * width_; i < (group + 1) * width_; ++i) {
        sum += static_cast<double>(x.row(row)[i]) * x.row(row)[i];
      }
      const double mean = sum / static_cast<double>(width_);
      divisors.row(row)[group] = static_cast<float>(std::sqrt(mean + static_cast<double>(eps_)));
    }
  }
  CopyRows(divisors, before);
  if (changed == nullptr) {
    ctx.Visit(scale, divisors);
  } else {
    ctx.Visit(scale, divisors, *changed);
  }
  Forward(x, dst);
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const float divisor = divisors.row(row)[group];
      if (divisor == before.row(row)[group]) continue;
      for (int64_t i = 0; i < width_; ++i) {
        const int64_t at = group * width_ + i;
        const float weight = weight_.empty() ? 1.0f : weight_[static_cast<size_t>(i)];
        dst.row(row)[at] = input.row(row)[at] / divisor * weight;
      }
    }
  }
}

}  // namespace gemloupe
