"""What a KV cache holds: one bar for each layer over the positions of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemloupe.errors import format_bytes
from gemloupe.plot.style import COLOURS, new_axes

if TYPE_CHECKING:
    from gemloupe.cache import CacheLayer, KvCache

_FULL, _SLIDING = COLOURS[:2]
_INK = "#7f7f7f"
_HEIGHT = 0.7


def cache(cache: KvCache, ax: Any = None) -> Any:
    """Plots occupancy, windows and sharing of a cache; returns the Axes.

    A filled bar is what a layer holds. Of a sliding layer the window that the next query sees is
    dark, what is held beside it pale, and an outline marks the positions given back. A layer that
    shares has a dashed outline, and a line on the right leads to the layer whose entries it reads.
    """
    layers = list(cache.layers)
    ax = new_axes(ax, (7.0, max(2.5, 0.16 * len(layers) + 1.2)))
    length, start = cache.length, cache.start
    span = max(1, length - start)
    for layer in layers:
        _bar(ax, layer, start, length)
    lanes = _links(ax, layers, length, span)
    ax.set_xlim(start - 0.01 * span, length + (0.03 + 0.03 * lanes) * span)
    ax.set_ylim(len(layers) - 0.4, -0.6)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("position")
    ax.set_ylabel("layer")
    ax.set_title(
        f"{len(cache)} of {cache.max_tokens} tokens, {cache.dtype}, {format_bytes(cache.nbytes)}"
    )
    _legend(ax, layers)
    return ax


def _bar(ax: Any, layer: CacheLayer, start: int, length: int) -> None:
    outline = {"height": _HEIGHT, "left": start, "facecolor": "none", "edgecolor": _INK}
    if layer.kind == "shared":
        ax.barh(layer.index, length - start, linestyle="--", linewidth=0.7, **outline)
        return
    positions = layer.positions
    first = int(positions[0]) if len(positions) else length
    if first > start:
        ax.barh(layer.index, first - start, linewidth=0.5, **outline)
    colour = _SLIDING if layer.window else _FULL
    seen = max(first, length - layer.window + 1) if layer.window else first
    ax.barh(layer.index, seen - first, _HEIGHT, left=first, color=colour, alpha=0.35, linewidth=0)
    ax.barh(layer.index, length - seen, _HEIGHT, left=seen, color=colour, linewidth=0)


def _links(ax: Any, layers: list[CacheLayer], length: int, span: int) -> int:
    """Draws a lane from each source to the layers that read it; returns the number of lanes."""
    readers: dict[int, list[int]] = {}
    for layer in layers:
        if layer.kind == "shared":
            readers.setdefault(layer.source_layer, []).append(layer.index)
    for lane, (source, shared) in enumerate(sorted(readers.items())):
        x = length + (0.03 + 0.03 * lane) * span
        colour = _SLIDING if layers[source].window else _FULL
        ax.plot([x, x], [source, max(shared)], color=colour, linewidth=1.2)
        for index in shared:
            ax.plot([length, x], [index, index], color=colour, linewidth=0.8)
        ax.annotate(
            "", (length, source), (x, source),
            arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.2},
        )  # fmt: skip
    return len(readers)


def _legend(ax: Any, layers: list[CacheLayer]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    kinds = {layer.kind for layer in layers}
    handles = []
    if "full" in kinds:
        handles.append(Patch(color=_FULL, label="full"))
    if "sliding" in kinds:
        handles.append(Patch(color=_SLIDING, label="in the window"))
        handles.append(Patch(color=_SLIDING, alpha=0.35, linewidth=0, label="held beside it"))
        handles.append(Patch(facecolor="none", edgecolor=_INK, label="given back"))
    if "shared" in kinds:
        handles.append(
            Patch(facecolor="none", edgecolor=_INK, linestyle="--", label="reads another layer")
        )
    # Below the label of the axis, whatever the height of the axes.
    below = ax.transAxes + ScaledTranslation(0, -0.45, ax.figure.dpi_scale_trans)
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below,
        ncols=len(handles), frameon=False, labelcolor=_INK, fontsize="small",
    )  # fmt: skip
