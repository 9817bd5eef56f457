"""Per-layer embeddings: a small vector for every token and layer, gated by the residual."""

from __future__ import annotations

import numpy as np

from .config import Config
from .mlp import gelu
from .rms_norm import rms_norm
from .trace import Trace


def per_layer_inputs(
    ids: np.ndarray,
    embed: np.ndarray,
    weights: dict[str, np.ndarray],
    config: Config,
    trace: Trace,
) -> np.ndarray:
    """Returns [T, L, P]: the token's own row and a projection of its embedding, over sqrt(2)."""
    shape = (len(ids), len(config.layers), config.per_layer_size)
    rows = weights["embed_tokens_per_layer.weight"][ids] * config.per_layer_size**0.5
    token = trace("per_layer_inputs.token", rows.reshape(shape))
    projected = embed @ weights["per_layer_model_projection.weight"].T * config.hidden_size**-0.5
    norm_weight = weights["per_layer_projection_norm.weight"]
    name = "per_layer_inputs.context"
    context = rms_norm(projected.reshape(shape), norm_weight, config.eps, trace, name)
    return trace("per_layer_inputs", (context + token) * 2**-0.5)


def per_layer_branch(
    resid: np.ndarray,
    per_layer_input: np.ndarray,
    weights: dict[str, np.ndarray],
    config: Config,
    trace: Trace,
) -> np.ndarray:
    """Returns what is added to the residual [T, D]; its gate reads the residual without a norm."""
    trace("in", per_layer_input)
    gate = trace("gate", resid @ weights["per_layer_input_gate.weight"].T)
    hidden = trace("hidden", gelu(gate) * per_layer_input)
    out = trace("out", hidden @ weights["per_layer_projection.weight"].T)
    return rms_norm(out, weights["post_per_layer_input_norm.weight"], config.eps, trace, "post")
