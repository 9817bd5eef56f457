"""One decoder layer, in the order of the architecture's diagram."""

from __future__ import annotations

import numpy as np

from .attention import attention
from .config import Config, Layer
from .mlp import mlp
from .moe import experts_output, route
from .per_layer import per_layer_branch
from .rms_norm import rms_norm
from .trace import Trace


def under(weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns the weights whose name starts with `prefix`, that prefix removed."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def decoder_layer(
    resid: np.ndarray,
    positions: np.ndarray,
    per_layer_input: np.ndarray | None,
    weights: dict[str, np.ndarray],
    layer: Layer,
    config: Config,
    kv: dict[int, tuple[np.ndarray, np.ndarray]],
    trace: Trace,
) -> np.ndarray:
    """Maps the residual [T, D] to the next layer's; `kv` is as in `attention`."""

    def norm(x: np.ndarray, weight_name: str, point: str) -> np.ndarray:
        return rms_norm(x, weights[weight_name + ".weight"], config.eps, trace, point)

    trace("resid_pre", resid)
    x = norm(resid, "input_layernorm", "attn.norm")
    attention_weights = under(weights, "self_attn.")
    out = attention(x, positions, attention_weights, layer, config, kv, trace.within("attn."))
    resid = trace("resid_mid", resid + norm(out, "post_attention_layernorm", "attn.post"))

    x = norm(resid, "pre_feedforward_layernorm", "mlp.norm")
    out = mlp(x, under(weights, "mlp."), trace.within("mlp."))
    if config.top_k_experts:
        out = norm(out, "post_feedforward_layernorm_1", "mlp.post")
        experts, expert_weights = route(
            resid, under(weights, "router."), config, trace.within("router.")
        )
        x = norm(resid, "pre_feedforward_layernorm_2", "experts.norm")
        routed = experts_output(
            x, experts, expert_weights, under(weights, "experts."), trace.within("experts.")
        )
        out = out + norm(routed, "post_feedforward_layernorm_2", "experts.post")
    out = norm(trace("ffn.out", out), "post_feedforward_layernorm", "ffn.post")
    resid = trace("resid_ffn", resid + out)

    if per_layer_input is not None:
        resid = resid + per_layer_branch(
            resid, per_layer_input, weights, config, trace.within("per_layer.")
        )
    # layer_scalar multiplies the whole stream, not the branch.
    return trace("resid_post", trace("resid_unscaled", resid) * weights["layer_scalar"])
