"""Arrays from callers: NumPy, torch, jax and whatever else speaks DLPack or `__array__`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemloupe.errors import format_shape, quoted

_ON_CPU = (1, 3)
"""DLPack's device types of memory that this process can read: CPU, and CPU pinned for CUDA."""


def as_float32(x: Any, name: str, shape: Sequence[int | str | None] | None = None) -> np.ndarray:
    """Returns `x` as a C-contiguous float32 array, without a copy where it already is one.

    `x` is an array or a (nested) list of numbers, or has `__dlpack__` or `__array__`: a torch
    tensor (gradients are cut off, bfloat16 is widened) or a jax array. torch is not imported.
    The result may share memory with `x` and be read-only. `name` stands in the errors.

    `shape` is what is expected: a number is a size, a letter any size (the same one wherever the
    letter stands), None any size.

    Raises TypeError where `x` holds no real numbers, ValueError where its shape differs, where it
    is not in this machine's memory, and where a finite number overflows float32.
    """
    # What edit functions return in every pass; the checks below would take longer than they do.
    if shape is None and type(x) is np.ndarray and x.dtype == np.float32 and x.flags.c_contiguous:
        return x
    array = _to_numpy(x, name)
    if array.dtype.kind not in "fiu" and array.dtype.name not in _ML_DTYPES:
        raise TypeError(f"{name} has dtype {array.dtype}; expected real numbers")
    if shape is not None:
        check_shape(array, name, shape)
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array, dtype=np.float32).reshape(array.shape)
    if array.dtype.itemsize > 4 and array.dtype.kind == "f":
        lost = np.isinf(converted) & np.isfinite(array)
        if lost.any():
            raise ValueError(
                f"{name} holds {array[lost].flat[0]!r}, which float32 cannot hold; "
                f"expected numbers up to {np.finfo(np.float32).max:.3g}"
            )
    return converted


# Types of the package ml_dtypes, which jax's arrays have; NumPy knows no kind for them.
_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def check_shape(array: np.ndarray, name: str, shape: Sequence[int | str | None]) -> None:
    """ValueError with both shapes unless `array` has `shape` (see as_float32)."""
    letters: dict[str, int] = {}
    fits = array.ndim == len(shape)
    for size, expected in zip(array.shape, shape, strict=False):
        if isinstance(expected, str):
            expected = letters.setdefault(expected, size)
        fits = fits and expected in (None, size)
    if not fits:
        text = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {format_shape(array.shape)}; expected [{text}]")


def _to_numpy(x: Any, name: str) -> np.ndarray:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; pass {name}.filled(value)")
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x)
    if isinstance(x, str | bytes | dict | set) or x is None:
        raise TypeError(f"{name} is {quoted(x)} ({type(x).__name__}); expected an array of numbers")
    if hasattr(x, "__dlpack__") or hasattr(x, "__array__"):
        return _exported(x, name)
    try:
        return np.asarray(x)
    except (ValueError, TypeError) as error:
        raise TypeError(f"{name} is no array of numbers: {error}") from None


def _exported(x: Any, name: str) -> np.ndarray:
    if hasattr(x, "__dlpack_device__") and (device := _device(x)) not in _ON_CPU:
        where = getattr(x, "device", f"DLPack device type {device}")
        raise ValueError(f"{name} is on {where}; expected the CPU: pass {name}.cpu()")
    # Tensors that need gradients refuse to be exported, NumPy has no bfloat16, and torch exports
    # a lazily negated view without its sign.
    if callable(getattr(x, "detach", None)):
        x = x.detach()
        if callable(getattr(x, "resolve_neg", None)):
            x = x.resolve_neg()
        if str(x.dtype) in ("torch.bfloat16", "torch.float8_e4m3fn", "torch.float8_e5m2"):
            x = x.float()
    problem: Exception | None = None
    for has, convert in (("__dlpack__", np.from_dlpack), ("__array__", np.asarray)):
        if not hasattr(x, has):
            continue
        try:
            return convert(x)
        except (BufferError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            problem = error
    raise TypeError(f"{name} ({type(x).__name__}) cannot become a NumPy array: {problem}")


def _device(x: Any) -> int:
    try:
        return int(x.__dlpack_device__()[0])
    except (BufferError, RuntimeError, ValueError, TypeError):
        return _ON_CPU[0]  # A device without a DLPack number; the export then says why.
