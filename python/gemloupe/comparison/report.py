"""What a comparison found: tables, the first divergence, KL and top-1 by position."""

from __future__ import annotations

import fnmatch
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemloupe.comparison.walk import (
    AMPLIFIED,
    DIVERGES,
    MEANING,
    ROUNDING,
    OtherChoice,
    PointError,
)
from gemloupe.errors import did_you_mean, quoted

_MOST_ROWS = 40


@dataclass(frozen=True)
class Divergence:
    """Where both sides part. `got` is the model's value, `expected` the reference's."""

    name: str
    layer: int
    prompt: int
    position: int
    index: tuple[int, ...]
    got: float
    expected: float
    error: float
    bound: float | None
    side: str
    """Which side is off its own operation in float64: "model", "reference" or "" (unknown)."""
    tensors: tuple[str, ...]
    """Weights that differ, or that may."""
    why: str

    def __str__(self) -> str:
        where = f"{self.name} at position {self.position}"
        if self.prompt:
            where += f" of prompt {self.prompt}"
        bound = "" if self.bound is None else f", rounding explains {self.bound:.2g}"
        return (
            f"{where}: got {self.got:.7g}, expected {self.expected:.7g}, off by "
            f"{self.error:.3g}{bound}. {self.why}"
        )


@dataclass(frozen=True)
class Contribution:
    """What rounding one tensor's weights does."""

    tensor: str
    dtype: str
    output_error: float
    """|x (W - W_ref)ᵀ| / |x W_refᵀ| over the reference's own inputs x: how wrong its output is."""
    weight_error: float | None
    """|W - W_ref| / |W_ref|; None where the reference has no weights."""
    kl: float | None = None
    """Mean KL of the reference with this tensor alone rounded, where that was asked for."""


