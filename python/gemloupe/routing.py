"""From a pass's captured router points to a `RouterTrace`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from gemloupe.config import TextConfig
from gemloupe.errors import one_of, quoted
from gemloupe.router_trace import RoutedToken, RouterTrace
from gemloupe.routing_drift import RouterDrift
from gemloupe.routing_stats import RoutingStats

__all__ = [
    "LEVELS",
    "RoutedToken",
    "RouterDrift",
    "RouterTrace",
    "RoutingStats",
    "check_level",
    "collectors",
    "count",
    "counting",
    "hook_points",
    "make_trace",
]

LEVELS = ("full", "experts")
"""How much a trace holds: a token of a 26B model takes 35 KB at "full", 3 KB at "experts"."""

_EXPERTS = ("experts", "weights_norm", "weights")
_FULL = ("logits", "probs", *_EXPERTS)


def check_level(value: object) -> str | None:
    """Returns the level that `routing=value` asks for, None for False; ValueError for others."""
    if value is False or value is None:
        return None
    if isinstance(value, str) and value in LEVELS:
        return value
    raise ValueError(f"routing is {quoted(value)}; expected {one_of(LEVELS)}, or False")


def hook_points(level: str | None, config: TextConfig) -> dict[str, str | None]:
    """The hook points that a trace of this level is made from -> what to reduce them with.

    In model order; {} for level None and for a model without experts.
    """
    points: dict[str, str | None] = {}
    for layer in _layers(config) if level else ():
        names = _FULL if level == "full" else _EXPERTS
        points.update({f"layers.{layer}.router.{name}": None for name in names})
        if level == "full":
            points[f"layers.{layer}.experts.each"] = "norm"
    return points


def make_trace(
    level: str | None,
    captured: Mapping[str, np.ndarray],
    ids: np.ndarray,
    positions: np.ndarray,
    tokens: Callable[[], list[str]],
    config: TextConfig,
) -> RouterTrace | None:
    """Makes a trace of what `hook_points(level, config)` names, each [T, …]; None where that is {}.

    The norms `experts.each` may be left out, in all layers. `tokens` is called when token strings
    are first asked for, and may raise FileNotFoundError then (no tokenizer). KeyError for a router
    point that is not captured.
    """
    layers = _layers(config)
    if level is None or not layers:
        return None

    def stack(name: str, dtype: type) -> np.ndarray:
        return np.stack([np.asarray(captured[f"layers.{i}.{name}"], dtype) for i in layers])

    full = level == "full"
    norms = None
    if full and any(name.endswith(".experts.each") for name in captured):
        norms = stack("experts.each", np.float32)
    return RouterTrace(
        experts=stack("router.experts", np.int32),
        weights=stack("router.weights", np.float32),
        weights_norm=stack("router.weights_norm", np.float32),
        ids=np.array(ids, np.int32),
        positions=np.array(positions, np.int64),
        layers=np.array(layers, np.int64),
        num_experts=config.num_experts,
        logits=stack("router.logits", np.float32) if full else None,
        probs=stack("router.probs", np.float32) if full else None,
        output_norms=norms,
        token_source=tokens,
    )


Collectors = tuple[RoutingStats, ...]

# (model, statistics) of each `counting` that is entered.
_counting: contextvars.ContextVar[tuple[tuple[object, RoutingStats], ...]] = contextvars.ContextVar(
    "gemloupe.routing.counting", default=()
)


@contextlib.contextmanager
def counting(model: object, stats: RoutingStats) -> Iterator[RoutingStats]:
    """What `Model.routing_stats` returns: adds the model's traces to `stats` inside the block."""
    token = _counting.set((*_counting.get(), (model, stats)))
    try:
        yield stats
    finally:
        _counting.reset(token)


def collectors(model: object) -> Collectors:
    """The statistics that a call on `model` adds its traces to; asked for when the call begins."""
    return tuple(stats for counted, stats in _counting.get() if counted is model)


def count(traces: Iterable[RouterTrace | None], collectors: Collectors) -> None:
    """Adds what a call's rows chose, where they have a trace."""
    for trace in traces:
        if trace is not None:
            for stats in collectors:
                stats.add(trace)


def _layers(config: TextConfig) -> list[int]:
    return [index for index, layer in enumerate(config.layers) if layer.has_experts]
