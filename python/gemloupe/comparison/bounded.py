"""Float64 values with a bound on how far a float result may lie from them.

Every operation adds what one rounding of each intermediate can do (a running error analysis) to
what the errors of its inputs can do. Sums of K products use the probabilistic constant
min(K, 8 √K) u instead of K u: the chance that a sum exceeds it is below e^-32 (Higham and Mary,
"A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOAT32 = 2.0**-24
UNDERFLOW = 2.0**-126
"""Smaller results may become 0: engines flush float32's subnormal numbers."""
ROUNDOFF = {"float64": 2.0**-53, "float32": FLOAT32, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff: the largest relative error of rounding to nearest."""

Blocks = Callable[[], Iterator[tuple[int, int, np.ndarray]]]
"""Gives a matrix [N, K] as (first row, end, float64 rows), so that it is never whole in memory."""


@dataclass(frozen=True, eq=False)
class Bounded:
    """`value` float64 [...]; `error` has its shape, or one that broadcasts to it."""

    value: np.ndarray
    error: np.ndarray

    def __getitem__(self, index: Any) -> Bounded:
        error = np.broadcast_to(self.error, self.value.shape)
        return Bounded(self.value[index], error[index])

    def reshape(self, *shape: int) -> Bounded:
        error = np.broadcast_to(self.error, self.value.shape)
        return Bounded(self.value.reshape(shape), error.reshape(shape))


def exact(value: np.ndarray) -> Bounded:
    """A captured array: the operation that reads it reads these very numbers."""
    wide = np.asarray(value, np.float64)
    return Bounded(wide, np.zeros((1,) * wide.ndim))


def sum_roundoff(terms: int) -> float:
    """Relative error of a float32 sum of `terms` products, in any order."""
    return min(terms, 8 * math.sqrt(terms)) * FLOAT32


@dataclass(frozen=True)
class Roundings:
    """How an engine rounds: activations to `dtype`, sums and functions in float32."""

    dtype: str

    @property
    def unit(self) -> float:
        return ROUNDOFF[self.dtype]

    def stored(self, value: np.ndarray, error: np.ndarray | float, times: int = 1) -> Bounded:
        """`value` after `times` roundings to the activations' dtype."""
        return Bounded(value, error + times * (self.unit * np.abs(value) + UNDERFLOW))

    def add(self, x: Bounded, y: Bounded) -> Bounded:
        return self.stored(x.value + y.value, x.error + y.error)

    def scale(self, x: Bounded, factor: np.ndarray | float, times: int = 1) -> Bounded:
        return self.stored(x.value * factor, x.error * np.abs(factor), times)

    def multiply(self, x: Bounded, y: Bounded) -> Bounded:
        error = x.error * np.abs(y.value) + np.abs(x.value) * y.error + x.error * y.error
        return self.stored(x.value * y.value, error)

    def linear(self, x: Bounded, blocks: Blocks) -> Bounded:
        """x [..., K] times a matrix [N, K], transposed; bounds from the norms of both."""
        flat = x.value.reshape(-1, x.value.shape[-1])
        off = np.broadcast_to(x.error, x.value.shape).reshape(flat.shape)
        norms = np.linalg.norm(flat, axis=1, keepdims=True)
        off_norms = np.linalg.norm(off, axis=1, keepdims=True)
        rounding = sum_roundoff(flat.shape[1])
        values, errors = [], []
        for _begin, _end, rows in blocks():
            row_norms = np.linalg.norm(rows, axis=1)
            values.append(flat @ rows.T)
            errors.append((rounding * norms + off_norms) * row_norms)
        shape = (*x.value.shape[:-1], -1)
        value = np.concatenate(values, axis=1).reshape(shape)
        return self.stored(value, np.concatenate(errors, axis=1).reshape(shape))

    def rms_norm(self, x: Bounded, weight: np.ndarray | None, eps: float) -> Bounded:
        """x / √(mean x² + eps) · weight over the last dimension."""
        size = x.value.shape[-1]
        factor = 1.0 if weight is None else np.asarray(weight, np.float64)
        divisor = np.sqrt(np.mean(x.value**2, axis=-1, keepdims=True) + eps)
        unit = x.value / divisor
        off = np.broadcast_to(x.error, x.value.shape)
        off_divisor = np.sqrt(np.mean(off**2, axis=-1, keepdims=True))
        inputs = (off + np.abs(unit) * off_divisor) / divisor * np.abs(factor)
        value = unit * factor
        rounding = (0.5 * sum_roundoff(size) + 5 * FLOAT32) * np.abs(value)
        return self.stored(value, inputs + rounding)

    def divisor(self, x: Bounded, eps: float) -> Bounded:
        """√(mean x² + eps), always float32: [T, D] -> [T, 1], [T, N, H] -> [T, N]."""
        value = np.sqrt(np.mean(x.value**2, axis=-1, keepdims=x.value.ndim == 2) + eps)
        return Bounded(value, (0.5 * sum_roundoff(x.value.shape[-1]) + 4 * FLOAT32) * value)

    def gelu_times(self, gate: Bounded, up: Bounded) -> Bounded:
        """gelu_tanh(gate) · up. |gelu'| < 1.13; 1 + tanh loses digits where the gate is < 0."""
        z = gate.value
        value = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        error = 1.13 * gate.error + 8 * FLOAT32 * np.abs(z) + self.unit * np.abs(value)
        return self.multiply(Bounded(value, error), up)

    def softmax(self, x: Bounded) -> Bounded:
        """Over the last dimension, in float32; an input of -inf gives exactly 0."""
        largest = np.max(x.value, axis=-1, keepdims=True)
        exponentials = np.exp(x.value - np.where(np.isfinite(largest), largest, 0))
        total = exponentials.sum(axis=-1, keepdims=True)
        value = exponentials / np.where(total > 0, total, 1)
        seen = np.isfinite(x.value)
        off = np.where(seen, np.broadcast_to(x.error, x.value.shape), 0)
        # exp's argument is off by its rounding too: relative to the distance from the maximum.
        distance = np.where(seen, np.abs(x.value - np.where(np.isfinite(largest), largest, 0)), 0)
        spread = 2 * off.max(axis=-1, keepdims=True) + 2 * FLOAT32 * distance
        relative = np.expm1(np.minimum(spread, 50.0)) + sum_roundoff(value.shape[-1]) + 8 * FLOAT32
        return self.stored(value, value * relative)

    def softcap(self, x: Bounded, cap: float) -> Bounded:
        """cap · tanh(x / cap); three operations."""
        value = cap * np.tanh(x.value / cap)
        return self.stored(value, x.error + 8 * FLOAT32 * np.abs(x.value), times=3)

    def rotate(self, x: Bounded, angles: np.ndarray) -> Bounded:
        """Rotates the pairs (x[j], x[j + H/2]) of [T, N, H] by angles [T, H/2] (RoPE)."""
        # The frequency may differ in its last bits, the angle then by these times its size.
        turn = (4 * FLOAT32 * np.abs(angles) + 2 * FLOAT32 + 2 * self.unit)[:, None, :]
        cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
        first, second = np.split(x.value, 2, axis=-1)
        off1, off2 = np.split(np.broadcast_to(x.error, x.value.shape), 2, axis=-1)
        value = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
        size = (turn + 2 * self.unit) * (np.abs(first) + np.abs(second))
        off = off1 + off2 + size
        return self.stored(value, np.concatenate((off, off), axis=-1))

    def scores(self, q: Bounded, keys: Bounded) -> Bounded:
        """q [T, N, H] · keys [S, K, H] -> [N, T, S], not divided by √H; head n reads n // (N/K)."""
        group = q.value.shape[1] // keys.value.shape[1]
        k_value, k_error = (np.repeat(a, group, axis=1) for a in _both(keys))
        q_value, q_error = _both(q)
        value = np.einsum("tnh,snh->nts", q_value, k_value)
        size = np.einsum("tnh,snh->nts", np.abs(q_value), np.abs(k_value))
        off = np.einsum("tnh,snh->nts", np.abs(q_value), k_error)
        off += np.einsum("tnh,snh->nts", q_error, np.abs(k_value) + k_error)
        return self.stored(value, off + sum_roundoff(q_value.shape[-1]) * size)

    def attend(self, pattern: Bounded, values: Bounded) -> Bounded:
        """pattern [N, T, S] times values [S, K, H] -> z [T, N, H]."""
        group = pattern.value.shape[0] // values.value.shape[1]
        v_value, v_error = (np.repeat(a, group, axis=1) for a in _both(values))
        p_value, p_error = _both(pattern)
        value = np.einsum("nts,snh->tnh", p_value, v_value)
        rounding = sum_roundoff(p_value.shape[-1]) + 8 * FLOAT32
        off = np.einsum("nts,snh->tnh", p_error + rounding * p_value, np.abs(v_value) + v_error)
        off += np.einsum("nts,snh->tnh", p_value, v_error)
        return self.stored(value, off)


def _both(x: Bounded) -> tuple[np.ndarray, np.ndarray]:
    return x.value, np.broadcast_to(x.error, x.value.shape)
