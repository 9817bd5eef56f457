"""RMSNorm: x / sqrt(mean(x^2) + eps) * w. Gemma 4 multiplies by w, not by 1 + w as Gemma 2 did."""

from __future__ import annotations

import numpy as np

from .trace import Trace


def rms_norm(
    x: np.ndarray, weight: np.ndarray | None, eps: float, trace: Trace, name: str
) -> np.ndarray:
    """Normalises the last dimension; `weight` None is the norm without weights.

    Records the result as `name` and the divisor [..., 1] as `name`.scale.
    """
    scale = trace(name + ".scale", np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))
    normed = x / scale
    return trace(name, normed if weight is None else normed * weight)
