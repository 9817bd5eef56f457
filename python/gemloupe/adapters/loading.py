"""Loads a PEFT folder for a model: all of it is checked before the engine gets any of it."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core
from gemloupe.adapters import folder as _folder
from gemloupe.adapters import measure
from gemloupe.adapters.adapter import BAR_WEIGHTS, Adapter, Held
from gemloupe.adapters.folder import AdapterFolder
from gemloupe.adapters.matching import Bias, LowRank, Match, Replacement, Rows, match
from gemloupe.adapters.measure import Product
from gemloupe.adapters.modules import Module
from gemloupe.adapters.report import Change
from gemloupe.errors import bullet_list, one_of, quoted
from gemloupe.progress import ProgressBar

if TYPE_CHECKING:
    from gemloupe.model import Model

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What models of one process share: it lives as long as one of them holds it.
_shared: weakref.WeakValueDictionary[tuple[Any, ...], Held] = weakref.WeakValueDictionary()
_building = threading.Lock()


def load(
    model: Model, source: str | os.PathLike[str], name: str | None, scale: float, strict: bool,
    dtype: str,
) -> Adapter:  # fmt: skip
    """Reads an adapter for `model`; see `Model.load_adapter`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {quoted(dtype)}; expected {one_of(DTYPES)}")
    check_weight(scale, "scale")
    opened = _folder.open_folder(source)
    matched = matching(opened, model, strict)
    held = _held(opened, matched, model, _stored_dtype(opened, matched, model, dtype))
    return Adapter(name or default_name(opened), float(scale), held, opened, matched, model)


def weights_of(adapter: Any) -> dict[Any, float]:
    """What `gl.load` and `gl.convert` take as adapter=: a folder, several, or {folder: weight}."""
    if adapter is None:
        return {}
    if isinstance(adapter, Mapping):
        return dict(adapter)
    return dict.fromkeys(adapter if isinstance(adapter, (list, tuple)) else [adapter], 1.0)


def check_weight(value: Any, name: str) -> None:
    """TypeError or ValueError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {quoted(value)} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected a finite number")


def default_name(opened: AdapterFolder) -> str:
    """The folder's own name, or the second half of a hub id."""
    return os.path.basename(os.path.abspath(opened.source)) or "adapter"


def matching(opened: AdapterFolder, model: Model, strict: bool) -> Match:
    """What each tensor changes in the model; one ValueError lists all that does not fit."""
    towers = model.adapters.towers
    matched, problems = match(opened.tensors, opened.config, model.config.text, towers)
    if strict:
        problems += [f"{quoted(one.key)}: {one.reason}" for one in matched.ignored]
    if not problems:
        problems = _other_bases(opened, matched, model)
    if not problems and not matched.touched:
        problems = ["none of its tensors changes a module that this model has"]
    if problems:
        base = opened.config.base_model
        advice = (
            f"It was trained on {quoted(base)}: load that model."
            if base
            else "Load the model that it was trained on."
        )
        raise ValueError(
            f"{opened.weights}: the adapter does not fit {quoted(model.checkpoint.source)}; "
            f"{len(problems)} problems:\n{bullet_list(problems)}\n{advice}"
        )
    return matched


