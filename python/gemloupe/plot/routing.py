"""Plots of routers: which experts are used, for which tokens, together with which, what changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gemloupe.errors import quoted
from gemloupe.plot.style import COLOURS, colour_bar, label_tokens, new_axes
from gemloupe.router_trace import RouterTrace
from gemloupe.routing_drift import RouterDrift
from gemloupe.routing_stats import RoutingStats, layer_index
from gemloupe.token_classes import CLASSES

_ABSENT = "#a0a0a0"
"""Cells without a value, on pages of any colour."""


def routing(trace: RouterTrace | RoutingStats, layer: int | None = None, ax: Any = None) -> Any:
    """Plots where tokens went; returns the Axes.

    Without `layer`: a heat map, layers x experts, of each expert's load times E, which is 1 where
    all are used equally. With `layer`: tokens x experts, the router's probabilities at level
    "full", the chosen experts marked, else their weights (sum 1). ValueError where the layer has
    no experts, and for one layer of `RoutingStats`, which keep no tokens.
    """
    if layer is None:
        return _load(trace, ax)
    if isinstance(trace, RoutingStats):
        raise ValueError("RoutingStats keep no tokens; plot one layer of a RouterTrace instead")
    return _choices(trace, layer, ax)


def _load(trace: RouterTrace | RoutingStats, ax: Any) -> Any:
    load = trace.load() * trace.num_experts
    ax = new_axes(ax, _size(trace.num_experts, len(load), 0.07, 0.16))
    image = ax.imshow(load, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    colour_bar(image, ax, "load / uniform load")
    _number(ax.yaxis, trace.layers.tolist())
    ax.set(xlabel="expert", ylabel="layer", title="Load of experts")
    return ax


def _choices(trace: RouterTrace, layer: int, ax: Any) -> Any:
    index = layer_index(trace.layers, layer)
    experts, rows = trace.experts[index], np.arange(len(trace))[:, None]
    ax = new_axes(ax, _size(trace.num_experts, len(trace), 0.07, 0.16))
    if trace.probs is not None:
        values, label = trace.probs[index], "probability"
    else:
        values = np.zeros((len(trace), trace.num_experts), np.float32)
        values[rows, experts] = trace.weights_norm[index]
        label = "weight (0: not chosen)"
    image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    if trace.probs is not None:
        dots = np.broadcast_to(rows, experts.shape).ravel()
        ax.scatter(experts.ravel(), dots, s=9, c="white", edgecolors="black", linewidths=0.5)
    colour_bar(image, ax, label)
    label_tokens(ax.yaxis, trace.token_strings)
    marks = "" if trace.probs is None else " (dots: chosen)"
    ax.set(xlabel="expert", ylabel="token", title=f"Experts of layer {layer}{marks}")
    return ax


def token_classes(trace: RouterTrace, layer: int, ax: Any = None) -> Any:
    """Plots which experts of a layer prefer which classes of tokens; returns the Axes.

    A heat map, classes x experts, of log2(lift): share of the class's choices over the expert's
    load. Grey: the class never chose it. ValueError where the layer has no experts.
    """
    index = layer_index(trace.layers, layer)
    load = trace.load()[index]
    counts = {name: int((trace.token_classes == name).sum()) for name in CLASSES}
    present = [name for name in CLASSES if counts[name]]
    parts = [trace.select(trace.token_classes == name).load()[index] for name in present]
    share = np.stack(parts) if parts else np.zeros((0, trace.num_experts))
    lift = np.divide(share, load, out=np.full(share.shape, np.nan), where=share > 0)
    logs = np.log2(lift)
    most = max(1.0, float(np.nanmax(np.abs(logs), initial=0.0)))
    ax = new_axes(ax, _size(trace.num_experts, len(present), 0.07, 0.4))
    image = ax.imshow(
        logs, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-most, vmax=most
    )
    image.set_cmap(image.cmap.with_extremes(bad=_ABSENT))
    colour_bar(image, ax, "log2(lift)")
    ax.set_yticks(range(len(present)), [f"{name} ({counts[name]})" for name in present])
    ax.set(xlabel="expert", ylabel="class (tokens)", title=f"Experts by token class, layer {layer}")
    return ax


def coactivation(trace: RouterTrace | RoutingStats, layer: int, ax: Any = None) -> Any:
    """Plots which experts of a layer are chosen together; returns the Axes.

    A heat map, experts x experts: of the tokens that chose the row's expert, the share that also
    chose the column's. Grey: itself, and rows of experts that no token chose. ValueError where the
    layer has no experts, or statistics were kept without co-activation.
    """
    counts = trace.coactivation(layer).astype(np.float64)
    chosen = counts.diagonal()[:, None]
    share = np.divide(counts, chosen, out=np.full(counts.shape, np.nan), where=chosen > 0)
    np.fill_diagonal(share, np.nan)
    ax = new_axes(ax, (6.0, 5.0))
    image = ax.imshow(share, interpolation="nearest", cmap="viridis", vmin=0)
    image.set_cmap(image.cmap.with_extremes(bad=_ABSENT))
    colour_bar(image, ax, "share of the row's tokens")
    ax.set(xlabel="also chosen", ylabel="expert", title=f"Experts chosen together, layer {layer}")
    return ax


def routing_drift(drift: RouterDrift, by: str = "layer", ax: Any = None) -> Any:
    """Plots how routing changed; returns the Axes.

    `by` "layer": lines over layers, all in 0 … 1: 1 − Jaccard index of the expert sets, the JS
    divergence over its largest value ln 2 (traces of level "full"), both means over tokens with
    the 10th to 90th percentile shaded, and the share of choices that moved to other experts. `by`
    "token": a heat map, layers x tokens, of JS divergence, else of 1 − Jaccard index.
    """
    if by == "layer":
        return _drift_by_layer(drift, ax)
    if by != "token":
        raise ValueError(f'by is {quoted(by)}; expected "layer" or "token"')
    values, label = (1 - drift.jaccard, "1 − Jaccard index")
    if drift.js is not None:
        values, label = drift.js, "JS divergence (nats)"
    ax = new_axes(ax, _size(values.shape[1], len(values), 0.16, 0.2))
    image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    colour_bar(image, ax, label)
    label_tokens(ax.xaxis, drift.token_strings)
    _number(ax.yaxis, drift.layers.tolist())
    ax.set(xlabel="token", ylabel="layer", title="Drift of routing")
    return ax


def _drift_by_layer(drift: RouterDrift, ax: Any) -> Any:
    ax = new_axes(ax)
    lines = [("1 − Jaccard index", 1 - drift.jaccard)]
    if drift.js is not None:
        lines.append(("JS divergence / ln 2", drift.js / math.log(2)))
    for colour, (label, values) in zip(COLOURS, lines, strict=False):
        ax.plot(drift.layers, values.mean(-1), color=colour, marker="o", markersize=3, label=label)
        low, high = np.percentile(values, [10, 90], axis=-1)
        ax.fill_between(drift.layers, low, high, color=colour, alpha=0.2, linewidth=0)
    moved = np.abs(drift.load_change).sum(-1) / 2
    ax.plot(drift.layers, moved, color=COLOURS[2], marker="s", markersize=3, label="load moved")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylim(bottom=0)
    ax.set(xlabel="layer", ylabel="drift (0: none, 1: all)", title="Drift of routing")
    ax.legend(frameon=False, labelcolor=ax.xaxis.label.get_color())
    return ax


def _size(columns: int, rows: int, wide: float, high: float) -> tuple[float, float]:
    """Inches for a heat map with cells of about `wide` x `high` inches, as far as screens go."""
    return (
        min(max(5.0, 2.5 + wide * columns), 14.0),
        min(max(2.5, 1.2 + high * rows), 12.0),
    )


def _number(axis: Any, layers: list[int], most: int = 32) -> None:
    """Labels rows with the model's layer numbers, every n-th where more than `most`."""
    step = max(1, -(-len(layers) // most))
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
