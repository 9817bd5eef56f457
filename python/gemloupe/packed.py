"""Packed checkpoints: folders that `gemloupe convert` wrote. The engine reads and writes the file.

A folder holds config.json, the tokenizer's files, and model.gemloupe, whose tensors lie as the
kernels read them, under the names of the checkpoint that they came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemloupe import _core, strict_json
from gemloupe.errors import quoted
from gemloupe.safetensors_header import TensorInfo

FILE_NAME = "model.gemloupe"
PARTIAL = ".gemloupe-partial-"
"""Begins the name of a folder that a conversion is filling, or left when it was killed."""


@dataclass(frozen=True)
class Provenance:
    """Where a packed file came from, as convert wrote it down."""

    dtype: str
    """The preset of its recipe; "auto" is written as the source's dtype."""
    recipe: dict[str, str]
    """The patterns that convert was given, "default" among them."""
    embed_scale: str
    """"float32" or "bfloat16", as the source would have been loaded."""
    source: str
    source_hash: str
    """SHA-256 over config.json and the headers of the weight files, and over adapters."""
    source_dtype: str
    gemloupe: str
    """Version of the package that wrote it."""
    adapter: str = ""
    """The adapters that were folded in, and their weights."""


def is_packed(folder: Path) -> bool:
    """True where convert has written the folder."""
    return (folder / FILE_NAME).is_file()


def read(folder: Path) -> tuple[dict[str, TensorInfo], Provenance]:
    """Returns the tensors by their full names, and their source.

    ValueError naming the file where it is damaged, or of another version or layout.
    """
    path = folder / FILE_NAME
    if folder.name.startswith(PARTIAL):
        raise ValueError(
            f"{folder}: a conversion that did not end left this folder; convert the original "
            "checkpoint again"
        )
    entries, metadata = _core.read_packed(str(path))
    fields = strict_json.parse_object(metadata, f"{path}, metadata")
    tensors = {
        entry.name: TensorInfo(entry.name, entry.dtype, tuple(entry.shape), entry.begin, entry.end)
        for entry in entries
    }
    return tensors, _provenance(path, fields)


def _provenance(path: Path, fields: dict[str, object]) -> Provenance:
    recipe = fields.pop("recipe", None)
    names = [name for name in Provenance.__dataclass_fields__ if name != "recipe"]
    fields.setdefault("adapter", "")
    texts = {name: fields.get(name) for name in names}
    for name, value in {**texts, "recipe": recipe}.items():
        fits = isinstance(value, str) if name != "recipe" else _is_text_mapping(value)
        if not fits:
            raise ValueError(
                f"{path}: metadata field {name} is {quoted(value)}; expected text. Convert the "
                "original checkpoint again."
            )
    if texts["embed_scale"] not in ("float32", "bfloat16"):
        raise ValueError(
            f"{path}: metadata field embed_scale is {quoted(texts['embed_scale'])}; expected "
            "'float32' or 'bfloat16'. Convert the original checkpoint again."
        )
    return Provenance(recipe=recipe, **texts)  # type: ignore[arg-type]


def _is_text_mapping(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text, str) for item in value.items() for text in item
    )


def damaged_tensors(folder: Path, progress: object = None) -> list[str]:
    """Reads every tensor and returns the names of those that changed since they were written."""
    return _core.damaged_tensors(str(folder / FILE_NAME), progress)  # type: ignore[arg-type]
