"""Rotary position embedding.

The angle is part of the model: transformers multiplies the position and the inverse frequency in
float32, and at position 262,000 that product is off by up to 0.008 rad. A more exact angle would
give other logits than the reference, so the product is rounded to float32 here too.
"""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np

from .config import Rope

# NumPy's own float32 power is vectorised and can differ from the C library's in the last bit.
_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.powf.restype = ctypes.c_float
_libm.powf.argtypes = (ctypes.c_float, ctypes.c_float)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Returns float32 [head_dim / 2]; the pairs that proportional RoPE leaves alone have 0."""
    rotated = int(rope.partial * head_dim // 2)
    frequencies = np.zeros(head_dim // 2, np.float32)
    for i in range(rotated):
        exponent = np.float32(2 * i) / np.float32(head_dim)
        power = np.float32(_libm.powf(rope.theta, exponent))
        frequencies[i] = np.float32(1) / power / np.float32(rope.factor)
    return frequencies


def angles(positions: np.ndarray, rope: Rope, head_dim: int) -> np.ndarray:
    """Returns [T, head_dim / 2], each the float32 product of position and inverse frequency."""
    product = positions.astype(np.float32)[:, None] * inverse_frequencies(rope, head_dim)
    return product.astype(np.float64)


def rotate(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotates the pairs (x[j], x[j + H/2]) of heads [T, N, H] by angles [T, H / 2]."""
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
