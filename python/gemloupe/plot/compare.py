"""Plots of a comparison: errors by layer and point, KL by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.comparison.walk import DIVERGES, TOWERS
from gemloupe.plot import style

if TYPE_CHECKING:
    from gemloupe.comparison.report import Report

# Smaller relative errors are shown as this: float32's last bits.
_LEAST = 1e-9


def errors(report: Report, ax: Any = None) -> Any:
    """Draws log10 of each point's relative error, points across and layers down; returns the Axes.

    Crosses mark the points that diverge, a ring the first of them. What lies before and after the
    layers has rows of its own; points of towers are left out. ImportError where matplotlib is
    missing.
    """
    points = [p for p in report.points if not p.name.startswith(TOWERS)] or report.points
    layers = sorted({p.layer for p in points if p.layer >= 0})
    columns = list(dict.fromkeys(p.point for p in points))
    rows = ["input", *(str(layer) for layer in layers), "output"]
    values = np.full((len(rows), len(columns)), np.nan)
    crosses, first = [], None
    for point in points:
        if point.layer >= 0:
            row = 1 + layers.index(point.layer)
        else:
            row = 0 if point.name.startswith(("embed", "per_layer")) else len(rows) - 1
        column = columns.index(point.point)
        values[row, column] = np.log10(max(point.relative, _LEAST))
        if point.verdict == DIVERGES:
            crosses.append((column, row))
            first = first or (column, row)
    ax = style.new_axes(ax, (max(6.0, 0.22 * len(columns) + 2.5), max(3.0, 0.2 * len(rows) + 2.2)))
    image = ax.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    style.colour_bar(image, ax, "log10 relative error")
    if crosses:
        ax.scatter(*zip(*crosses, strict=True), marker="x", s=22, color=style.COLOURS[5])
    if first:
        ax.scatter(
            *first, marker="o", s=130, facecolors="none", edgecolors=style.COLOURS[5], linewidths=2
        )
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    step = max(1, len(rows) // 40)
    ax.set_yticks(range(0, len(rows), step), rows[::step], fontsize=7)
    ax.set_ylabel("layer")
    ax.set_title(f"{report.model}\nagainst {report.reference}", fontsize=8)
    return ax


def kl(report: Report, ax: Any = None) -> Any:
    """Draws KL(reference || model) of each position, tokens below; returns the Axes.

    Rings mark positions whose most probable token differs; a line shows the reference's own
    rounding where it is not float32. ImportError where matplotlib is missing.
    """
    ax = style.new_axes(ax, (max(5.0, min(14.0, 0.22 * len(report.kl) + 2.0)), 3.6))
    places = np.arange(len(report.kl))
    floor = max(float(report.kl.max(initial=0)) * 1e-6, 1e-16)
    label = "KL(reference || model)"
    ax.bar(places, np.maximum(report.kl, floor), color=style.COLOURS[0], label=label)
    if report.own_kl is not None:
        own = np.maximum(report.own_kl, floor)
        ax.plot(places, own, color=style.COLOURS[1], label="the reference's own rounding")
    other = np.flatnonzero(~report.top1_agreement)
    if len(other):
        ax.scatter(
            other,
            np.maximum(report.kl[other], floor) * 1.5,
            marker="o",
            facecolors="none",
            edgecolors=style.COLOURS[5],
            label="another most probable token",
        )
    ax.set_yscale("log")
    ink = ax.yaxis.label.get_color()
    ax.tick_params(which="minor", colors=ink)
    ax.set_ylabel("nats")
    ax.set_xlabel("token read")
    style.label_tokens(ax.xaxis, report.tokens)
    ax.legend(fontsize=7, frameon=False, labelcolor=ink)
    ax.set_title(f"{report.model}\nagainst {report.reference}", fontsize=8)
    return ax
