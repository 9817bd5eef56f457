"""What one head of one token attends to, for plots over pictures and sounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemloupe.errors import quoted
from gemloupe.plot.style import token_labels

if TYPE_CHECKING:
    from gemloupe.run import Run


@dataclass(frozen=True)
class Look:
    """One row of a pattern."""

    weights: np.ndarray
    """float32 [T]: one weight an id of the prompt."""
    title: str
    """Layer, head and token in words."""


def look(run: Run, layer: int, head: int, token: int) -> Look:
    """Returns what `token`, an index among the prompt's ids, gives to each of them.

    KeyError where f"layers.{layer}.attn.pattern" was not captured; ValueError for a head or token
    that there is not.
    """
    name = f"layers.{layer}.attn.pattern"
    if name not in run.captured:
        raise KeyError(f"{quoted(name)} was not captured; run with capture={quoted(name)}")
    pattern = run[name]
    if not -len(pattern) <= head < len(pattern):
        raise ValueError(f"head is {quoted(head)}; expected 0 to {len(pattern) - 1}")
    count = len(run.prompt)
    if not -count <= token < count:
        raise ValueError(f"token is {quoted(token)}; expected 0 to {count - 1}")
    token, first = token % count, int(run.positions[0])
    rows = np.flatnonzero(run.positions_of(name) == first + token)
    if not len(rows):
        raise ValueError(
            f"token is {token}, but {quoted(name)} was captured at other positions: "
            f"{quoted((run.positions_of(name) - first).tolist())}"
        )
    reader = token_labels([run.prompt.tokens[token]])[0]
    title = f"layer {layer}, head {head % len(pattern)}: \u201c{reader}\u201d"
    return Look(np.asarray(pattern[head, rows[0], first : first + count]), title)
