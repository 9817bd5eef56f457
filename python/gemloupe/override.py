"""Weights that stand in for a model's own inside a with block (`Model.override`)."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core
from gemloupe.arrays import as_float32
from gemloupe.checkpoint import Checkpoint, tower_of
from gemloupe.errors import bullet_list, did_you_mean, format_shape, one_of, quoted

if TYPE_CHECKING:
    from gemloupe.model import Model

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Overridden:
    """A model with other values of some tensors; it shares all else with the model."""

    core: _core.TextModel
    digests: Mapping[str, str]
    """Of the values of each tensor, by its name without prefix, outer blocks included."""

    @property
    def label(self) -> str:
        """What it is, for a cache's provenance: equal where names and values are."""
        names = sorted(self.digests)
        digest = hashlib.blake2b(repr(sorted(self.digests.items())).encode(), digest_size=4)
        what = names[0] if len(names) == 1 else f"{len(names)} weights"
        return f"{what} overridden ({digest.hexdigest()})"


# The innermost block of each model in this context.
_Entry = tuple["weakref.ref[Model]", Overridden]
_active: contextvars.ContextVar[tuple[_Entry, ...]] = contextvars.ContextVar(
    "gemloupe.override", default=()
)


def active(model: Model) -> Overridden | None:
    """What stands in for the model's weights in this context, or None."""
    return next((entry for ref, entry in _active.get() if ref() is model), None)


def label(model: Model) -> str:
    """The label of what is active; "" for nothing."""
    entry = active(model)
    return "" if entry is None else entry.label


def refuse_inside(model: Model, what: str) -> None:
    """RuntimeError where weights of the model are overridden in this context."""
    if active(model) is not None:
        raise RuntimeError(f"{what} inside a block of model.override; do it before the block")


@contextlib.contextmanager
def overriding(model: Model, weights: Mapping[str, Any], dtype: str) -> Iterator[None]:
    """See `Model.override`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {quoted(dtype)}; expected {one_of(DTYPES)}")
    arrays = _checked(model.checkpoint, weights)
    outer = active(model)
    core = model.core.override(list(arrays.items()), dtype)
    digests = dict(outer.digests) if outer is not None else {}
    digests |= {name: _digest(values, dtype) for name, values in arrays.items()}
    del arrays
    others = tuple(
        entry for entry in _active.get() if entry[0]() is not None and entry[0]() is not model
    )
    token = _active.set((*others, (weakref.ref(model), Overridden(core, digests))))
    try:
        yield
    finally:
        _active.reset(token)


def _digest(values: np.ndarray, dtype: str) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=8)
    digest.update((dtype if values.ndim > 1 else "float32").encode())
    return digest.hexdigest()


def _checked(checkpoint: Checkpoint, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays as float32, by names without prefix; one ValueError lists all that is wrong."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"override takes a mapping from tensors' names to arrays, got {quoted(weights)} "
            f"({type(weights).__name__})"
        )
    arrays: dict[str, np.ndarray] = {}
    problems = []
    for name, values in weights.items():
        short = name.removeprefix(checkpoint.prefix) if isinstance(name, str) else name
        stored = checkpoint.text_tensors.get(short)
        if stored is None:
            problems.append(_unknown(checkpoint, name))
            continue
        if short in arrays:
            problems.append(f"{quoted(name)} is given twice, with and without its prefix")
            continue
        array = as_float32(values, f"override[{name!r}]")
        if array.shape != stored.shape:
            got, expected = format_shape(array.shape), format_shape(stored.shape)
            problems.append(f"{quoted(name)}: the array is {got}; expected {expected}")
            continue
        arrays[short] = array
    if problems:
        raise ValueError(
            f"override: {len(problems)} of {len(weights)} tensors don't fit "
            f"{quoted(checkpoint.source)}:\n{bullet_list(problems)}"
        )
    return arrays


def _unknown(checkpoint: Checkpoint, name: Any) -> str:
    if isinstance(name, str) and tower_of(name):
        return f"{quoted(name)} is of a tower; expected a tensor of the text decoder"
    if isinstance(name, str) and name.endswith("lm_head.weight"):
        return f"{quoted(name)} is tied to the embedding; expected 'embed_tokens.weight'"
    short = str(name).removeprefix(checkpoint.prefix)
    if f"model.{short}" in checkpoint.ignored or name in checkpoint.ignored:
        return f"{quoted(name)} is in the files, but no layer reads it"
    hint = did_you_mean(short, checkpoint.text_tensors)
    return f"{quoted(name)} is no tensor of this model. {hint}".rstrip()
