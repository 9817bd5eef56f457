"""Reads what a caller passes as an image, a sound or a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemloupe.arrays import as_float32
from gemloupe.media.content import Content, SoftTokens


class Reader:
    """Turns a caller's values into contents, for one model.

    `hidden_size` is the text model's; `readers` has, for each kind that the model reads, the
    function that makes a content from a value, its name in error texts and options by name, such
    as max_soft_tokens of images.
    """

    def __init__(
        self, hidden_size: int, readers: Mapping[str, Callable[..., Content]] | None = None
    ) -> None:
        self.hidden_size = hidden_size
        self.readers = dict(readers or {})

    def read(
        self, kind: str, value: Any, name: str, options: Mapping[str, Any] | None = None
    ) -> Content:
        """Returns the content of `value`, which may be soft tokens already.

        ValueError, beginning with `name`, for what can't be read.
        """
        if self._is_soft_tokens(value):
            return self._precomputed(kind, value, name)
        if kind not in self.readers:
            raise ValueError(
                f"{name} is {_described(value)}, but this model does not read {kind}; pass soft "
                f"tokens [n, {self.hidden_size}], or leave it out"
            )
        return self.readers[kind](value, name, **(options or {}))

    def _is_soft_tokens(self, value: Any) -> bool:
        if isinstance(value, SoftTokens):
            return True
        is_matrix = isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind == "f"
        return is_matrix and value.shape[1] == self.hidden_size

    def _precomputed(self, kind: str, value: np.ndarray, name: str) -> Content:
        rows = as_float32(np.asarray(value), name, ["n", self.hidden_size])
        if not len(rows):
            raise ValueError(f"{name} has no soft tokens; expected at least one row")
        if not np.isfinite(rows).all():
            raise ValueError(f"{name} holds NaN or infinity; expected finite soft tokens")
        known = value.content if isinstance(value, SoftTokens) else None
        if known is not None and known.kind == kind:
            return known
        if known is not None or kind == "video":
            got = f"soft tokens of {known.kind}" if known is not None else "an array"
            raise ValueError(f"{name} is {got}; expected {kind}, or what encode_{kind} returned")
        held = rows.copy()
        return Content(kind, (len(rows),), lambda _adapters: held, fixed=True)


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"
