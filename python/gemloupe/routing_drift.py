"""How differently two passes over the same tokens were routed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemloupe.table import Table


def jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|A ∩ B| / |A ∪ B| of the sets of distinct experts [T, k] and [T, k'], float64 [T]."""
    common = (a[:, :, None] == b[:, None, :]).sum((-1, -2))
    return common / (a.shape[-1] + b.shape[-1] - common)


def js_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence over the last axis in nats, float64, 0 … ln 2 (Lin, 1991)."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    mean = (p + q) / 2
    total = np.zeros(p.shape[:-1])
    for part in (p, q):
        ratio = np.divide(part, mean, out=np.ones_like(part), where=part > 0)
        total += 0.5 * np.sum(part * np.log(ratio), axis=-1)
    return np.maximum(total, 0.0)


@dataclass(frozen=True, eq=False)
class RouterDrift:
    """What `a.drift(b)` found, from a to b; L layers with experts, T tokens, E experts."""

    layers: np.ndarray
    """int64 [L]: the model's layer numbers."""
    jaccard: np.ndarray
    """float64 [L, T]: Jaccard index of the two expert sets; 1 where they are equal."""
    js: np.ndarray | None
    """float64 [L, T]: Jensen-Shannon divergence of the router's probabilities in nats (0 … ln 2);
    None unless both traces are of level "full"."""
    load_change: np.ndarray
    """float64 [L, E]: load of b − load of a; rows sum to 0."""
    token_strings: list[str] = field(repr=False)

    def table(self) -> Table:
        """One row a layer: means over tokens, and the expert that gained and lost most load.

        "load moved" is half the sum of |load change|: the share of choices that went elsewhere.
        """
        columns: dict[str, list[Any]] = {
            "layer": self.layers.tolist(),
            "jaccard": _means(self.jaccard),
            "equal sets": _means(self.jaccard == 1),
        }
        if self.js is not None:
            columns["JS mean"] = _means(self.js)
            columns["JS max"] = self.js.max(-1, initial=0.0).tolist()
        columns["load moved"] = (np.abs(self.load_change).sum(-1) / 2).tolist()
        columns["gained most"] = self.load_change.argmax(-1).tolist()
        columns["gain"] = self.load_change.max(-1).tolist()
        columns["lost most"] = self.load_change.argmin(-1).tolist()
        columns["loss"] = self.load_change.min(-1).tolist()
        return Table(columns)

    def plot(self, by: str = "layer", ax: Any = None) -> Any:
        """Plots it `by` "layer" or "token"; see `gl.plot.routing_drift`."""
        from gemloupe.plot.routing import routing_drift

        return routing_drift(self, by=by, ax=ax)

    def __repr__(self) -> str:
        return f"RouterDrift\n  tokens  {self.jaccard.shape[1]}\n{self.table()}"

    def _repr_html_(self) -> str:
        return f"<p>RouterDrift: {self.jaccard.shape[1]} tokens</p>{self.table()._repr_html_()}"


def _means(values: np.ndarray) -> list[float]:
    return (values.sum(-1) / max(values.shape[-1], 1)).tolist()
