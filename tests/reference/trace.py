"""Where the values at hook points go."""

from __future__ import annotations

import numpy as np


class Trace:
    """A mapping of hook-point name to value, written while computing.

    `trace(name, x)` records `x` and returns it, so that the arithmetic reads as the diagram.
    """

    def __init__(self, values: dict[str, np.ndarray] | None = None, prefix: str = "") -> None:
        self.values = {} if values is None else values
        self._prefix = prefix

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray:
        self.values[self._prefix + name] = x
        return x

    def within(self, prefix: str) -> Trace:
        """Returns a view that writes into the same mapping under `prefix`."""
        return Trace(self.values, self._prefix + prefix)
