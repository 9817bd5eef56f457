#include "layers/clipped_linear.h"

#include "ops/linear.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

bool Bounds(float low, float high) {
  return low != -ClippedLinear::kUnbounded || high != ClippedLinear::kUnbounded;
}

}  // namespace

Status ClippedLinear::Forward(ConstMatrix x, const PassContext& ctx, Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  if (Bounds(input_min, input_max)) {
    const Matrix clipped = ctx.arena->NewMatrix(x.rows, x.cols);
    Clamp(x, input_min, input_max, clipped);
    x = clipped;
  }
  GL_RETURN_IF_ERROR(Linear(x, {{&weight, out}}, ctx.path, *ctx.arena));
  if (Bounds(output_min, output_max)) Clamp(out, output_min, output_max, out);
  return absl::OkStatus();
}

}  // namespace gemloupe
