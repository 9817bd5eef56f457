"""A grid of activation patching: layers by positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.errors import one_of, quoted
from gemloupe.plot.heat_map import grid_size, heat_map, label_layers
from gemloupe.plot.style import INK, colour_bar, label_tokens, token_labels

if TYPE_CHECKING:
    from gemloupe.analysis.patching import PatchingGrid


def patching(grid: PatchingGrid, show: str = "restored", *, ax: Any = None) -> Any:
    """Shows what each patch restores, the last layer on top, and returns the axes.

    `show`: "restored" (0: as corrupted, 1: as clean) or "values" (the metric itself). Hatched
    cells cannot change the last position's logits and were not computed.
    """
    if show not in ("restored", "values"):
        raise ValueError(f"show is {quoted(show)}; expected {one_of(['restored', 'values'])}")
    values = grid.restored if show == "restored" else grid.values
    shown = np.where(grid.computed, values, np.nan)[::-1]
    middle = 0.0 if show == "restored" else grid.corrupted
    moved = np.abs(shown[np.isfinite(shown)] - middle)
    most = float(moved.max()) if moved.size and moved.max() > 0 else 1.0
    size = grid_size(shown.shape[1], shown.shape[0], (0.36, 0.22))
    ax, image = heat_map(shown, ax, size, "RdBu_r", (middle - most, middle + most))
    _hatch(ax, ~grid.computed[::-1])
    label_layers(ax, grid.layers[::-1].tolist())
    label_tokens(ax.xaxis, _both(grid))
    ax.set_xlabel("token (clean/corrupted)" if grid.tokens != grid.corrupted_tokens else "token")
    ax.set_title(f"{grid.point} patched from clean into corrupted", color=INK, fontsize=9)
    label = grid.metric if show == "values" else f"restored {grid.metric}"
    colour_bar(image, ax, label.replace("\u2581", "·").replace("$", "\\$"))
    return ax


def _both(grid: PatchingGrid) -> list[str]:
    """Labels of positions, both tokens where they differ."""
    return [
        a if a == b else f"{token_labels([a])[0]}/{token_labels([b])[0]}"
        for a, b in zip(grid.tokens, grid.corrupted_tokens, strict=True)
    ]


def _hatch(ax: Any, cells: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for row in range(len(cells)):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], cells[row].astype(int), [0]])))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            ax.add_patch(
                Rectangle(
                    (begin - 0.5, row - 0.5), end - begin, 1, fill=False, hatch="////",
                    edgecolor=INK, linewidth=0.0,
                )
            )  # fmt: skip
