"""Direct logit attribution: what each component adds to a logit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.plot.heat_map import grid_size, heat_map, label_layers
from gemloupe.plot.style import COLOURS, INK, colour_bar, label_tokens, new_axes, token_labels

if TYPE_CHECKING:
    from gemloupe.analysis.attribution import Attribution

_KINDS = ("embed", "attn", "ffn", "per_layer", "head", "mlp", "expert")
_COLOUR = dict(
    zip(_KINDS, (COLOURS[4], *COLOURS[:3], COLOURS[0], COLOURS[1], COLOURS[3]), strict=True)
)
_MOST_BARS = 24


def attribution(attribution: Attribution, column: int | None = None, *, ax: Any = None) -> Any:
    """Shows an attribution and returns the axes.

    One position (`column` of the attribution, or its only one): bars by layer and kind, or where
    heads or experts were split, the components of largest size. Several positions: a table of
    layers by tokens, each cell the sum over the layer's components.
    """
    if column is None and attribution.values.shape[1] > 1:
        return _table(attribution, ax)
    column = column or 0
    if (attribution.indices >= 0).any():
        ax = _largest(attribution, column, ax)
    else:
        ax = _by_layer(attribution, column, ax)
    after = token_labels([attribution.tokens[column]])[0]
    target = _shown(attribution.target)
    ax.set_title(
        f"logit of {target} after {after}: {attribution.logit[column]:.2f}", color=INK, fontsize=9
    )
    return ax


def _by_layer(attribution: Attribution, column: int, ax: Any) -> Any:
    ax = new_axes(ax, (8.0, 3.6))
    kinds = [kind for kind in _KINDS if kind in attribution.kinds]
    layers = int(attribution.layers.max()) + 2
    blocks = [kind for kind in kinds if kind != "embed"]
    width = 0.8 / len(blocks)
    ax.axhline(0, color=INK, linewidth=0.8)
    for place, kind in enumerate(blocks):
        values = attribution.by_layer(kind)[:, column]
        x = np.arange(layers) + (place - (len(blocks) - 1) / 2) * width
        ax.bar(x[1:], values[1:], width, color=_COLOUR[kind], label=kind)
    embed = attribution.by_layer("embed")[0, column]
    ax.bar([0], [embed], 0.5, color=_COLOUR["embed"], label="embed")
    _legend(ax)
    step = max(1, layers // 24)
    names = ["embed", *map(str, range(layers - 1))]
    ax.set_xticks(range(0, layers, step), names[::step])
    ax.set_xlabel("layer")
    ax.set_ylabel("added to the logit")
    return ax


def _largest(attribution: Attribution, column: int, ax: Any) -> Any:
    best = attribution.top(_MOST_BARS, column)[::-1]
    kinds = dict(zip(attribution.names, attribution.kinds, strict=True))
    ax = new_axes(ax, (6.4, 0.24 * len(best) + 1.2))
    for row, (name, value) in enumerate(best):
        ax.barh(row, value, 0.7, color=_COLOUR[kinds[name]])
    for kind in [kind for kind in _KINDS if kind in {kinds[name] for name, _ in best}]:
        ax.bar(0, 0, color=_COLOUR[kind], label=kind)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_yticks(range(len(best)), [name.removeprefix("layers.") for name, _ in best])
    ax.tick_params(axis="y", labelsize=7)
    _legend(ax)
    ax.set_xlabel("added to the logit")
    return ax


def _table(attribution: Attribution, ax: Any) -> Any:
    values = attribution.by_layer()[::-1]
    most = float(np.abs(values).max()) or 1.0
    size = grid_size(values.shape[1], values.shape[0], (0.36, 0.22))
    ax, image = heat_map(values, ax, size, "RdBu_r", (-most, most))
    label_layers(ax, list(range(-1, len(values) - 1))[::-1])
    label_tokens(ax.xaxis, attribution.tokens)
    ax.set_xlabel("token read")
    colour_bar(image, ax, f"added to the logit of {_shown(attribution.target)}")
    return ax


def _legend(ax: Any) -> None:
    legend = ax.legend(frameon=False, fontsize=8, loc="best")
    for text in legend.get_texts():
        text.set_color(INK)


def _shown(target: str) -> str:
    return " − ".join(token_labels([part])[0] for part in target.split(" − "))
