"""Norms of what an adapter changes, and DoRA's gains, block by block of the base's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemloupe.adapters.modules import Module

if TYPE_CHECKING:
    from gemloupe.adapters.base_weights import BaseWeights

# Rows of a matrix in memory at a time, and as many of its change.
_BLOCK_BYTES = 32 << 20
Progress = Callable[[int], None]
"""Is told how many weights were read since it was last called."""


def no_progress(_count: int) -> None:
    """For those who don't ask how far it is."""


def row_blocks(
    weights: BaseWeights, module: Module, progress: Progress = no_progress
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (first, end, float32 [end - first, in]) of a matrix, dequantised."""
    count = int(np.prod(module.shape[:-1]))
    step = max(1, _BLOCK_BYTES // (4 * module.inputs))
    for first in range(0, count, step):
        end = min(count, first + step)
        yield first, end, weights.rows(module.weight, range(first, end))
        progress((end - first) * module.inputs)


def base_norm(weights: BaseWeights, module: Module, progress: Progress = no_progress) -> float:
    """‖W‖, Frobenius."""
    return float(
        np.sqrt(sum(_square(rows) for _, _, rows in row_blocks(weights, module, progress)))
    )


class Product(NamedTuple):
    """scale · B A: what an adapter adds to a matrix."""

    a: np.ndarray
    """[r, in]; of experts [E, r, in], of an embedding [r, V]."""
    b: np.ndarray
    """[out, r]; of experts [E, out, r], of an embedding [D, r]."""
    scale: float

    def rows(self, module: Module, first: int, end: int) -> np.ndarray:
        """Rows first…end of it in the order of the module's stored matrix.

        Those of experts are the rows of their matrices, one after the other.
        """
        if module.is_experts:
            parts = []
            for expert in range(first // module.outputs, -(-end // module.outputs)):
                begin = expert * module.outputs
                rows = slice(max(0, first - begin), end - begin)
                parts.append(self.b[expert, rows] @ self.a[expert])
            return np.float32(self.scale) * np.concatenate(parts)
        if module.is_embedding:
            return np.float32(self.scale) * (self.a[:, first:end].T @ self.b.T)
        return np.float32(self.scale) * (self.b[first:end] @ self.a)

    def norm(self) -> float:
        """‖scale · B A‖ without B A: ‖B A‖² is the sum of (BᵀB) ∘ (A Aᵀ)."""
        gram_a = self.a.astype(np.float64) @ self.a.swapaxes(-1, -2)
        gram_b = self.b.swapaxes(-1, -2).astype(np.float64) @ self.b
        return abs(self.scale) * float(np.sqrt(max(0.0, float((gram_a * gram_b).sum()))))


class Dora(NamedTuple):
    """DoRA of one module."""

    gain: np.ndarray
    """float32 [out]: m / ‖W + s B A‖ of each output."""
    norm: float
    """‖ΔW‖ with ΔW = gain · (W + s B A) − W."""


def dora(
    weights: BaseWeights,
    module: Module,
    product: Product,
    magnitude: np.ndarray,
    progress: Progress = no_progress,
) -> Dora:
    """The gain of each output, and the norm of what it changes together with the product.

    Of an embedding an output is one of its D columns. ValueError where an output is all zeros.
    """
    outputs = module.inputs if module.is_embedding else module.outputs
    squares = np.zeros(outputs)
    change = 0.0
    for first, end, rows in row_blocks(weights, module, progress):
        whole = rows + product.rows(module, first, end)
        if module.is_embedding:
            squares += np.square(whole, dtype=np.float64).sum(axis=0)
        else:
            squares[first:end] = np.square(whole, dtype=np.float64).sum(axis=1)
            part = _gain(magnitude[first:end], squares[first:end], module)
            change += _square(part[:, None] * whole - rows)
    gain = _gain(magnitude, squares, module)
    if module.is_embedding:  # Its gains are known only now.
        for first, end, rows in row_blocks(weights, module, progress):
            change += _square(gain * (rows + product.rows(module, first, end)) - rows)
    return Dora(gain.astype(np.float32), float(np.sqrt(change)))


def _gain(magnitude: np.ndarray, squares: np.ndarray, module: Module) -> np.ndarray:
    norms = np.sqrt(squares)
    if not norms.all():
        raise ValueError(
            f"{module.label}: output {int(np.argmin(norms))} of W + s·B·A is zero; DoRA divides by "
            "its norm: expected weights"
        )
    return magnitude / norms


def _square(array: np.ndarray) -> float:
    flat = array.reshape(-1)
    return float(np.dot(flat.astype(np.float64), flat))
