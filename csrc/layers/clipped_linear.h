#ifndef GEMLOUPE_LAYERS_CLIPPED_LINEAR_H_
#define GEMLOUPE_LAYERS_CLIPPED_LINEAR_H_

#include <initializer_list>
#include <limits>
#include <span>

#include "base/status.h"
#include "base/tensor.h"
#include "layers/lora.h"
#include "layers/pass_context.h"

namespace gemloupe {

// A tower's matrix whose input and output are clamped: clamp(clamp(x) · Wᵀ). Adapters change what is
// inside both clamps.
struct ClippedLinear {
  struct Bounds {
    float low = -std::numeric_limits<float>::infinity();
    float high = std::numeric_limits<float>::infinity();
    bool clip() const { return low != -high || high != std::numeric_limits<float>::infinity(); }
    bool operator==(const Bounds&) const = default;
  };
  AdaptedModule module = AdaptedModule::kVisionQProj;
  TensorView weight;  // [n, k]
  Bounds input;
  Bounds output;
};

// dst [T, n] of one of the matrices that read the same x [T, k].
struct ClippedJob {
  const ClippedLinear* linear;
  Matrix dst;
};

Status Forward(ConstMatrix x, std::span<const ClippedJob> jobs, const PassContext& ctx);
inline Status Forward(ConstMatrix x, std::initializer_list<ClippedJob> jobs,
                      const PassContext& ctx) {
  return Forward(x, std::span<const ClippedJob>(jobs.begin(), jobs.size()), ctx);
}

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_CLIPPED_LINEAR_H_
