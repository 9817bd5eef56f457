"""What differs between two KV caches, by layer and position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from gemloupe.cache import KvCache

# Floats of keys and of values that are read at a time.
_READ_FLOATS = 1 << 22


class FirstDifference(NamedTuple):
    layer: int
    position: int


@dataclass(frozen=True, eq=False)
class LayerDiff:
    """One layer that stores entries. Arrays are float32 [S], one figure for each position.

    Absolute: the largest |a − b| over heads and dims; infinite where only one of the two is NaN or
    infinite. Relative: that, over the largest |a| or |b| of the position.
    """

    layer: int
    positions: np.ndarray
    """int64 [S]: the positions that both caches hold."""
    keys: np.ndarray
    values: np.ndarray
    keys_relative: np.ndarray
    values_relative: np.ndarray

    @property
    def first(self) -> int | None:
        """The first position where keys or values differ, or None."""
        differing = np.flatnonzero((self.keys > 0) | (self.values > 0))
        return int(self.positions[differing[0]]) if len(differing) else None


@dataclass(frozen=True, eq=False)
class CacheDiff:
    """What `KvCache.diff` gives; print it. False (as a bool) where nothing differs."""

    layers: tuple[LayerDiff, ...]

    @property
    def first(self) -> FirstDifference | None:
        """The lowest layer that differs and the first position there, or None."""
        for layer in self.layers:
            if layer.first is not None:
                return FirstDifference(layer.layer, layer.first)
        return None

    @property
    def first_position(self) -> int | None:
        """The first position that differs in any layer, or None."""
        return min((x.first for x in self.layers if x.first is not None), default=None)

    @property
    def max_abs(self) -> float:
        """The largest difference of all keys and values."""
        return max((_largest(x.keys, x.values) for x in self.layers), default=0.0)

    def __bool__(self) -> bool:
        return self.first is not None

    def table(self) -> str:
        """Returns the layers that differ, one a line."""
        head = ("layer", "first position", "differing", "keys", "relative", "values", "relative")
        rows: list[tuple[str, ...]] = [head]
        for layer in self.layers:
            if layer.first is None:
                continue
            count = int(((layer.keys > 0) | (layer.values > 0)).sum())
            figures = (layer.keys, layer.keys_relative, layer.values, layer.values_relative)
            rows.append(
                (
                    str(layer.layer),
                    str(layer.first),
                    f"{count} of {len(layer.positions)}",
                    *(f"{_largest(figure):.3g}" for figure in figures),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )

    def __repr__(self) -> str:
        if self.first is None:
            return f"CacheDiff(no difference in {len(self.layers)} layers)"
        layer, position = self.first
        return f"CacheDiff(first in layer {layer} at position {position})\n{self.table()}"


def _largest(*arrays: np.ndarray) -> float:
    return max((float(array.max()) for array in arrays if array.size), default=0.0)


def diff(a: KvCache, b: KvCache) -> CacheDiff:
    if a.core.model_id != b.core.model_id:
        raise ValueError("the other cache belongs to another model; expected one of the same")
    if (a.start, a.length) != (b.start, b.length):
        raise ValueError(
            f"the other cache holds positions {b.start} to {b.length - 1}; expected "
            f"{a.start} to {a.length - 1}"
        )
    sources = [i for i in range(a.core.num_layers) if a.core.layer_source(i) == i]
    return CacheDiff(tuple(_layer_diff(a, b, i) for i in sources))


def _layer_diff(a: KvCache, b: KvCache, layer: int) -> LayerDiff:
    first = max(a.core.first_position(layer), b.core.first_position(layer))
    heads, head_dim, _pairs = a.core.layer_shape(layer)
    step = max(1, _READ_FLOATS // (heads * head_dim))
    parts: list[list[np.ndarray]] = [[], [], [], []]
    for begin in range(first, a.length, step):
        end = min(a.length, begin + step)
        read = zip(a.core.read(layer, begin, end), b.core.read(layer, begin, end), strict=True)
        for kind, (x, y) in enumerate(read):
            absolute, relative = _differences(x, y)
            parts[kind].append(absolute)
            parts[kind + 2].append(relative)
    empty = np.zeros(0, np.float32)
    columns = [np.concatenate(part) if part else empty for part in parts]
    return LayerDiff(layer, np.arange(first, a.length), *columns)


def _differences(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest absolute difference of each row, and that over the row's largest number."""
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore", over="ignore"):
        absolute = np.where(same, np.float32(0), np.abs(x - y))
    absolute = np.where(np.isnan(absolute), np.float32(np.inf), absolute).max(axis=(1, 2))
    size = np.maximum(np.abs(x), np.abs(y)).max(axis=(1, 2), initial=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(absolute > 0, absolute / size, np.float32(0))
    relative = np.where(np.isnan(relative), np.float32(np.inf), relative)
    return absolute, relative.astype(np.float32)
