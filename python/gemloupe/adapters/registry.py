"""The adapters of one model: loading, deleting, choosing and merging them."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gemloupe import _core, override
from gemloupe.adapters import loading, selection
from gemloupe.adapters.adapter import Adapter
from gemloupe.adapters.base_weights import BaseWeights
from gemloupe.adapters.modules import Module, Towers, modules_of, towers_of
from gemloupe.adapters.selection import Selection
from gemloupe.cache import BASE
from gemloupe.errors import did_you_mean, quoted
from gemloupe.progress import ProgressBar
from gemloupe.table import Table

if TYPE_CHECKING:
    from gemloupe.model import Model

_NAME = re.compile(r"[^\s*?\[\]{}:,]+")


class Adapters:
    """What `model.adapters` is. Any thread may use it, while others generate."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._loaded: dict[str, Adapter] = {}
        self._merged: dict[str, tuple[Adapter, float]] = {}
        self.default: dict[str, float] = {}
        """Names and weights of the calls that choose nothing, in every thread: `load(adapter=)`."""
        self.base_norms: dict[str, float] = {}
        """‖W‖ of the tensors that were asked for, by name."""
        self.version = 0
        """Of the weights that passes use; odd while they are being changed."""

    @functools.cached_property
    def towers(self) -> Towers:
        """What adapters find of the model's vision and audio parts."""
        return towers_of(self._model.checkpoint)

    @functools.cached_property
    def modules(self) -> Mapping[str, Module]:
        """Every module that adapters can change, by label, in model order."""
        text = modules_of(self._model.config.text).values()
        return {module.label: module for module in (*text, *self.towers.modules.values())}

    @functools.cached_property
    def base(self) -> BaseWeights:
        """The weights that adapters stand beside."""
        return BaseWeights(self._model)

    def load(
        self, source: str | os.PathLike[str], name: str | None, scale: float, strict: bool,
        dtype: str,
    ) -> Adapter:  # fmt: skip
        override.refuse_inside(self._model, "an adapter can't be loaded")
        if name is not None:
            self._check_free(name)
        adapter = loading.load(self._model, source, name, scale, strict, dtype)
        with self._lock:
            self._check_free(adapter.name)
            self._loaded[adapter.name] = adapter
        return adapter

    def _check_free(self, name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == BASE:
            raise ValueError(
                f"name is {quoted(name)}; expected a word without spaces and any of *?[]{{}}:,"
                " (name=… gives the adapter one)"
            )
        if name in self._loaded:
            raise ValueError(
                f"there is an adapter {quoted(name)}, from {quoted(self._loaded[name].source)}; "
                "expected a new name: pass name=…, or delete_adapter first"
            )

    def delete(self, name: str) -> None:
        with self._lock:
            adapter = self._named(name)
            if name in self._merged:
                raise RuntimeError(
                    f"adapter {quoted(name)} is merged into the weights; unmerge_adapter first"
                )
            del self._loaded[adapter.name]
            self.default.pop(adapter.name, None)
        self._model.forget_prefixes()

    def holds(self, adapter: Adapter) -> bool:
        """Whether it is loaded: this very one, not another of its name."""
        return self._loaded.get(adapter.name) is adapter

    def __getitem__(self, name: str) -> Adapter:
        with self._lock:
            return self._named(name)

    def _named(self, name: str) -> Adapter:
        found = self._loaded.get(name)
        if found is None:
            known = did_you_mean(name, self._loaded) or (
                f"There are {', '.join(map(quoted, self._loaded))}."
                if self._loaded
                else "None is loaded: model.load_adapter(folder) loads one."
            )
            raise KeyError(f"no adapter {quoted(name)}. {known}")
        return found

    def table(self) -> Table:
        """name, scale, modules, MiB, active, from: one row an adapter."""
        with self._lock:
            loaded = list(self._loaded.values())
        active = self._active_names()
        return Table(
            {
                "name": [a.name for a in loaded],
                "scale": [a.scale for a in loaded],
                "modules": [len(a.match.touched) for a in loaded],
                "MiB": [round(a.nbytes / 2**20, 2) for a in loaded],
                "active": [self._state(a, active) for a in loaded],
                "from": [a.source for a in loaded],
            }
        )

    def _state(self, adapter: Adapter, active: Mapping[str, float]) -> str:
        if adapter.name in self._merged:
            return "merged"
        weight = active.get(adapter.name)
        return "" if weight is None else f"× {weight:g}"

    def describe(self) -> tuple[str, ...]:
        """A line on each adapter: what it is, and whether calls of this context run under it."""
        active = self._active_names()
        with self._lock:
            loaded = list(self._loaded.values())
        lines = []
        for adapter in loaded:
            state = self._state(adapter, active)
            lines.append(f"{adapter!r}: {state or 'not active'}".replace("×", "active ×"))
        return tuple(lines)

    def __len__(self) -> int:
        return len(self._loaded)

    # Choosing.

    def set(self, value: Any) -> None:
        """Chooses for the later calls of this context; None for the model's own choice."""
        selection.choose(self, None if value is None else self._known_names(value))

    def disabled(self) -> AbstractContextManager[None]:
        return selection.choosing(self, {})

    def _known_names(self, value: Any) -> dict[str, float]:
        if isinstance(value, (list, tuple)):
            value = dict.fromkeys(value, 1.0)
        return {adapter.name: weight for adapter, weight in self._select(value).adapters}

    def _active_names(self) -> Mapping[str, float]:
        names = selection.chosen(self)
        return self.default if names is None else names

    def active(self) -> Selection:
        """What a call without adapter= runs under; read when it begins."""
        return self._select(dict(self._active_names()))

    def selected(self, value: Any) -> Selection:
        """What a call with adapter=value runs under.

        KeyError for a name that is not loaded; ValueError for an adapter of another model, and for
        one that is merged: its change would count twice.
        """
        if value is None:
            names = selection.chosen(self)
            if self._merged and names == {}:
                raise RuntimeError(
                    f"{self.merged} is merged into the weights, where it can't be disabled; "
                    "unmerge_adapter first"
                )
            return self.active()
        return self._select(value)

    def rows(self, value: Any, count: int | None) -> list[Selection]:
        """One selection for each row, from `adapter=`."""
        overridden = override.label(self._model)
        return [
            replace(self.selected(one), overridden=overridden)
            for one in selection.per_row(value, count)
        ]

    def media(self, selected: Selection) -> Selection:
        """What images and sounds of a row that runs under `selected` are encoded under: merged
        adapters too, whose changes of the towers stay beside the weights."""
        with self._lock:
            return Selection((*self._merged.values(), *selected.adapters))

    def _select(self, value: Any) -> Selection:
        found = []
        with self._lock:
            for key, weight in selection.names_of(value).items():
                adapter = key if isinstance(key, Adapter) else self._named(key)
                if self._loaded.get(adapter.name) is not adapter:
                    raise ValueError(
                        f"adapter {quoted(adapter.name)} was deleted, or belongs to another model; "
                        "load it with this model's load_adapter"
                    )
                if adapter.name in self._merged:
                    raise ValueError(
                        f"adapter {quoted(adapter.name)} is merged into the weights already: leave "
                        "adapter= out, or unmerge_adapter first"
                    )
                if weight:
                    found.append((adapter, weight))
        # In one order, whatever the caller's: sums of floats depend on it.
        return Selection(tuple(sorted(found, key=lambda entry: entry[0].name)))

    # Merging.

    @property
    def merged(self) -> str:
        """What is merged into the weights, for people; "" for nothing."""
        return Selection(tuple(self._merged.values())).label if self._merged else ""

    def merge(self, name: str | Adapter, weight: float, requantize: bool) -> Table:
        loading.check_weight(weight, "weight")
        with self._lock:
            adapter = name if isinstance(name, Adapter) else self._named(name)
            if self._loaded.get(adapter.name) is not adapter:
                raise ValueError(f"adapter {quoted(adapter.name)} is not of this model")
            if adapter.name in self._merged:
                raise RuntimeError(f"adapter {quoted(adapter.name)} is merged already")
            return self._merge({**self._merged, adapter.name: (adapter, float(weight))}, requantize)

    def unmerge(self, name: str | Adapter | None, requantize: bool) -> Table:
        with self._lock:
            wanted = getattr(name, "name", name)
            if not self._merged or (wanted is not None and wanted not in self._merged):
                what = "no adapter is" if wanted is None else f"adapter {quoted(wanted)} is not"
                raise RuntimeError(f"{what} merged; merge_adapter(name) merges one")
            kept = {n: one for n, one in self._merged.items() if wanted not in (None, n)}
            return self._merge(kept, requantize)

    def _merge(self, merged: dict[str, tuple[Adapter, float]], requantize: bool) -> Table:
        """Folds all of `merged` into the weights anew, so that errors don't add up."""
        override.refuse_inside(self._model, "adapters can't be merged")
        mix = Selection(tuple(merged.values())).core
        self.version += 1
        try:
            with ProgressBar("merging") as bar:
                errors = _core.merge_adapters(self._model.core, mix, requantize, bar.show)
            self._merged = merged
        finally:  # A version that failed is never current again, either.
            self.version += 1
            self._model.forget_prefixes()
        self.base_norms.clear()
        return Table(
            {"module": [module for module, _ in errors], "error": [error for _, error in errors]}
        )
