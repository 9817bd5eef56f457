#include "layers/per_layer_input.h"

#include "ops/rows.h"

namespace gemloupe {

Status PerLayerInput::Forward(ConstMatrix resid, Matrix input, const PassContext& ctx,
                              Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  ctx.Visit(HookPoint::kPerLayerIn, input);
  const Matrix gate = ctx.arena->NewMatrix(resid.rows, weights_.gate.shape[0]);
  GL_RETURN_IF_ERROR(
      AdaptedLinear(resid, {{AdaptedModule::kPerLayerGate, &weights_.gate, gate}}, ctx));
  ctx.Visit(HookPoint::kPerLayerGate, gate);
  GeluMul(gate, input, gate);
  ctx.Visit(HookPoint::kPerLayerHidden, gate);
  GL_RETURN_IF_ERROR(
      AdaptedLinear(gate, {{AdaptedModule::kPerLayerProjection, &weights_.projection, out}}, ctx));
  ctx.Visit(HookPoint::kPerLayerOut, out);
  post_norm_.Forward(out, HookPoint::kPerLayerPostScale, ctx, out);
  ctx.Visit(HookPoint::kPerLayerPost, out);
  return absl::OkStatus();
}

}  // namespace gemloupe
