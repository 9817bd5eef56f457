#include "layers/mlp.h"

#include "ops/rows.h"

namespace gemloupe {

Status Mlp::Forward(ConstMatrix x, const PassContext& ctx, Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  const Matrix gate = ctx.arena->NewMatrix(x.rows, weights_.gate_proj.shape[0]);
  const Matrix up = ctx.arena->NewMatrix(x.rows, weights_.up_proj.shape[0]);
  GL_RETURN_IF_ERROR(AdaptedLinear(x,
                                   {{AdaptedModule::kGateProj, &weights_.gate_proj, gate},
                                    {AdaptedModule::kUpProj, &weights_.up_proj, up}},
                                   ctx));
  ctx.Visit(HookPoint::kMlpGate, gate);
  ctx.Visit(HookPoint::kMlpUp, up);
  GeluMul(gate, up, gate);
  ctx.Visit(HookPoint::kMlpHidden, gate);
  GL_RETURN_IF_ERROR(
      AdaptedLinear(gate, {{AdaptedModule::kDownProj, &weights_.down_proj, out}}, ctx));
  ctx.Visit(HookPoint::kMlpOut, out);
  return absl::OkStatus();
}

}  // namespace gemloupe