class Table:
    """Rows of text with a heading; `rows` are the objects behind them."""

    def __init__(self, heading: Sequence[str], cells: Sequence[Sequence[str]], rows: Sequence[Any]):
        self.heading = tuple(heading)
        self.cells = [tuple(line) for line in cells]
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __repr__(self) -> str:
        lines = [self.heading, *self.cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.heading))]
        texts = []
        for line in lines:
            numbers = (cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))
            texts.append("  ".join([line[0].ljust(widths[0]), *numbers]).rstrip())
        return "\n".join(texts)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in self.heading)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
            for line in self.cells
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(eq=False)
class Report:
    """The result of `gl.compare`; print it, or look at `table()` and `plot()`."""

    model: str
    """What ran in which dtype."""
    reference: str
    points: list[PointError] = field(repr=False)
    """Every point that both sides have, in model order."""
    kl: np.ndarray = field(repr=False)
    """float64 [positions of all prompts, one after the other]: KL(reference || model), nats."""
    top1_agreement: np.ndarray = field(repr=False)
    """bool, as `kl`: whether both have the same most probable token."""
    positions: list[tuple[int, int]] = field(repr=False)
    """(prompt, position) of each entry of `kl`."""
    tokens: list[str] = field(repr=False)
    """The token read at each entry of `kl`; ids in brackets without a tokenizer."""
    own_kl: np.ndarray | None = field(default=None, repr=False)
    """KL(reference || reference in float32) as `kl`, for a reference that is not float32."""
    near_ties: list[OtherChoice] = field(default_factory=list, repr=False)
    """Tokens that take other experts on both sides, ties or not (`is_tie`)."""
    contributions: list[Contribution] = field(default_factory=list, repr=False)
    """Rounded tensors, the largest effect first; empty where none is rounded."""
    not_compared: tuple[str, ...] = field(default=(), repr=False)
    """Points of the model that the reference lacks."""
    notes: tuple[str, ...] = field(default=(), repr=False)
    """What was aligned, forced, or is named otherwise in transformers."""

    @property
    def divergences(self) -> list[Divergence]:
        """Every point with an operation that differs by more than noise, in model order."""
        return [_divergence(point) for point in self.points if point.verdict == DIVERGES]

    @property
    def first_divergence(self) -> Divergence | None:
        """The first of `divergences`; None where float noise explains all differences."""
        return next((_divergence(p) for p in self.points if p.verdict == DIVERGES), None)

    def __getitem__(self, name: str) -> PointError:
        for point in self.points:
            if point.name == name:
                return point
        hint = did_you_mean(name, [point.name for point in self.points])
        raise KeyError(f"{quoted(name)} was not compared. {hint}".rstrip())

    def table(self, which: int | str | None = None) -> Table:
        """Errors as a table: by layer, or of the points of one layer, or of a name pattern.

        None: one row for each layer, with its largest relative error. An int: that layer's points.
        A pattern such as "layers.*.attn.z": the points that it matches; "*" is all of them.
        KeyError where nothing matches.
        """
        if which is None:
            return self._by_layer()
        if isinstance(which, int):
            rows = [point for point in self.points if point.layer == which]
        else:
            rows = [point for point in self.points if fnmatch.fnmatch(point.name, which)]
        if not rows:
            raise KeyError(
                f"{quoted(which)} matches none of the {len(self.points)} points that were compared"
            )
        heading = ["point", "max error", "rms", "relative", "rounding"]
        ratio = any(point.ratio is not None for point in rows)
        heading += ["own rms", "ratio"] if ratio else []
        heading.append("verdict")
        cells = []
        for point in rows:
            cell = [point.name, _figure(point.error), _figure(point.rms), _figure(point.relative)]
            cell.append(_figure(point.bound))
            if ratio:
                cell += [_figure(point.own), _figure(point.ratio)]
            cells.append([*cell, point.verdict])
        return Table(heading, cells, rows)

    def _by_layer(self) -> Table:
        groups: dict[str, list[PointError]] = {}
        for point in self.points:
            groups.setdefault(_group(point), []).append(point)
        cells, rows = [], []
        for name, points in groups.items():
            worst = max(points, key=lambda p: p.relative)
            out = next((p for p in points if p.point.endswith("resid_post")), points[-1])
            ratios = [p.ratio for p in points if p.ratio is not None]
            cells.append(
                [
                    name,
                    _figure(out.error),
                    _figure(out.relative),
                    worst.point,
                    _figure(worst.relative),
                    _figure(max(ratios, default=None)),
                    str(sum(p.verdict == DIVERGES for p in points) or ""),
                ]
            )
            rows.append(points)
        heading = ["", "output error", "relative", "worst point", "relative", "ratio", "diverging"]
        if not any(line[5] != "" for line in cells):
            heading = heading[:5] + heading[6:]
            cells = [line[:5] + line[6:] for line in cells]
        return Table(heading, cells, rows)

    def contributions_table(self, most: int = 20) -> Table:
        """The rounded tensors with the largest effect, at most `most`."""
        rows = self.contributions[:most]
        cells = [
            [c.tensor, c.dtype, _figure(c.output_error), _figure(c.weight_error), _figure(c.kl)]
            for c in rows
        ]
        heading = ["tensor", "dtype", "output error", "weight error", "KL alone"]
        return Table(heading, cells, rows)

    def plot(self, ax: Any = None) -> Any:
        """Relative error of each point by layer; see `gemloupe.plot.compare.errors`."""
        from gemloupe.plot import compare

        return compare.errors(self, ax=ax)

    def _summary(self) -> list[tuple[str, str]]:
        prompts = len({prompt for prompt, _ in self.positions})
        rows = [
            ("model", self.model),
            ("reference", self.reference),
            ("inputs", f"{_count(prompts, 'prompt')}, {_count(len(self.positions), 'position')}"),
            ("compared", _count(len(self.points), "hook point")),
        ]
        if len(self.kl):
            kl = f"mean {self.kl.mean():.3g}, largest {self.kl.max():.3g} nats"
            if self.own_kl is not None:
                kl += f" (the reference's own rounding: mean {self.own_kl.mean():.3g})"
            rows.append(("KL", kl))
            same = int(self.top1_agreement.sum())
            rows.append(("top-1", f"{same} of {len(self.kl)} positions agree"))
        first = self.first_divergence
        if first is None:
            rows.append(("divergence", self._no_divergence()))
        else:
            more = len(self.divergences) - 1
            rows.append(("divergence", f"{first}" + (f" ({more} more points)" if more else "")))
        if self.near_ties:
            ties = sum(choice.is_tie for choice in self.near_ties)
            rows.append(
                (
                    "experts",
                    f"{_count(len(self.near_ties), 'token')} took other experts, {ties} of them "
                    f"near ties; first {self.near_ties[0]}",
                )
            )
        if self.contributions:
            worst = ", ".join(
                f"{c.tensor} ({_figure(c.kl if c.kl is not None else c.output_error)})"
                for c in self.contributions[:3]
            )
            measure = "KL alone" if self.contributions[0].kl is not None else "output error"
            rows.append(("rounding", f"{len(self.contributions)} tensors; by {measure}: {worst}"))
        return rows + [("note", note) for note in self.notes]

    def _no_divergence(self) -> str:
        grown = [point for point in self.points if point.verdict == AMPLIFIED]
        rounded = [point for point in self.points if point.verdict == ROUNDING]
        worst = max(grown + rounded, key=lambda p: p.relative, default=None)
        if rounded and worst:
            return (
                "none but the rounding of the weights, whose effect has grown to "
                f"{worst.relative:.2g} at {worst.name}"
            )
        if worst:
            return (
                f"none; each operation agrees with its own float64 on both sides, and noise that "
                f"came in has grown to {worst.relative:.2g} at {worst.name}"
            )
        return f"none: {MEANING['noise']}"

    def __repr__(self) -> str:
        lines = ["Comparison"]
        lines += [f"  {name:<10}  {text}" for name, text in self._summary()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
            for name, text in self._summary()
        )
        return f"<table>{rows}</table>{self._by_layer()._repr_html_()}"


def _group(point: PointError) -> str:
    if point.layer >= 0:
        return f"layer {point.layer}"
    tower, _, rest = point.name.partition(".")
    if tower in ("vision", "audio"):
        return f"{tower} layer {rest.split('.')[1]}" if rest.startswith("layers.") else tower
    return "input" if point.name.startswith(("embed", "per_layer")) else "output"


def _divergence(point: PointError) -> Divergence:
    return Divergence(
        name=point.name,
        layer=point.layer,
        prompt=point.prompt,
        position=point.position,
        index=point.index,
        got=point.got,
        expected=point.expected,
        error=abs(point.got - point.expected),
        bound=point.bound,
        side=point.side,
        tensors=point.tensors,
        why=point.why,
    )


def _figure(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.2e}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
