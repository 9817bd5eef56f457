"""The router and the experts of a mixture-of-experts layer."""

from __future__ import annotations

import numpy as np

from .attention import softmax
from .config import Config
from .mlp import gelu
from .rms_norm import rms_norm
from .trace import Trace


def route(
    resid: np.ndarray, weights: dict[str, np.ndarray], config: Config, trace: Trace
) -> tuple[np.ndarray, np.ndarray]:
    """Returns expert ids [T, k], most probable first, and their weights [T, k].

    The router reads the residual before any feed-forward norm. The softmax runs over all experts,
    the chosen ones are scaled to sum 1, and only then multiplied by per_expert_scale.
    """
    # `router.norm` names the input of the projection, its scales included.
    unit = rms_norm(resid, None, config.eps, trace, "norm")
    y = trace("norm", unit * weights["scale"] * config.hidden_size**-0.5)
    logits = trace("logits", y @ weights["proj.weight"].T)
    probs = trace("probs", softmax(logits))
    # A stable sort of the negated probabilities: ties go to the lower expert id.
    experts = np.argsort(-probs, axis=-1, kind="stable")[:, : config.top_k_experts]
    chosen = np.take_along_axis(probs, trace("experts", experts), axis=-1)
    normalised = trace("weights_norm", chosen / chosen.sum(axis=-1, keepdims=True))
    return experts, trace("weights", normalised * weights["per_expert_scale"][experts])


def experts_output(
    x: np.ndarray,
    experts: np.ndarray,
    expert_weights: np.ndarray,
    weights: dict[str, np.ndarray],
    trace: Trace,
) -> np.ndarray:
    """Returns the weighted sum [T, D] of the chosen experts' outputs for x [T, D]."""
    hidden, each = [], []
    for row, chosen in zip(x, experts, strict=True):
        gate_up = weights["gate_up_proj"][chosen] @ row  # [k, 2F]: gates first, then ups.
        gate, up = np.split(gate_up, 2, axis=-1)
        hidden.append(gelu(gate) * up)
        each.append(np.einsum("kdf,kf->kd", weights["down_proj"][chosen], hidden[-1]))
    trace("hidden", np.stack(hidden))
    each_array = trace("each", np.stack(each))
    return trace("out", np.einsum("tk,tkd->td", expert_weights, each_array))
