"""An adapter that a model has loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.adapters import measure
from gemloupe.adapters.folder import AdapterFolder
from gemloupe.adapters.matching import Match
from gemloupe.adapters.modules import Module
from gemloupe.adapters.report import AdapterReport, Change
from gemloupe.errors import quoted
from gemloupe.progress import ProgressBar

if TYPE_CHECKING:
    from gemloupe.model import Model

# Norms of more weights than this show a progress bar.
BAR_WEIGHTS = 1 << 28


@dataclass(frozen=True, eq=False)
class Held:
    """The engine's copy of an adapter and what was measured beside; models of one kind share it."""

    core: Any
    """A `_core.Adapter`."""
    dtype: str
    changes: tuple[Change, ...]
    gains: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """DoRA's gain of each output, by module."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of one model, made by `model.load_adapter`. `report()` says what it changes."""

    name: str
    scale: float
    """Multiplies all that it changes, in every call."""
    held: Held = field(repr=False)
    folder: AdapterFolder = field(repr=False)
    match: Match = field(repr=False)
    model: Model = field(repr=False)

    @property
    def source(self) -> str:
        """The folder or hub id that it was loaded from."""
        return self.folder.source

    @property
    def base_model(self) -> str:
        """What it was trained on, as its config names it."""
        return self.folder.config.base_model

    @property
    def dtype(self) -> str:
        """How A and B are held: "float32" or "bfloat16"."""
        return self.held.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of A, B and whatever else the engine holds of it."""
        return int(self.held.core.nbytes)

    @functools.cached_property
    def towers(self) -> frozenset[str]:
        """Which of "vision" and "audio" it changes."""
        return frozenset(module.tower for module in self.match.touched if module.tower)

    def report(self, norms: bool = True) -> AdapterReport:
        """What the adapter changes, module by module, and what it can't.

        ‖ΔW‖ / ‖W‖ reads the model's weights when it is first asked for (a minute for the largest
        models); `norms=False` leaves ‖W‖ out.
        """
        modules = self.model.adapters.modules
        touched = {module.label for module in self.match.touched}
        changes = tuple(replace(c, norm=c.norm * abs(self.scale)) for c in self.held.changes)
        if norms:
            found = self._base_norms([modules[c.module] for c in changes if c.kind != "bias"])
            changes = tuple(
                c if c.kind == "bias" else replace(c, base_norm=found[c.module]) for c in changes
            )
        return AdapterReport(
            name=self.name,
            source=self.source,
            base_model=self.base_model,
            model=f"{quoted(self.model.checkpoint.source)}, {self.model.dtype} weights",
            scale=self.scale,
            dtype=self.dtype,
            nbytes=self.nbytes,
            changes=changes,
            untouched=tuple(label for label in modules if label not in touched),
            ignored=self.match.ignored,
            notes=self.folder.config.notes,
        )

    def _base_norms(self, modules: list[Module]) -> dict[str, float]:
        known, base = self.model.adapters.base_norms, self.model.adapters.base
        missing = [m for m in dict.fromkeys(modules) if m.weight not in known]
        total = sum(int(np.prod(module.shape)) for module in missing)
        with ProgressBar("measuring weights", shown=total > BAR_WEIGHTS) as bar:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar.show(done / total)

            for module in missing:
                if module.weight not in known:  # The head's is the embedding's.
                    known[module.weight] = measure.base_norm(base, module, advance)
        return {module.label: known[module.weight] for module in modules}

    def __repr__(self) -> str:
        ranks = sorted({change.rank for change in self.held.changes if change.rank})
        shown = (
            f"rank {ranks[0]}"
            if len(ranks) == 1
            else f"ranks {ranks[0]} to {ranks[-1]}"
            if ranks
            else "no ranks"
        )
        return (
            f"Adapter({self.name!r}, {shown}, {len(self.match.touched)} modules, scale "
            f"{self.scale:g}, from {quoted(self.source)})"
        )
