"""Which positions a query may see."""

from __future__ import annotations

import numpy as np


def visible(positions: np.ndarray, window: int | None, bidirectional: bool) -> np.ndarray:
    """Returns bool [T queries, S keys]; `window` counts the query's own position.

    In bidirectional models `window` is the largest distance seen, on both sides.
    """
    distance = positions[:, None] - positions[None, :]
    if bidirectional:
        return np.full(distance.shape, True) if window is None else np.abs(distance) <= window
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)
