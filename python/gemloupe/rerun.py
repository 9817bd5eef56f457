"""Repeating a run with edits, from the first layer and position that they reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gemloupe import capturing, hooks
from gemloupe.cache import KvCache
from gemloupe.config import TextConfig
from gemloupe.media import blocks
from gemloupe.positions import Span
from gemloupe.prompt import Prompt

if TYPE_CHECKING:
    from gemloupe.model import Model

_KEY = "keep/"


@dataclass(frozen=True)
class Kept:
    """Where a repeated run begins: what a run with keep=True holds beside its results."""

    residuals: Sequence[np.ndarray]
    """resid_pre [T, D] of each layer."""
    cache: KvCache
    """A fork of the cache after the pass."""
    first: int
    """Position of the first token."""


def with_residuals(request: capturing.Request, config: TextConfig) -> capturing.Request:
    """The request, and resid_pre of every layer."""
    points = hooks.hook_points(config)
    wanted = list(request.wanted)
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}.resid_pre"
        wanted.append(capturing.Wanted(_KEY + name, points[name], False, capturing.At()))
    return replace(request, wanted=tuple(wanted))


def keep(
    captured: capturing.Captured, request: capturing.Request, cache: KvCache, prompt: Prompt
) -> tuple[Kept, capturing.Captured]:
    """Splits what `with_residuals` captured into what is kept and what the caller asked for."""
    residuals = [captured[name] for name in captured if name.startswith(_KEY)]
    rest = captured.only(name for name in captured if not name.startswith(_KEY))
    return Kept(residuals, cache.fork(), cache.length - len(prompt)), rest


def reach(
    bound: capturing.BoundHooks, model: Model, span: Span, first_logits: int
) -> tuple[int, int]:
    """The first layer and position that edits, captures or logits of a repeated run need."""
    config = model.config.text
    layer, position = config.num_hidden_layers - 1, min(first_logits, span.end - 1)
    if config.bidirectional == "all":
        return 0, span.first
    for point, _ in bound.needed:
        if point.layer >= 0:
            layer = min(layer, point.layer)
        elif not point.name.startswith(("final_norm", "logits")):
            layer = 0
    position = min(position, bound.first_position(span))
    for begin, end in blocks(span.prompt.media, config.bidirectional):
        if span.first + begin < position < span.first + end:
            position = span.first + begin
    return layer, max(span.first, position)
