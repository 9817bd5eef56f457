"""Which adapters a call runs under: what `adapter=` means, and what is active in a context."""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemloupe.adapters.adapter import Adapter
from gemloupe.adapters.loading import check_weight
from gemloupe.cache import BASE
from gemloupe.errors import quoted

if TYPE_CHECKING:
    from gemloupe.adapters.registry import Adapters

Choice = str | Adapter | Mapping[Any, float] | None
"""A name, an adapter, {name or adapter: weight}, {} for none; None for those that are active."""


Mix = tuple[tuple[Any, float], ...]
"""(`_core.Adapter`, weight) of adapters whose changes add up."""


@dataclass(frozen=True)
class Selection:
    """The adapters of one row, each with the weight of its changes."""

    adapters: tuple[tuple[Adapter, float], ...] = ()
    overridden: str = ""
    """What `Model.override` put in place of the model's weights, for people; "" for nothing."""
    left_behind: str = ""
    """The label of one whose adapters stayed in another process."""

    def __getstate__(self) -> dict[str, Any]:
        # Adapters stay with their model; results that travel say under which they were made.
        label = self.label if self.adapters else self.left_behind
        return {"adapters": (), "overridden": self.overridden, "left_behind": label}

    @property
    def core(self) -> list[tuple[Any, float]]:
        """What the engine takes: every weight times its adapter's own scale."""
        return [(adapter.held.core, weight * adapter.scale) for adapter, weight in self.adapters]

    def of_tower(self, tower: str) -> Mix:
        """The same of those adapters that change a tower: "vision" or "audio"."""
        return tuple(
            (adapter.held.core, weight * adapter.scale)
            for adapter, weight in self.adapters
            if tower in adapter.towers
        )

    @property
    def label(self) -> str:
        """ "a", "0.5 a + 0.5 b", or the name of no adapter: what a cache's provenance says."""
        if self.left_behind:
            return self.left_behind
        texts = [
            adapter.name if weight == 1 else f"{weight:g} {adapter.name}"
            for adapter, weight in self.adapters
        ]
        texts += [self.overridden] if self.overridden else []
        return " + ".join(texts) or BASE

    def __bool__(self) -> bool:
        return bool(self.adapters or self.overridden or self.left_behind)


NO_ADAPTERS = Selection()

# (registry, what was chosen) of the models whose adapters were set or disabled in this context.
_Chosen = tuple[tuple["weakref.ref[Adapters]", Mapping[str, float]], ...]
_chosen: contextvars.ContextVar[_Chosen] = contextvars.ContextVar(
    "gemloupe.adapters.chosen", default=()
)


def chosen(registry: Adapters) -> Mapping[str, float] | None:
    """Names and weights that this context chose, {} for none; None where it chose nothing."""
    return next((names for ref, names in _chosen.get() if ref() is registry), None)


def choose(registry: Adapters, names: Mapping[str, float] | None) -> contextvars.Token[_Chosen]:
    """Makes `names` what later calls of this context run under; None for the model's own choice."""
    others = tuple(
        entry for entry in _chosen.get() if entry[0]() is not None and entry[0]() is not registry
    )
    mine = () if names is None else ((weakref.ref(registry), dict(names)),)
    return _chosen.set((*others, *mine))


@contextlib.contextmanager
def choosing(registry: Adapters, names: Mapping[str, float] | None) -> Iterator[None]:
    """Chooses for the calls inside the block."""
    token = choose(registry, names)
    try:
        yield
    finally:
        _chosen.reset(token)


def names_of(value: Any, argument: str = "adapter") -> dict[Any, float]:
    """`value` as {name or adapter: weight}. TypeError for what is no choice of adapters."""
    if isinstance(value, (str, Adapter)):
        return {value: 1.0}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{argument} is {quoted(value)} ({type(value).__name__}); expected a name, an adapter, "
            '{"a": 0.5, "b": 0.5}, {} for none, or None'
        )
    for key, weight in value.items():
        if not isinstance(key, (str, Adapter)):
            raise TypeError(f"{argument} has the key {quoted(key)}; expected a name or an adapter")
        check_weight(weight, f"{argument}[{key if isinstance(key, str) else key.name!r}]")
    return {key: float(weight) for key, weight in value.items()}


def per_row(value: Any, rows: int | None) -> list[Any]:
    """One choice for each of `rows` rows (None: a single prompt) from `adapter=`."""
    if not isinstance(value, (list, tuple)):
        return [value] * (1 if rows is None else rows)
    if rows is None:
        raise TypeError(
            "adapter is a list, which gives one a row of a batch; x is a single prompt: pass one, "
            "or several at once with their weights, {'a': 1, 'b': 1}"
        )
    if len(value) != rows:
        raise ValueError(f"adapter has {len(value)} entries for {rows} rows; pass one a row")
    return list(value)
