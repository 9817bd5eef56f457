#include "layers/mlp.h"

#include "ops/linear.h"
#include "ops/rows.h"

namespace gemloupe {

Status Mlp::Forward(ConstMatrix x, const PassContext& ctx, Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix gate = ctx.arena->NewMatrix(x.rows, weights_.gate_proj.shape[0]);
  const Matrix up = ctx.arena->NewMatrix(x.rows, weights_.up_proj.shape[0]);
  GL_RETURN_IF_ERROR(
      Linear(x, {{&weights_.gate_proj, gate}, {&weights_.up_proj, up}}, ctx.path, *ctx.arena));
  ctx.Visit(HookPoint::kMlpGate, gate);
  ctx.Visit(HookPoint::kMlpUp, up);
  GeluMul(gate, up, gate);
  ctx.Visit(HookPoint::kMlpHidden, gate);
  GL_RETURN_IF_ERROR(Linear(gate, {{&weights_.down_proj, out}}, ctx.path, *ctx.arena));
  ctx.Visit(HookPoint::kMlpOut, out);
  return absl::OkStatus();
}

}  // namespace gemloupe
