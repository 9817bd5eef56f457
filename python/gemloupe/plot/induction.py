"""Induction scores of all heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.plot.heat_map import grid_size, heat_map, label_layers, write_cells
from gemloupe.plot.style import INK, colour_bar

if TYPE_CHECKING:
    from gemloupe.analysis.induction import InductionScores


def induction(scores: InductionScores, *, ax: Any = None) -> Any:
    """Shows the score of each head beside its control, and returns the two axes.

    Left: attention to what followed the token before; right: to a random earlier token. With `ax`
    only the scores are drawn, and one axes is returned.
    """
    rows, columns = scores.values.shape
    if ax is not None:
        return _panel(scores.values, "induction score", ax)
    from gemloupe.plot.style import new_axes

    width, height = grid_size(2 * columns, rows, (0.5, 0.26))
    first = new_axes(None, (width + 1.5, height))
    figure = first.figure
    first.remove()
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, title in (
        (left, scores.values, "induction score"),
        (right, scores.control, "control: random earlier token"),
    ):
        _panel(values, title, axes)
    right.set_ylabel("")
    return np.array([left, right])


def _panel(values: np.ndarray, title: str, ax: Any) -> Any:
    size = grid_size(values.shape[1], values.shape[0], (0.5, 0.26))
    ax, image = heat_map(values[::-1], ax, size, "viridis", (0.0, 1.0))
    texts = np.array([[f"{v:.2f}" for v in row] for row in values[::-1]], dtype=object)
    write_cells(ax, image, texts)
    label_layers(ax, list(range(len(values)))[::-1])
    ax.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 16)))
    ax.set_xlabel("head")
    ax.set_title(title, color=INK, fontsize=9)
    colour_bar(image, ax, "mean attention")
    return ax
