"""Names of what adapters add to a module's output: "lora.{adapter}.layers.3.attn.q_proj"."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from gemloupe.adapters.modules import HEAD
from gemloupe.errors import did_you_mean, quoted

if TYPE_CHECKING:
    from gemloupe.adapters.matching import Changing
    from gemloupe.adapters.selection import Selection

PREFIX = "lora."


@dataclass(frozen=True)
class Delta:
    """The change [T, out] that one adapter makes to a linear module's output."""

    adapter: Any
    """A `_core.Adapter`."""
    module: str
    layer: int
    width: int

    @property
    def point(self) -> str:
        """The hook point that is computed last when this is."""
        tower = f"{self.module.split('.')[0]}." if self.module.startswith(_TOWERS) else ""
        if self.layer >= 0:
            return f"{tower}layers.{self.layer}.resid_post"
        return _OUTSIDE.get(self.module, f"{tower}soft_tokens" if tower else "embed")


_TOWERS = ("vision.", "audio.")
_OUTSIDE = {
    HEAD: "logits_raw",
    "vision.input_proj": "vision.patches",
    "vision.patch_dense": "vision.patches",
    "audio.input_proj": "audio.subsampled",
    "audio.output_proj": "audio.encoded",
}
# Its rows are distances, not positions.
_NO_ROWS = "audio.attn.relative_k_proj"


def match(pattern: str, selection: Selection, tower: str = "") -> dict[str, Delta]:
    """The changes that a name or pattern means, under the adapters of a call.

    `tower` is "vision", "audio", or "" for the text decoder: whose modules are meant.

    KeyError, with close matches, for one that matches nothing: an adapter that the call does not
    run under, a module that it does not change, an embedding or experts.
    """
    known = {
        f"{PREFIX}{adapter.name}.{change.module.label}": _delta(adapter.held.core, change)
        for adapter, _weight in selection.adapters
        for change in adapter.match.changes
        if not change.module.is_embedding
        and not change.module.is_experts
        and change.module.tower == tower
        and change.module.name != _NO_ROWS
    }
    found = {name: delta for name, delta in known.items() if fnmatchcase(name, pattern)}
    if not found:
        hint = did_you_mean(pattern, known) or (
            f"This call runs under {selection.label}; a name is lora.NAME.layers.3.attn.q_proj, of "
            "a linear module that the adapter changes."
        )
        raise KeyError(f"{quoted(pattern)} is no change of an adapter. {hint}")
    return found


def _delta(core: Any, change: Changing) -> Delta:
    module = change.module
    return Delta(core, module.name, module.layer, module.outputs)
