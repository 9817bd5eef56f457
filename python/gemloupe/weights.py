"""`model.weights`: what the model holds, by name, without copies that nobody asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemloupe import recipe
from gemloupe.errors import did_you_mean, quoted

if TYPE_CHECKING:
    from gemloupe import _core
    from gemloupe.checkpoint import Checkpoint


class WeightInfo(NamedTuple):
    """A tensor as the model holds it."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Weights(Mapping[str, np.ndarray]):
    """The text decoder's tensors as float32, dequantised when they are asked for.

    `weights[name]` is a read-only array of the tensor's shape; `name` is the checkpoint's, with or
    without the prefix that its files have ("model.language_model."). A quantised model's values
    are those that its products use. KeyError, with close matches, for another name.
    """

    def __init__(self, core: _core.TextModel, checkpoint: Checkpoint) -> None:
        self._core = core
        self._prefix = checkpoint.prefix
        self._shapes = {name: t.shape for name, t in checkpoint.text_tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        short = self._short(name)
        shape = self._shapes[short]
        count = math.prod(shape[:-1])
        return self._core.weight_rows(short, range(count)).reshape(shape)

    def rows(self, name: str, ids: Sequence[int]) -> np.ndarray:
        """Returns rows of a tensor as float32 [len(ids), cols], reading no others.

        The rows of a tensor of experts are those of its matrices, one after the other. IndexError
        for a row that it does not have; negative ids count from the end.
        """
        short = self._short(name)
        count = math.prod(self._shapes[short][:-1])
        wanted = [int(index) for index in ids]
        for index in wanted:
            if not -count <= index < count:
                raise IndexError(
                    f"{name}: row {index} of {count}; expected {-count} to {count - 1}"
                )
        if not wanted:
            return np.empty((0, self._shapes[short][-1]), np.float32)
        return self._core.weight_rows(short, [index % count for index in wanted])

    def info(self, name: str) -> WeightInfo:
        """Returns shape, dtype and bytes of a tensor without reading it."""
        short = self._short(name)
        shape = self._shapes[short]
        dtype = self._core.weight_dtype(short)
        return WeightInfo(shape, dtype, recipe.nbytes(dtype, shape))

    def items(self) -> Iterator[tuple[str, WeightInfo]]:  # type: ignore[override]
        """Yields (name, WeightInfo) without reading any tensor."""
        for name in self._shapes:
            yield name, self.info(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.removeprefix(self._prefix) in self._shapes

    def _short(self, name: str) -> str:
        short = name.removeprefix(self._prefix)
        if short not in self._shapes:
            hint = did_you_mean(short, self._shapes)
            raise KeyError(f"{quoted(name)} is no tensor of this model. {hint}".rstrip())
        return short

    def __repr__(self) -> str:
        total = sum(info.nbytes for _, info in self.items())
        return f"Weights({len(self)} tensors, {total:,} bytes)"
