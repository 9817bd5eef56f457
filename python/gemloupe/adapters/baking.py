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
from gemloupe.adapters.effective import EffectiveWeights, rounded
from gemloupe.adapters.loading import as_product, weights_of
from gemloupe.adapters.matching import Bias, Changing, LowRank, Replacement, Rows
from gemloupe.adapters.modules import HEAD, Module
from gemloupe.adapters.selection import Selection
from gemloupe.checkpoint import Checkpoint, StoredTensor, TextTensor
from gemloupe.errors import quoted
from gemloupe.progress import ProgressBar
from gemloupe.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from gemloupe.model import Model

_FILE = "changed-weights"
_ALIGNMENT = 64


@dataclass(frozen=True)
class Changed:
    """A file of tensors that stand in for a checkpoint's own: float32, of towers as stored."""

    path: Path
    tensors: Mapping[str, TextTensor]
    """By name without prefix; `file` is not yet known."""
    towers: Mapping[str, TensorInfo]
    """By full name."""
    label: str
    """The adapters and their weights, for people."""
    digest: str
    """SHA-256 of their files and weights."""

    def over(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with these tensors in place of its own."""
        number = len(checkpoint.files)
        mine = {name: tensor._replace(file=number) for name, tensor in self.tensors.items()}
        text = {name: mine.get(name, own) for name, own in checkpoint.text_tensors.items()}
        towers = {name: StoredTensor(number, info) for name, info in self.towers.items()}
        return replace(
            checkpoint,
            files=(*checkpoint.files, self.path),
            text_tensors=text,
            tensors=checkpoint.tensors | towers,
        )


@dataclass(frozen=True)
class Baking:
    """Adapters that fit a model, whose weights are about to be written."""

    model: Model
    selection: Selection
    modules: tuple[Module, ...]
    """Those whose matrices change."""

    @property
    def nbytes(self) -> int:
        """Bytes of the file that `write` makes, or a few more."""
        biases = sum(4 * bias.tensor.shape[0] + _ALIGNMENT for _, bias, _ in self._biases())
        return biases + sum(4 * math.prod(module.shape) + _ALIGNMENT for module in self.modules)

    def write(self, folder: Path) -> Changed:
        """Writes the changed tensors into a file in `folder`."""
        effective = EffectiveWeights(self.selection)
        full_names = {name.removeprefix("model."): name for name in self.model.checkpoint.tensors}
        text: dict[str, TextTensor] = {}
        towers: dict[str, TensorInfo] = {}
        path = folder / _FILE
        with path.open("wb") as file, ProgressBar("merging the adapter") as bar:
            for module in self.modules:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                begin = file.tell()
                dtype = self.model.adapters.base.dtype(module.weight) if module.tower else "float32"
                for first, _end, rows in measure.row_blocks(self.model.adapters.base, module):
                    file.write(_stored(effective.rows(module, rows, first), dtype))
                    bar.show(file.tell() / self.nbytes)
                if module.tower:
                    name, end = full_names[module.weight], file.tell()
                    towers[name] = TensorInfo(name, dtype, module.shape, begin, end)
                else:
                    end = file.tell()
                    text[module.weight] = TextTensor(-1, dtype, module.shape, begin, end)
            for weight, values in self._new_biases().items():
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                begin, dtype = file.tell(), self.model.adapters.base.dtype(weight)
                file.write(_stored(values, dtype))
                name = full_names[weight]
                towers[name] = TensorInfo(name, dtype, values.shape, begin, file.tell())
        label = "; ".join(
            f"{adapter.source} × {adapter.scale:g}" for adapter, _ in self.selection.adapters
        )
        digest = hashlib.sha256(label.encode())
        for adapter, _weight in self.selection.adapters:
            for file_path in (adapter.folder.weights, adapter.folder.config_path):
                with file_path.open("rb") as stored:
                    while part := stored.read(1 << 20):
                        digest.update(part)
        return Changed(path, text, towers, label, digest.hexdigest())

    def _biases(self) -> list[tuple[Adapter, Bias, float]]:
        return [
            (adapter, bias, weight * adapter.scale)
            for adapter, weight in self.selection.adapters
            for bias in adapter.match.biases
        ]

    def _new_biases(self) -> dict[str, np.ndarray]:
        """Tensor -> its values under all adapters; only linear modules of towers have biases."""
        found: dict[str, np.ndarray] = {}
        for adapter, bias, weight in self._biases():
            own = self.model.adapters.base.vector(bias.weight)
            change = np.float32(weight) * (adapter.folder.read(bias.tensor) - own)
            found[bias.weight] = found.get(bias.weight, own) + change
        return found


def _stored(values: np.ndarray, dtype: str) -> bytes:
    """float32 values as bytes of `dtype`."""
    if dtype == "bfloat16":
        bits = rounded(values, dtype).view(np.uint32) >> np.uint32(16)
        return bits.astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "float16" else "<f4").tobytes()


def prepare(source: str | os.PathLike[str], adapter: Any) -> Baking:
    """Opens adapters for the checkpoint `source`; ValueError for what no weights can hold."""
    from gemloupe.model import load

    model = load(source)
    loaded = []
    for number, (path, weight) in enumerate(weights_of(adapter).items()):
        one = model.load_adapter(path, name=f"{number}", scale=weight, dtype="float32")
        loaded.append((one, 1.0))
        _check(one)
    touched = dict.fromkeys(
        change.module
        for one, _ in loaded
        for change in one.match.changes
        if not isinstance(change, Bias) and change.module.name != HEAD
    )
    modules = tuple(touched)
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
