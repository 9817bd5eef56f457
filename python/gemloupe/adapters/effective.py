"""The matrices that a model has under adapters, block by block: for comparing and converting."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from gemloupe.adapters.adapter import Adapter
from gemloupe.adapters.loading import as_product
from gemloupe.adapters.matching import Bias, Changing, LowRank, Replacement, Rows
from gemloupe.adapters.measure import Product
from gemloupe.adapters.modules import Module
from gemloupe.adapters.selection import Selection

# Changes whose values are kept: blocks of one matrix come one after the other.
_KEPT = 4


class _Part(NamedTuple):
    adapter: Adapter
    change: Changing
    weight: float


class EffectiveWeights:
    """W + Σ w ΔW of each module under a selection of adapters, as the engine holds them."""

    def __init__(self, selection: Selection) -> None:
        self._parts: dict[str, list[_Part]] = {}
        self._values: OrderedDict[tuple[str, int], Product | np.ndarray] = OrderedDict()
        for adapter, weight in selection.adapters:
            for change in adapter.match.changes:
                if isinstance(change, Bias):
                    continue
                part = _Part(adapter, change, weight * adapter.scale)
                self._parts.setdefault(change.module.label, []).append(part)

    def __contains__(self, module: Module) -> bool:
        return module.label in self._parts

    def rows(self, module: Module, base: np.ndarray, first: int) -> np.ndarray:
        """Rows first… of the module's matrix, whose own are `base` float32 [n, in].

        The rows of experts are those of their matrices, one after the other.
        """
        changed = base.astype(np.float64)
        for number, part in enumerate(self._parts.get(module.label, ())):
            changed += part.weight * self._delta(part, number, base, first)
        return changed.astype(np.float32)

    def _delta(self, part: _Part, number: int, base: np.ndarray, first: int) -> np.ndarray:
        change, end = part.change, first + len(base)
        values = self._read(part, number)
        if isinstance(change, LowRank):
            assert isinstance(values, Product)
            added = values.rows(change.module, first, end)
            gain = part.adapter.held.gains.get(change.module.label)
            if gain is None:
                return added
            factor = gain if change.module.is_embedding else gain[first:end, None]
            return (factor - 1) * base + factor * added
        assert isinstance(values, np.ndarray)
        if isinstance(change, Replacement):
            return values[first:end] - base
        assert isinstance(change, Rows)
        delta = np.zeros_like(base)
        for index, row in zip(change.ids, values, strict=True):
            if first <= index < end:
                delta[index - first] = row - base[index - first]
        return delta

    def _read(self, part: _Part, number: int) -> Product | np.ndarray:
        change, key = part.change, (part.change.module.label, number)
        values = self._values.pop(key, None)
        if values is None:
            opened, dtype = part.adapter.folder, part.adapter.dtype
            if isinstance(change, LowRank):
                product = as_product(opened, change)
                values = product._replace(a=rounded(product.a, dtype), b=rounded(product.b, dtype))
            else:
                values = rounded(opened.read(change.tensor), dtype)
        self._values[key] = values
        while len(self._values) > _KEPT:
            self._values.popitem(last=False)
        return values


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as `dtype` holds them, to the nearest, ties to even."""
    if dtype == "float16":
        return array.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return array
