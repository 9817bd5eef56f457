"""Loads of experts, and their accumulation over many calls."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.errors import format_shape
from gemloupe.table import Table

if TYPE_CHECKING:
    from gemloupe.router_trace import RouterTrace

# One for all: a lock of its own would keep an object from being pickled, and an add is short.
_ADDING = threading.Lock()


def entropy(probs: np.ndarray) -> np.ndarray:
    """Entropy over the last axis in nats, float64; 0 ln 0 counts as 0."""
    p = probs.astype(np.float64)
    return -np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0), axis=-1)


def expert_counts(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each expert was chosen, int64 [L, E], of experts [L, T, k]."""
    layers = len(experts)
    return np.bincount(_flat(experts, num_experts), minlength=layers * num_experts).reshape(
        layers, num_experts
    )


def pair_counts(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """How many tokens chose both of two experts, int64 [E, E], of experts [T, k] of one layer."""
    pairs = experts[:, :, None].astype(np.int64) * num_experts + experts[:, None, :]
    return np.bincount(pairs.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)


def _add_pairs(pairs: np.ndarray, experts: np.ndarray) -> None:
    """Adds the pairs of experts [L, T, k] to pairs [L, E, E]; for few tokens, without E² work."""
    layers, tokens, chosen = experts.shape
    if tokens * chosen**2 < pairs.shape[1] ** 2:
        layer = np.arange(layers)[:, None, None, None]
        np.add.at(pairs, (layer, experts[..., :, None], experts[..., None, :]), 1)
        return
    for index in range(layers):
        pairs[index] += pair_counts(experts[index], pairs.shape[1])


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts [L, E] as shares of their row, float64; a row without counts is all 0."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def load_columns(layers: np.ndarray, load: np.ndarray) -> dict[str, list[Any]]:
    """What tables say of a load [L, E]."""
    spread = entropy(load)
    top = load.argmax(-1)
    return {
        "layer": layers.tolist(),
        "experts used": (load > 0).sum(-1).tolist(),
        "effective experts": np.exp(spread).tolist(),
        "load entropy": spread.tolist(),
        "top expert": top.tolist(),
        "top load": load.max(-1).tolist(),
        "top / uniform": (load.max(-1) * load.shape[-1]).tolist(),
    }


def layer_index(layers: np.ndarray, layer: int) -> int:
    """Where a model's layer number stands in `layers`; ValueError where it has no router."""
    found = np.flatnonzero(layers == layer)
    if not len(found):
        raise ValueError(f"layer is {layer!r}; expected a layer with experts: {layers.tolist()}")
    return int(found[0])


def _flat(experts: np.ndarray, num_experts: int) -> np.ndarray:
    offsets = np.arange(len(experts), dtype=np.int64)[:, None, None] * num_experts
    return (experts + offsets).ravel()


class RoutingStats:
    """Routing of any number of calls in little memory: counts, no tokens.

    L layers with experts, E experts, k chosen a token. A 26B model's counts take 60 KB; with
    `coactivation` 4 MB more, and each token adds k² pair counts a layer. Safe to use from threads.
    """

    def __init__(self, *, coactivation: bool = False) -> None:
        self._coactivation = coactivation
        self.reset()

    def reset(self) -> None:
        """Forgets everything, the model's sizes included."""
        self.tokens = 0
        """Tokens counted."""
        self._layers: np.ndarray | None = None
        self._counts = np.zeros((0, 0), np.int64)
        self._weights = np.zeros((0, 0))
        self._pairs: np.ndarray | None = None

    def add(self, trace: RouterTrace) -> None:
        """Counts a trace's tokens; ValueError where layers or experts are not those seen before."""
        count, size = trace.num_experts, (len(trace.layers), trace.num_experts)
        flat = _flat(trace.experts, count)
        new_counts = np.bincount(flat, minlength=size[0] * count).reshape(size)
        new_weights = np.bincount(flat, trace.weights.ravel(), size[0] * count).reshape(size)
        with _ADDING:
            if self._layers is None:
                self._start(trace)
            if self._counts.shape != size or not np.array_equal(self._layers, trace.layers):  # type: ignore[arg-type]
                raise ValueError(
                    f"the trace has layers and experts {format_shape(size)}; expected "
                    f"{format_shape(self._counts.shape)}, those of the traces added before. "
                    "Use one RoutingStats a model, or call reset() first."
                )
            self._counts += new_counts
            self._weights += new_weights
            self.tokens += len(trace.ids)
            if self._pairs is not None:
                _add_pairs(self._pairs, trace.experts)

    def _start(self, trace: RouterTrace) -> None:
        size = (len(trace.layers), trace.num_experts)
        self._layers = trace.layers
        self._counts = np.zeros(size, np.int64)
        self._weights = np.zeros(size)
        if self._coactivation:
            self._pairs = np.zeros((*size, trace.num_experts), np.int64)

    def __add__(self, other: RoutingStats) -> RoutingStats:
        """Both together, as of two workers; ValueError where their models differ."""
        if not isinstance(other, RoutingStats):
            return NotImplemented
        if self._layers is None or other._layers is None:
            return (other if self._layers is None else self)._copy()
        if self._counts.shape != other._counts.shape or not np.array_equal(
            self._layers, other._layers
        ):
            raise ValueError(
                f"layers and experts are {format_shape(self._counts.shape)} and "
                f"{format_shape(other._counts.shape)}; expected statistics of one model"
            )
        both = self._copy()
        both.tokens += other.tokens
        both._counts += other._counts
        both._weights += other._weights
        known = self._pairs is not None and other._pairs is not None
        both._pairs = self._pairs + other._pairs if known else None  # type: ignore[operator]
        both._coactivation = known
        return both

    def __radd__(self, other: object) -> RoutingStats:
        return self._copy() if other == 0 else NotImplemented

    def _copy(self) -> RoutingStats:
        copy = RoutingStats(coactivation=self._coactivation)
        copy.tokens, copy._layers = self.tokens, self._layers
        copy._counts, copy._weights = self._counts.copy(), self._weights.copy()
        copy._pairs = None if self._pairs is None else self._pairs.copy()
        return copy

    @property
    def layers(self) -> np.ndarray:
        """int64 [L]: the model's layer numbers; empty before the first trace."""
        return np.zeros(0, np.int64) if self._layers is None else self._layers

    @property
    def num_experts(self) -> int:
        """E, 0 before the first trace."""
        return self._counts.shape[1]

    @property
    def counts(self) -> np.ndarray:
        """int64 [L, E]: how often each expert was chosen; a copy."""
        return self._counts.copy()

    def load(self) -> np.ndarray:
        """Share of the tokens · k choices that each expert got, float64 [L, E]; rows sum to 1."""
        return shares(self._counts)

    def mean_weights(self) -> np.ndarray:
        """Mean weight of each expert where it was chosen, float64 [L, E]; NaN where never."""
        chosen = np.where(self._counts > 0, self._counts, 1)
        return np.where(self._counts > 0, self._weights / chosen, np.nan)

    def entropy_of_load(self) -> np.ndarray:
        """Entropy of `load` in nats, float64 [L]: ln E where every expert is used equally."""
        return entropy(self.load())

    def coactivation(self, layer: int) -> np.ndarray:
        """Tokens that chose both experts, int64 [E, E]; the diagonal counts those of one expert.

        ValueError without `coactivation=True` at the start, or where the layer has no experts.
        """
        if self._layers is not None and self._pairs is None:
            raise ValueError(
                "these statistics have no co-activation; make them with "
                "RoutingStats(coactivation=True)"
            )
        index = layer_index(self.layers, layer)
        assert self._pairs is not None
        return self._pairs[index].copy()

    def table(self) -> Table:
        """One row a layer: how evenly its experts are used."""
        return Table(load_columns(self.layers, self.load()))

    def plot(self, ax: Any = None) -> Any:
        """Plots the load, layers x experts; see `gl.plot.routing`."""
        from gemloupe.plot.routing import routing

        return routing(self, ax=ax)

    def __repr__(self) -> str:
        if self._layers is None:
            return "RoutingStats\n  tokens  0"
        return f"RoutingStats\n  tokens  {self.tokens}\n{self.table()}"

    def _repr_html_(self) -> str:
        return f"<p>RoutingStats: {self.tokens} tokens</p>{self.table()._repr_html_()}"