def _other_bases(opened: AdapterFolder, matched: Match, model: Model) -> list[str]:
    """Copies of the base's weights must hold the model's values, as far as it has them exactly."""
    problems = []
    weights = model.adapters.base
    for copy in matched.copies:
        dtype = weights.dtype(copy.weight)
        exact = dtype in ("float32", "bfloat16", "float16")
        # Bounds of towers' linears may be infinite.
        stored = opened.read(copy.tensor, infinite=True)
        stored = stored.reshape(-1, stored.shape[-1] if stored.ndim else 1)
        step = max(1, (32 << 20) // (4 * stored.shape[1]))
        same = True
        for first in range(0, len(stored), step):
            part = stored[first : first + step]
            rows = weights.rows(copy.weight, range(first, first + len(part)))
            # Half a unit in the last place of the coarser of both types; of quantised weights a
            # step of 4 bits relative to the largest of the row.
            widths = [_ROUNDOFF[copy.tensor.dtype], _ROUNDOFF.get(dtype, 0.0)]
            size = np.minimum(np.abs(part), np.finfo(np.float32).max)
            room = max(widths) * size if exact else size.max(axis=1, keepdims=True) / 7
            with np.errstate(invalid="ignore"):
                same &= bool(((rows == part) | (np.abs(rows - part) <= room)).all())
        if not same:
            problems.append(f"{quoted(copy.tensor.name)}: holds {copy.why}")
    return problems


_ROUNDOFF = {
    "F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "float16": 2.0**-11, "bfloat16": 2.0**-8,
}  # fmt: skip


def _stored_dtype(opened: AdapterFolder, matched: Match, model: Model, dtype: str) -> str:
    """ "auto": the file's own where it has one, but bfloat16 beside quantised weights."""
    if dtype != "auto":
        return dtype
    stored = {tensor.dtype for change in matched.low_rank for tensor in (change.a, change.b)}
    stored |= {change.tensor.dtype for change in matched.replacements}
    stored |= {change.tensor.dtype for change in matched.rows}
    if len(stored) == 1 and (only := stored.pop()) != "F32":
        return {"BF16": "bfloat16", "F16": "float16"}[only]
    return "float32" if model.dtype in ("float32", "bfloat16", "float16") else "bfloat16"


def _held(opened: AdapterFolder, matched: Match, model: Model, dtype: str) -> Held:
    key = (opened.identity, dtype, _model_key(matched, model))
    with _building:  # Two threads that load the same file share one copy.
        held = _shared.get(key)
        if held is None:
            held = _Builder(opened, model, dtype).build(matched)
            _shared[key] = held
        return held


def _model_key(matched: Match, model: Model) -> str:
    """What an adapter's copy depends on: sizes always, weights where norms or scales need them."""
    text = repr(model.config.text)
    text += repr([(module.label, module.shape) for module in matched.touched if module.tower])
    reads = [c.module for c in matched.changes if not isinstance(c, LowRank) or c.magnitude]
    if reads:
        text += model.fingerprint + repr(list(model.weights.items()))
    if any(module.tower for module in reads):
        stats = [path.stat() for path in model.checkpoint.files]
        text += repr([(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats])
    if any(c.module.is_embedding for c in matched.low_rank):
        text += str(model.embed_scale)
    return hashlib.sha256(text.encode()).hexdigest()


class _Builder:
    """Reads the tensors one after the other and hands them to the engine."""

    def __init__(self, opened: AdapterFolder, model: Model, dtype: str) -> None:
        self._opened = opened
        self._model = model
        self._base = model.adapters.base
        self._dtype = dtype
        self._core = _core.Adapter(model.core, dtype)
        self._changes: list[Change] = []
        self._gains: dict[str, np.ndarray] = {}
        self._shifts: dict[Module, np.ndarray] = {}

    def build(self, matched: Match) -> Held:
        read = [c.module for c in matched.low_rank if c.magnitude]
        read += [c.module for c in matched.replacements]
        total = sum(math.prod(m.shape) * (2 if m.is_embedding else 1) for m in read)
        with ProgressBar("measuring weights", shown=total > BAR_WEIGHTS) as bar:
            progress = _counted(bar, total)
            for pair in matched.low_rank:
                self._add_pair(pair, progress)
            for change in matched.replacements:
                self._replace(change, progress)
            for rows in matched.rows:
                self._replace_rows(rows)
            for bias in matched.biases:
                self._replace_bias(bias)
        for module, shift in self._shifts.items():
            self._core.shift(module.layer, module.name, shift)
        order = {m.label: i for i, m in enumerate(matched.touched)}
        changes = sorted(self._changes, key=lambda change: order[change.module])
        return Held(self._core, self._dtype, tuple(changes), self._gains)

    def _note(self, module: Module, kind: str, norm: float, pair: LowRank | None = None) -> None:
        rank, scale = (pair.rank, pair.scale) if pair else (None, None)
        self._changes.append(Change(module.label, kind, rank, scale, norm))

    def _add_pair(self, pair: LowRank, progress: measure.Progress) -> None:
        module, read = pair.module, self._opened.read
        product = as_product(self._opened, pair)
        a, b, scale = product
        if module.is_experts:
            self._core.add_experts(module.layer, module.name, a, b, scale)
            self._note(module, "LoRA", product.norm(), pair)
            return
        if pair.bias:
            self._shift(module, np.float32(scale) * read(pair.bias))
        gain, kind, norm = None, "LoRA", product.norm()
        if pair.magnitude:
            found = measure.dora(self._base, module, product, read(pair.magnitude), progress)
            gain, kind, norm = found.gain, "DoRA", found.norm
            self._gains[module.label] = gain
        if module.is_embedding:  # The engine adds to what was scaled; PEFT scales both alike.
            scale *= self._model.embedding_scale(module.name)
        self._core.add(module.layer, module.name, a, b, scale, gain)
        self._note(module, kind, norm, pair)

    def _replace(self, change: Replacement, progress: measure.Progress) -> None:
        matrix = self._opened.read(change.tensor)
        square = 0.0
        for first, end, rows in measure.row_blocks(self._base, change.module, progress):
            square += float(np.square(matrix[first:end] - rows, dtype=np.float64).sum())
        self._core.replace(change.module.layer, change.module.name, matrix)
        self._note(change.module, "matrix", math.sqrt(square))

    def _replace_rows(self, change: Rows) -> None:
        rows = self._opened.read(change.tensor)
        base = self._base.rows(change.module.weight, change.ids)
        order = np.argsort(change.ids)
        self._core.replace_rows(change.module.name, sorted(change.ids), rows[order])
        norm = float(np.sqrt(np.square(rows - base, dtype=np.float64).sum()))
        self._note(change.module, "rows", norm)

    def _replace_bias(self, change: Bias) -> None:
        shift = self._opened.read(change.tensor) - self._base.vector(change.weight)
        self._shift(change.module, shift)
        self._note(change.module, "bias", float(np.linalg.norm(shift.astype(np.float64))))

    def _shift(self, module: Module, shift: np.ndarray) -> None:
        self._shifts[module] = self._shifts.get(module, np.float32(0)) + shift


def as_product(opened: AdapterFolder, pair: LowRank) -> Product:
    """Reads a pair as the engine takes it: experts apart, an embedding's A by token."""
    a, b = opened.read(pair.a), opened.read(pair.b)
    if pair.swapped:
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    if pair.module.is_experts:
        a, b = by_expert(a, b, pair.module.shape[0])
    return Product(a, b, pair.scale)


def by_expert(a: np.ndarray, b: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A [E·r, in] and B [out, r·E] as [E, r, in] and [E, out, r].

    A's rows are ordered by expert, then rank; B's columns by rank, then expert.
    """
    by_rank = b.reshape(len(b), -1, experts)
    return (
        a.reshape(experts, -1, a.shape[1]),
        np.ascontiguousarray(by_rank.transpose(2, 0, 1)),
    )


def _counted(bar: ProgressBar, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.show(min(1.0, done / max(1, total)))

    return advance
