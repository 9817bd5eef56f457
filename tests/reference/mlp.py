"""The gated MLP: down(gelu(gate x) * up x)."""

from __future__ import annotations

import numpy as np

from .trace import Trace


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh approximation (`gelu_pytorch_tanh`)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(x: np.ndarray, weights: dict[str, np.ndarray], trace: Trace) -> np.ndarray:
    """Maps [T, D] to [T, D] through F hidden units."""
    gate = trace("gate", x @ weights["gate_proj.weight"].T)
    up = trace("up", x @ weights["up_proj.weight"].T)
    hidden = trace("hidden", gelu(gate) * up)
    return trace("out", hidden @ weights["down_proj.weight"].T)
