"""Folds adapters into a checkpoint's weights for `gl.convert`: W + ΔW in float32, then rounded."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.adapters import measure
from gemloupe.adapters.adapter import Adapter
from gemloupe.adapters.effective import EffectiveWeights
from gemloupe.adapters.loading import as_product, weights_of
from gemloupe.adapters.matching import Changing, LowRank, Replacement, Rows
from gemloupe.adapters.modules import HEAD, Module
from gemloupe.adapters.selection import Selection
from gemloupe.checkpoint import Checkpoint, TextTensor
from gemloupe.errors import quoted
from gemloupe.progress import ProgressBar

if TYPE_CHECKING:
    from gemloupe.model import Model

_FILE = "changed-weights"
_ALIGNMENT = 64


@dataclass(frozen=True)
class Changed:
    """A file of float32 tensors that stand in for a checkpoint's own."""

    path: Path
    tensors: Mapping[str, TextTensor]
    """By name without prefix; `file` is not yet known."""
    label: str
    """The adapters and their weights, for people."""
    digest: str
    """SHA-256 of their files and weights."""

    def over(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with these tensors in place of its own."""
        number = len(checkpoint.files)
        mine = {name: tensor._replace(file=number) for name, tensor in self.tensors.items()}
        tensors = {name: mine.get(name, own) for name, own in checkpoint.text_tensors.items()}
        return replace(checkpoint, files=(*checkpoint.files, self.path), text_tensors=tensors)


@dataclass(frozen=True)
class Baking:
    """Adapters that fit a model, whose weights are about to be written."""

    model: Model
    selection: Selection
    modules: tuple[Module, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file that `write` makes."""
        return sum(4 * math.prod(module.shape) + _ALIGNMENT for module in self.modules)

    def write(self, folder: Path) -> Changed:
        """Writes the changed matrices into a file in `folder`."""
        effective = EffectiveWeights(self.selection)
        tensors = {}
        path = folder / _FILE
        with path.open("wb") as file, ProgressBar("merging the adapter") as bar:
            for module in self.modules:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                begin = file.tell()
                for first, _end, rows in measure.row_blocks(self.model.weights, module):
                    file.write(effective.rows(module, rows, first).tobytes())
                    bar.show(file.tell() / self.nbytes)
                tensors[module.weight] = TextTensor(-1, "float32", module.shape, begin, file.tell())
        label = "; ".join(
            f"{adapter.source} × {adapter.scale:g}" for adapter, _ in self.selection.adapters
        )
        digest = hashlib.sha256(label.encode())
        for adapter, _weight in self.selection.adapters:
            for file_path in (adapter.folder.weights, adapter.folder.config_path):
                with file_path.open("rb") as stored:
                    while part := stored.read(1 << 20):
                        digest.update(part)
        return Changed(path, tensors, label, digest.hexdigest())


def prepare(source: str | os.PathLike[str], adapter: Any) -> Baking:
    """Opens adapters for the checkpoint `source`; ValueError for what no weights can hold."""
    from gemloupe.model import load

    model = load(source)
    loaded = []
    for number, (path, weight) in enumerate(weights_of(adapter).items()):
        one = model.load_adapter(path, name=f"{number}", scale=weight, dtype="float32")
        loaded.append((one, 1.0))
        _check(one)
    touched = dict.fromkeys(module for one, _ in loaded for module in one.match.touched)
    modules = tuple(module for module in touched if module.name != HEAD)
    return Baking(model, Selection(tuple(loaded)), modules)


def _check(adapter: Adapter) -> None:
    biased = [pair.module.label for pair in adapter.match.low_rank if pair.bias]
    if biased:
        raise ValueError(
            f"{adapter.source}: lora_bias adds a bias to {biased[0]} and {len(biased) - 1} others, "
            "which no weights of this model can hold; load it beside the model instead"
        )
    changes = {
        change.module.name: change
        for change in adapter.match.changes
        if change.module.name in ("embed_tokens", HEAD)
    }
    if changes and not _tied(adapter, changes.get("embed_tokens"), changes.get(HEAD)):
        raise ValueError(
            f"{adapter.source}: it changes {' and '.join(map(quoted, changes))} apart, but the "
            "weights of both are one matrix; load it beside the model instead"
        )


def _tied(adapter: Adapter, embedding: Changing | None, head: Changing | None) -> bool:
    """Whether both changes are the same one of the shared matrix."""
    opened = adapter.folder
    if isinstance(embedding, Rows) and isinstance(head, Rows):
        return embedding.tensor == head.tensor and embedding.ids == head.ids
    if isinstance(embedding, Replacement) and isinstance(head, Replacement):
        return np.array_equal(opened.read(embedding.tensor), opened.read(head.tensor))
    if isinstance(embedding, LowRank) and isinstance(head, LowRank):
        plain = embedding.magnitude is None and head.magnitude is None
        ours, theirs = as_product(opened, embedding), as_product(opened, head)
        same = np.array_equal(ours.a, theirs.b.T) and np.array_equal(ours.b, theirs.a.T)
        return plain and same and ours.scale == theirs.scale
    return False
