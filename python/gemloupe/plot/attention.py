"""One head's attention pattern: from which token to which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.errors import quoted
from gemloupe.plot.heat_map import grid_size, heat_map
from gemloupe.plot.style import INK, colour_bar, label_tokens

if TYPE_CHECKING:
    from gemloupe.run import Run


def attention(run: Run, layer: int, head: int, *, ax: Any = None) -> Any:
    """Shows a head's attention pattern, rows looking at columns, and returns the axes.

    `run` captured f"layers.{layer}.attn.pattern" [N, T, S]. Cells where nothing was attended to
    are empty: later positions, and those outside a sliding window. KeyError where it was not
    captured, ValueError for a head that the layer does not have.
    """
    name = f"layers.{layer}.attn.pattern"
    pattern = run[name]
    if not -len(pattern) <= head < len(pattern):
        raise ValueError(f"head is {quoted(head)}; expected 0 to {len(pattern) - 1}")
    own = np.asarray(pattern[head])
    shown = np.where(own > 0, own, np.nan)
    size = grid_size(own.shape[1], own.shape[0], (0.22, 0.22))
    ax, image = heat_map(shown, ax, size, "viridis", (0.0, 1.0))
    reads, sees = run.prompt.tokens, _keys(run, own.shape[1])
    label_tokens(ax.xaxis, sees)
    label_tokens(ax.yaxis, reads)
    ax.set_xlabel("attended to")
    ax.set_ylabel("token read")
    ax.set_title(f"layer {layer}, head {head % len(pattern)}", color=INK, fontsize=9)
    colour_bar(image, ax, "attention")
    return ax


def _keys(run: Run, count: int) -> list[str]:
    """Tokens of all positions that the pass saw: those of the cache, then the run's own."""
    own = run.prompt.tokens
    if count == len(own):
        return own
    before = count - len(own)
    if run.cache is not None and len(run.cache.tokens) >= before:
        return [*run.prompt.tokenizer.tokens(run.cache.tokens[:before]), *own]
    return [*(str(position) for position in range(before)), *own]
