#include "layers/clipped_linear.h"

#include <vector>

#include "ops/rows.h"

namespace gemloupe {

Status Forward(ConstMatrix x, std::span<const ClippedJob> jobs, const PassContext& ctx) {
  // Neighbours whose inputs have the same bounds (those of released models do) are one product.
  for (size_t begin = 0; begin < jobs.size();) {
    const ClippedLinear::Bounds bounds = jobs[begin].linear->input;
    std::vector<AdaptedJob> group;
    size_t end = begin;
    for (; end < jobs.size() && jobs[end].linear->input == bounds; ++end) {
      const ClippedLinear& linear = *jobs[end].linear;
      group.push_back({linear.module, &linear.weight, jobs[end].dst});
    }
    const Arena::Scope scope(*ctx.arena);
    ConstMatrix input = x;
    if (bounds.clip()) {
      const Matrix clamped = ctx.arena->NewMatrix(x.rows, x.cols);
      Clamp(x, bounds.low, bounds.high, clamped);
      input = clamped;
    }
    GL_RETURN_IF_ERROR(AdaptedLinear(input, group, ctx.path, ctx));
    for (; begin < end; ++begin) {
      const ClippedLinear::Bounds& output = jobs[begin].linear->output;
      if (output.clip()) Clamp(jobs[begin].dst, output.low, output.high, jobs[begin].dst);
    }
  }
  return absl::OkStatus();
}

}  // namespace gemloupe
