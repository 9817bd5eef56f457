"""What ran and how it rounds: the figures behind the bounds of a comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemloupe.comparison.bounded import ROUNDOFF, Bounded, Roundings

PLAIN = ("float32", "float16", "bfloat16")
_ACTIVATION_GROUP = 32
# Below 2^-14 float16 is spaced evenly, by 2^-24.
_HALF_SUBNORMAL = 2.0**-25


@dataclass(frozen=True)
class Engine:
    """One side's arithmetic."""

    label: str
    """What ran in which dtype, for people."""
    dtype: str
    """Activations."""
    kv_dtype: str | None = None
    """What keys and values are rounded to before attention; None where they stay activations."""
    rounds_inputs: bool = False
    """Products with quantised weights read activations rounded to int8 in groups of 32."""
    bfloat16_products: bool = False
    """Products with bfloat16 weights read activations rounded to bfloat16."""

    @property
    def roundings(self) -> Roundings:
        return Roundings(self.dtype)

    def product_input(self, x: Bounded, weight_dtype: str) -> Bounded:
        """`x` [..., K] as a product with weights of `weight_dtype` reads it."""
        if self.rounds_inputs and weight_dtype not in PLAIN:
            return Bounded(x.value, x.error + _int8_step(x.value, _ACTIVATION_GROUP))
        if self.bfloat16_products and weight_dtype == "bfloat16":
            return Bounded(x.value, x.error + ROUNDOFF["bfloat16"] * np.abs(x.value))
        return x

    def cached(self, x: Bounded) -> Bounded:
        """Keys or values [S, K, H] as attention reads them from the cache."""
        if self.kv_dtype is None or self.kv_dtype == "float32":
            return x
        if self.kv_dtype == "int8":
            return Bounded(x.value, x.error + _int8_step(x.value, x.value.shape[-1]))
        error = x.error + ROUNDOFF[self.kv_dtype] * np.abs(x.value)
        return Bounded(x.value, error + (_HALF_SUBNORMAL if self.kv_dtype == "float16" else 0.0))


def _int8_step(x: np.ndarray, group: int) -> np.ndarray:
    """Half a step of int8 with one scale for each `group` elements of the last dimension."""
    size = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-size // group) * group))
    padded[..., :size] = np.abs(x)
    largest = padded.reshape(*x.shape[:-1], -1, group).max(axis=-1, keepdims=True)
    steps = np.broadcast_to(largest / 254 * (1 + 2.0**-10), (*largest.shape[:-1], group))
    return steps.reshape(*x.shape[:-1], -1)[..., :size]
