"""Weights of a model on either side of a comparison, in blocks of float64 rows."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemloupe.adapters.effective import EffectiveWeights
from gemloupe.adapters.modules import modules_of

if TYPE_CHECKING:
    from gemloupe.adapters.selection import Selection
    from gemloupe.config import TextConfig
    from gemloupe.weights import Weights

HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"

# Bytes of float64 rows in memory at a time: an embedding of a real model would be gigabytes.
_BLOCK_BYTES = 64 << 20
# Blocks that are kept: both sides, and all heads, read the same matrix one after the other.
_KEPT_BLOCKS = 6


class Tensors(Protocol):
    """The text decoder's tensors under the checkpoint's names, without prefix."""

    recent: OrderedDict[tuple[str, int, int], np.ndarray]
    """The blocks of float64 rows that were read last."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows as float32; those of a tensor of experts are its matrices', one after the other."""


class GemloupeTensors:
    """The values that gemloupe's products use, dequantised."""

    def __init__(self, weights: Weights) -> None:
        self.recent: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()
        self._weights = weights

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights.info(name).shape)

    def dtype(self, name: str) -> str:
        return self._weights.info(name).dtype

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        return self._weights.rows(name, range(begin, end))


class AdaptedTensors:
    """The same under adapters: W + ΔW. `HEAD` is the head's, which is no longer the embedding's."""

    def __init__(self, weights: Weights, config: TextConfig, selection: Selection) -> None:
        self.recent: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()
        self._weights = weights
        self._effective = EffectiveWeights(selection)
        self._modules = {m.weight: m for m in modules_of(config).values() if m.name != "lm_head"}
        self._modules[HEAD] = modules_of(config)["lm_head"]

    def _stored(self, name: str) -> str:
        return _EMBEDDING if name == HEAD else name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights.info(self._stored(name)).shape)

    def dtype(self, name: str) -> str:
        return self._weights.info(self._stored(name)).dtype

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        rows = self._weights.rows(self._stored(name), range(begin, end))
        module = self._modules.get(name)
        if module is None or module not in self._effective:
            return rows
        return self._effective.rows(module, rows, begin)


class TorchTensors:
    """A transformers model's parameters and buffers; `state` is name -> torch tensor."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.recent: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()
        self._state = state

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> str:
        return str(self._state[name].dtype).removeprefix("torch.")

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        tensor = self._state[name].detach()
        part = tensor.reshape(-1, tensor.shape[-1])[begin:end]
        return part.float().cpu().numpy()


def head_name(tensors: Tensors) -> str:
    """What the output matrix is called: it is the embedding where no adapter parts them."""
    return HEAD if isinstance(tensors, AdaptedTensors) else _EMBEDDING


def num_rows(tensors: Tensors, name: str) -> int:
    return math.prod(tensors.shape(name)[:-1])


def vector(tensors: Tensors, name: str) -> np.ndarray:
    """A tensor of one dimension as float64."""
    return tensors.rows(name, 0, 1).astype(np.float64).reshape(-1)


def blocks(
    tensors: Tensors, name: str, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (first row, end, float64 rows) of rows begin…end."""
    end = num_rows(tensors, name) if end is None else end
    step = max(1, _BLOCK_BYTES // (8 * tensors.shape(name)[-1]))
    for first in range(begin, end, step):
        last = min(end, first + step)
        yield first, last, _block(tensors, name, first, last)


def _block(tensors: Tensors, name: str, first: int, last: int) -> np.ndarray:
    key = (name, first, last)
    found = tensors.recent.pop(key, None)
    rows = tensors.rows(name, first, last).astype(np.float64) if found is None else found
    tensors.recent[key] = rows
    while len(tensors.recent) > _KEPT_BLOCKS:
        tensors.recent.popitem(last=False)
    return rows


def gather(tensors: Tensors, name: str, ids: np.ndarray) -> np.ndarray:
    """Single rows as float64 [len(ids), cols], each read once."""
    unique, inverse = np.unique(ids, return_inverse=True)
    rows = [tensors.rows(name, int(index), int(index) + 1)[0] for index in unique]
    return np.stack(rows).astype(np.float64)[inverse.reshape(-1)]
