"""What `adapter.report()` says: what an adapter changes in a model, how much, and what it can't."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemloupe.adapters.matching import Ignored
from gemloupe.errors import quoted
from gemloupe.table import Table, facts_html

_SHOWN = 8


@dataclass(frozen=True)
class Change:
    """What an adapter does to one module."""

    module: str
    """The engine's name, "layers.3.attn.q_proj"."""
    kind: str
    """"LoRA", "DoRA", "matrix" (modules_to_save), "rows" (trainable tokens), or "bias"."""
    rank: int | None
    """None where the change is no product."""
    scale: float | None
    """alpha / r, or alpha / √r, and of trainable rows and matrices None."""
    norm: float
    """‖ΔW‖, Frobenius, at the adapter's own scale."""
    base_norm: float | None = None
    """‖W‖ of the model; None where it wasn't asked for, and of a bias."""

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W‖."""
        return self.norm / self.base_norm if self.base_norm else None


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter changes; print it, or take `table()`."""

    name: str
    source: str
    base_model: str
    """What the adapter was trained on, as its config names it."""
    model: str
    """What it is applied to."""
    scale: float
    """Multiplies every change, beside the scale of its module."""
    dtype: str
    """How A and B are held."""
    nbytes: int
    changes: tuple[Change, ...]
    untouched: tuple[str, ...]
    """Modules that an adapter could change, and this one doesn't."""
    ignored: tuple[Ignored, ...]
    """Tensors of the adapter that act nowhere in this model."""
    notes: tuple[str, ...] = field(default=())

    @property
    def matched(self) -> tuple[str, ...]:
        """The modules that it changes."""
        return tuple(dict.fromkeys(change.module for change in self.changes))

    def table(self) -> Table:
        """One row a change: module, kind, rank, scale, ‖ΔW‖, ‖ΔW‖ / ‖W‖."""
        return Table(
            {
                "module": [c.module for c in self.changes],
                "kind": [c.kind for c in self.changes],
                "rank": [c.rank for c in self.changes],
                "scale": [c.scale for c in self.changes],
                "‖ΔW‖": [c.norm for c in self.changes],
                "‖ΔW‖/‖W‖": [c.relative for c in self.changes],
            }
        )

    def _facts(self) -> list[tuple[str, str]]:
        rows = [
            ("from", self.source),
            (
                "trained on",
                quoted(self.base_model) if self.base_model else "its config doesn't say",
            ),
            ("applied to", self.model),
            ("held as", f"{self.dtype}, {self.nbytes:,} bytes"),
            ("changes", f"{len(self.matched)} modules, scale × {self.scale:g}"),
            ("untouched", _some(self.untouched)),
        ]
        if self.ignored:
            rows.append(("ignored", f"{len(self.ignored)} tensors"))
        return rows

    def _rest(self) -> list[str]:
        lines = [f"ignored {one.key}: {one.reason}" for one in self.ignored[:_SHOWN]]
        if len(self.ignored) > _SHOWN:
            lines.append(f"… {len(self.ignored) - _SHOWN} more in .ignored")
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def __repr__(self) -> str:
        facts = "\n".join(f"  {name:<12}{value}" for name, value in self._facts())
        rest = "\n".join(f"  {line}" for line in self._rest())
        return "\n".join(p for p in (f"adapter {self.name}", facts, rest, repr(self.table())) if p)

    def _repr_html_(self) -> str:
        rows = [*self._facts(), *(tuple(line.split(" ", 1)) for line in self._rest())]
        return facts_html(f"adapter {self.name}", rows) + self.table()._repr_html_()  # type: ignore[arg-type]


def _some(names: tuple[str, ...]) -> str:
    if not names:
        return "none"
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{len(names)} modules: {shown}, …"
