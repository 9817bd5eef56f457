"""What all plots share: readable on light and on dark pages, token strings as labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemloupe.errors import missing_extra

# Mid-tones that stand out from white and from black; told apart with colour blindness (Okabe, Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK = "#7f7f7f"
_LONGEST_LABEL = 12


def new_axes(ax: Any = None, size: tuple[float, float] = (7.0, 4.0)) -> Any:
    """Returns `ax`, or new axes of `size` inches, with text and lines readable on any background.

    ImportError, naming the extra, where matplotlib is missing.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise missing_extra("matplotlib", "gemloupe.plot", "plot") from None
    if ax is None:
        figure, ax = pyplot.subplots(figsize=size, layout="constrained")
        figure.patch.set_alpha(0.0)
    ax.patch.set_alpha(0.0)
    for spine in ax.spines.values():
        spine.set_color(INK)
    ax.tick_params(colors=INK)
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set_color(INK)
    return ax


def colour_bar(image: Any, ax: Any, label: str) -> None:
    """Adds a colour bar with the ink of the axes."""
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(label, color=INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_edgecolor(INK)


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Returns token strings as axis labels: spaces and line ends visible, long ones cut."""
    labels = []
    for token in tokens:
        shown = token.replace("\u2581", "·").replace("\n", "\\n").replace("$", "\\$")
        cut = shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 1] + "…"
        labels.append(cut or "∅")
    return labels


def label_tokens(axis: Any, tokens: Sequence[str], most: int = 60) -> None:
    """Labels an axis of positions with tokens; every n-th where more than `most` would overlap."""
    step = max(1, -(-len(tokens) // most))
    axis.set_ticks(range(0, len(tokens), step), token_labels(tokens)[::step])
    if axis.axis_name == "x":
        axis.set_tick_params(rotation=90)
