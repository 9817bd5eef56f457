"""The weights that adapters stand beside: rows of the text decoder's tensors and of towers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemloupe import towers
from gemloupe.adapters.folder import widened

if TYPE_CHECKING:
    from gemloupe.model import Model

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class BaseWeights:
    """Rows of tensors as float32: the text decoder's as the model holds them, towers' as stored
    (of an mmproj file, as the checkpoint has them).

    Names are those of the checkpoint without the text decoder's prefix, or of towers "model.".
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._files = model.checkpoint.files
        self._towers = {
            name.removeprefix("model."): model.checkpoint.tensors[name]
            for names in model.checkpoint.towers.values()
            for name in names
        }

    def dtype(self, name: str) -> str:
        stored = self._towers.get(name)
        if stored is None:
            return self._model.loaded_weights.info(name).dtype
        return towers.ENGINE_DTYPES.get(stored.info.dtype, stored.info.dtype)

    def rows(self, name: str, ids: Sequence[int]) -> np.ndarray:
        """Returns rows float32 [len(ids), cols]; of towers, consecutive ones.

        ValueError where a tower's file was cut short, or has a type that is not read.
        """
        stored = self._towers.get(name)
        if stored is None:
            return self._model.loaded_weights.rows(name, ids)
        dtype, shape = self.dtype(name), stored.info.shape or (1,)
        if dtype not in _STORED:
            raise ValueError(
                f"{self._files[stored.file].name}: {name} has the type {stored.info.dtype}; "
                "expected F32, BF16 or F16"
            )
        checkpoint, full = self._model.checkpoint, stored.info.name
        if full in checkpoint.restore:
            return towers.restored(checkpoint, full).reshape(-1, shape[-1])[list(ids)]
        cols = shape[-1]
        width = cols * (4 if dtype == "float32" else 2)
        size, begin = len(ids) * width, stored.info.begin + (ids[0] if len(ids) else 0) * width
        with self._files[stored.file].open("rb") as file:
            file.seek(begin)
            data = file.read(size) if begin + size <= stored.info.end else b""
        if len(data) != size:
            raise ValueError(f"{self._files[stored.file]}: {name} is cut short; download it again")
        return widened(data, _STORED[dtype]).reshape(len(ids), cols)

    def vector(self, name: str) -> np.ndarray:
        """A whole tensor of one dimension."""
        return self.rows(name, range(1)).reshape(-1)
