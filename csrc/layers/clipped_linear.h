#ifndef GEMLOUPE_LAYERS_CLIPPED_LINEAR_H_
#define GEMLOUPE_LAYERS_CLIPPED_LINEAR_H_

#include <limits>

#include "base/status.h"
#include "layers/pass_context.h"

namespace gemloupe {

// A linear layer of the towers, whose input and output are kept within bounds that training found.
struct ClippedLinear {
  static constexpr float kUnbounded = std::numeric_limits<float>::infinity();

  TensorView weight;  // [out, in]
  float input_min = -kUnbounded;
  float input_max = kUnbounded;
  float output_min = -kUnbounded;
  float output_max = kUnbounded;

  // out [T, out] for x [T, in].
  Status Forward(ConstMatrix x, const PassContext& ctx, Matrix out) const;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_CLIPPED_LINEAR_H_
