"""How one tensor differs between both sides: not at all, by rounding, or by being another one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemloupe import recipe
from gemloupe.comparison import tensors as weights
from gemloupe.comparison.bounded import ROUNDOFF
from gemloupe.comparison.engines import PLAIN
from gemloupe.comparison.tensors import Tensors

_GROUP = 32
_MAX_LISTED = 4


@dataclass(frozen=True)
class WeightsDifference:
    """`kind` is "equal", "rounding" (explained by the model's narrower dtype) or "other"."""

    name: str
    kind: str
    largest: float
    """Largest |model - reference|."""
    relative: float
    """Norm of the difference over the norm of the reference's tensor."""
    text: str
    """What differs and where, for people."""


def compare_tensor(name: str, model: Tensors, reference: Tensors) -> WeightsDifference:
    """Compares a tensor of both sides, in blocks of rows."""
    dtype = model.dtype(name)
    largest = square = size = 0.0
    differing = beyond = 0
    where: list[int] = []  # First elements that differ, flat.
    matrices: set[int] = set()
    shape = model.shape(name)
    per_matrix = shape[-2] if len(shape) == 3 else 0
    for begin, _end, rows in weights.blocks(model, name):
        want = reference.rows(name, begin, begin + len(rows)).astype(np.float64)
        off = rows - want
        if off.any():
            mask = off != 0
            differing += int(mask.sum())
            largest = max(largest, float(np.abs(off).max()))
            if len(where) < _MAX_LISTED:
                first = np.flatnonzero(mask)[:_MAX_LISTED]
                where += [begin * shape[-1] + int(i) for i in first]
            if per_matrix:
                changed = np.flatnonzero(mask.any(axis=1)) + begin
                matrices |= {int(i) for i in np.unique(changed // per_matrix)}
            beyond += int((~_is_rounding(off, want, rows, dtype)).sum())
        square += float((off * off).sum())
        size += float((want * want).sum())
    relative = (square / size) ** 0.5 if size else float(square > 0)
    kind = "equal" if not differing else "other" if beyond else "rounding"
    if kind == "equal":
        text = f"{name} is the same on both sides"
    else:
        total = int(np.prod(shape))
        places = ", ".join(
            str([int(i) for i in np.unravel_index(flat, shape)]) for flat in where[:_MAX_LISTED]
        )
        text = (
            f"{name} differs in {differing:,} of {total:,} elements (first {places}), by at most "
            f"{largest:.3g}, {relative:.2g} of its norm"
        )
        if kind == "rounding":
            text += f": no more than rounding to {dtype} explains"
        elif matrices and len(matrices) < shape[0]:
            text += _exchanged(name, sorted(matrices), model, reference)
    return WeightsDifference(name, kind, largest, relative, text)


def _is_rounding(off: np.ndarray, want: np.ndarray, got: np.ndarray, dtype: str) -> np.ndarray:
    """bool: may the difference come from rounding to `dtype`? Per element, or per group of 32.

    A scale of least squared error rounds a group no worse than steps of its largest value over
    2^(bits - 1) do, whose error is at most one step where that value itself is clipped.
    """
    if dtype in PLAIN:
        # 1 + 2^-7: the reference's own value may be the rounded one.
        return np.abs(off) <= ROUNDOFF[dtype] * (1 + 2.0**-7) * np.abs(want) + 1e-30
    bits = int(recipe.BITS.get(dtype, 4.5))
    size = off.shape[-1]
    groups = -(-size // _GROUP)
    padded = np.zeros((len(off), groups * _GROUP))
    padded[:, :size] = off
    rms = np.sqrt((padded.reshape(len(off), groups, _GROUP) ** 2).sum(axis=-1))
    padded[:, :size] = np.maximum(np.abs(want), np.abs(got))
    step = padded.reshape(len(off), groups, _GROUP).max(axis=-1) / 2 ** (bits - 1)
    # A last group may be short; its scale then comes from what it has.
    counts = np.minimum(_GROUP, size - _GROUP * np.arange(groups))
    return rms <= step * np.sqrt(counts) * (1 + 2.0**-8)


def _exchanged(name: str, changed: list[int], model: Tensors, reference: Tensors) -> str:
    """Names the experts that differ, and those that are others of the reference."""
    size = model.shape(name)[1]
    text = f"; experts {', '.join(map(str, changed[:8]))}"
    if len(changed) > 8:
        return text + f" and {len(changed) - 8} more differ"
    theirs = {e: reference.rows(name, e * size, (e + 1) * size) for e in changed}
    moved = []
    for expert in changed:
        ours = model.rows(name, expert * size, (expert + 1) * size)
        moved += [
            f"expert {expert} holds the reference's expert {other}"
            for other, rows in theirs.items()
            if other != expert and np.array_equal(ours, rows)
        ]
    return text + " differ" + (": " + ", ".join(moved) if moved else "")
