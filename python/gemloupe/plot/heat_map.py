"""Tables of numbers as coloured cells, with text in them where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemloupe.plot.style import new_axes

_MOST_TEXTS = 1200


def grid_size(columns: int, rows: int, cell: tuple[float, float]) -> tuple[float, float]:
    """Returns the size of axes in inches for cells of a size, within what a page can show."""
    return (
        float(np.clip(cell[0] * columns + 2.2, 4.0, 16.0)),
        float(np.clip(cell[1] * rows + 1.4, 2.6, 14.0)),
    )


def heat_map(
    values: np.ndarray,
    ax: Any,
    size: tuple[float, float],
    colours: str = "viridis",
    span: tuple[float, float] | None = None,
) -> tuple[Any, Any]:
    """Draws [rows, columns], the first row on top, and returns (axes, image). NaN stays empty.

    `span`: the values of the first and the last colour; None for the smallest and the largest.
    """
    ax = new_axes(ax, size)
    low, high = span if span is not None else (None, None)
    masked = np.ma.masked_invalid(np.asarray(values, float))
    image = ax.imshow(
        masked, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    return ax, image


def write_cells(ax: Any, image: Any, texts: np.ndarray, fontsize: float = 7.0) -> None:
    """Writes texts [rows, columns] into cells, dark on light ones and light on dark ones.

    Nothing is written where there are too many cells to be read.
    """
    if texts.size > _MOST_TEXTS:
        return
    values = np.ma.masked_invalid(image.get_array())
    luminance = image.cmap(image.norm(values))[..., :3] ** 2.2 @ np.array([0.2126, 0.7152, 0.0722])
    empty = np.ma.getmaskarray(values)
    for (row, column), text in np.ndenumerate(texts):
        if text and not empty[row, column]:
            written = "#111111" if luminance[row, column] > 0.18 else "#f5f5f5"
            ax.text(column, row, text, ha="center", va="center", color=written, fontsize=fontsize)


def label_layers(ax: Any, layers: Sequence[int], most: int = 40) -> None:
    """Labels the y axis with layer numbers; −1 is "embed"."""
    step = max(1, -(-len(layers) // most))
    names = ["embed" if layer < 0 else str(layer) for layer in layers]
    ax.set_yticks(range(0, len(layers), step), names[::step])
    ax.set_ylabel("layer")
