"""What guesses tokens: Gemma 4's assistant checkpoints, or what a sequence said before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core, checkpoint, safetensors_header, strict_json
from gemloupe.config import Fields, ModelConfig, parse_config
from gemloupe.errors import one_of, quoted
from gemloupe.progress import ProgressBar
from gemloupe.towers import ENGINE_DTYPES

if TYPE_CHECKING:
    from pathlib import Path

    from gemloupe.model import Model

MODEL_TYPES = {"gemma4_assistant": "gemma4", "gemma4_unified_assistant": "gemma4_unified"}
"""model_type of a drafter -> that of its target."""
DTYPES = ("auto", "float32", "bfloat16", "int8", "int4")
MOST_TOKENS = 7
"""A pass of the engine decodes eight rows as exactly as one: the last token and seven guesses."""
_MOST_NGRAM = 16
_ORDERING = "masked_embedding.token_ordering"
_MODEL = "model."
_BAR_BYTES = 1 << 30


@dataclass(frozen=True)
class DraftCounts:
    """What became of the guesses of one row."""

    passes: int = 0
    """Passes of the target that checked guesses."""
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """The share of guesses that were right; 0.0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True)
class PromptLookup:
    """Guesses without a model: what followed the last tokens where the sequence had them before.

    Prompt and answer are searched for the last `ngram` tokens, else for fewer, down to two, and up
    to `max_tokens` of what followed the last earlier place are guessed: names, quotations, code
    that is changed a little. `generate(..., drafter=)` takes it, for any model; "prompt-lookup"
    stands for one with these defaults. TypeError and ValueError for numbers out of range.
    """

    ngram: int = 3
    """2 to 16."""
    max_tokens: int = 7
    """Of one pass, 1 to 7; how many it is follows how many were right."""

    def __post_init__(self) -> None:
        for name, low, high in (("ngram", 2, _MOST_NGRAM), ("max_tokens", 1, MOST_TOKENS)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name} is {quoted(number)}; expected an int")
            if not low <= number <= high:
                raise ValueError(f"{name} is {number}; expected {low} to {high}")

    def serve(self, request: _core.RowRequest) -> None:
        """Makes a row be drafted for."""
        request.lookup_ngram = self.ngram
        request.draft_tokens = self.max_tokens


class Drafter:
    """A drafter of one model, made by `Model.load_drafter`; `generate(..., drafter=)` takes it."""

    def __init__(self, core: _core.Drafter, source: str, model: Model, max_tokens: int) -> None:
        self.core = core
        self.source = source
        self.max_tokens = max_tokens
        self._model = model

    def check_target(self, model: Any) -> None:
        """ValueError unless it was loaded for `model`."""
        if model is not self._model:
            raise ValueError(
                f"the drafter {quoted(self.source)} was loaded for another model; load it with "
                "this model's load_drafter"
            )

    def serve(self, request: _core.RowRequest) -> None:
        """Makes a row be drafted for."""
        request.drafter = self.core
        request.draft_tokens = self.max_tokens

    def __repr__(self) -> str:
        megabytes = (self.core.copied_bytes + self.core.mapped_bytes) / 1e6
        return (
            f"Drafter({self.source!r}, up to {self.max_tokens} tokens a pass, {megabytes:.1f} MB)"
        )


def is_drafter(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is a drafter's."""
    return raw.get("model_type") in MODEL_TYPES


def load(
    model: Model, source: str | os.PathLike[str], dtype: str = "auto", max_tokens: int = 4
) -> Drafter:
    """Reads a drafter for `model`; see `Model.load_drafter`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {quoted(dtype)}; expected {one_of(DTYPES)}")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise TypeError(f"max_tokens is {quoted(max_tokens)}; expected an int")
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise ValueError(f"max_tokens is {max_tokens}; expected 1 to {MOST_TOKENS}")
    folder = checkpoint.resolve(source)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a drafter's checkpoint folder")
    raw = strict_json.read_object(path)
    top, own = _read_config(raw, str(path))
    files, found = safetensors_header.read_folder(folder)
    shapes = _expected(top, own)
    _check_tensors(folder, found, shapes)

    config = _core.DrafterConfig()
    from gemloupe.model import core_config

    config.text = core_config(own.text)
    config.backbone_hidden_size = top.integer("backbone_hidden_size", low=1, high=1 << 20)
    if clusters := _clusters(top):
        config.num_clusters = clusters
        config.centroid_top_k = top.integer("centroid_intermediate_top_k", low=1, high=clusters)
        config.cluster_tokens = _ordering(files, found, own.text.vocab_size)
    weights = _core.Weights()
    by_file: dict[int, list[_core.TensorEntry]] = {}
    total = 0
    for name in shapes:
        if name == _ORDERING:
            continue
        file, info = found[name]
        if info.dtype not in ENGINE_DTYPES:
            raise ValueError(
                f"{files[file]}: {quoted(name)} has the type {info.dtype}; expected F32, BF16 "
                "or F16"
            )
        total += info.end - info.begin
        by_file.setdefault(file, []).append(
            _core.TensorEntry(
                name.removeprefix(_MODEL),
                ENGINE_DTYPES[info.dtype],
                list(info.shape),
                info.begin,
                info.end,
            )
        )
    for file, entries in by_file.items():
        weights.add_file(str(files[file]), entries)
    for name, shape in shapes.items():
        if dtype != "auto" and len(shape) == 2 and name != _ORDERING:
            weights.set_target(name.removeprefix(_MODEL), dtype)
    with ProgressBar("loading the drafter", shown=dtype != "auto" and total > _BAR_BYTES) as bar:
        core = _core.Drafter(config, model.core, weights, bar.show)
    return Drafter(core, os.fspath(source), model, max_tokens)


def _read_config(raw: dict[str, Any], where: str) -> tuple[Fields, ModelConfig]:
    """The file's own fields, and its decoder as one that shares no keys."""
    top = Fields(where, raw)
    if not is_drafter(raw):
        top.refuse(
            "model_type",
            one_of(list(MODEL_TYPES)),
            "A drafter is a checkpoint of its own; its name ends with '-assistant'.",
        )
    text = dict(top.section("text_config").values)
    # All layers read the target's keys: the decoder's reader knows no such model.
    text["num_kv_shared_layers"] = 0
    target = MODEL_TYPES[raw["model_type"]]
    text["model_type"] = f"{target}_text"
    return top, parse_config({**raw, "model_type": target, "text_config": text}, where)


def _clusters(top: Fields) -> int:
    if not top.boolean("use_ordered_embeddings", False):
        return 0
    return top.integer("num_centroids", low=1, high=1 << 20)


def _expected(top: Fields, own: ModelConfig) -> dict[str, tuple[int, ...]]:
    """name in the file -> shape."""
    hidden = own.text.hidden_size
    backbone = top.integer("backbone_hidden_size", low=1, high=1 << 20)
    shapes = {
        f"{_MODEL}{name}": shape
        for name, shape in checkpoint.expected_text_tensors(own.text).items()
        if not any(f"self_attn.{part}" in name for part in ("k_proj", "v_proj", "k_norm"))
    }
    shapes["pre_projection.weight"] = (hidden, 2 * backbone)
    shapes["post_projection.weight"] = (backbone, hidden)
    if clusters := _clusters(top):
        shapes["masked_embedding.centroids.weight"] = (clusters, hidden)
        shapes[_ORDERING] = (own.text.vocab_size,)
    return shapes


def _check_tensors(
    folder: Path,
    found: Mapping[str, tuple[int, safetensors_header.TensorInfo]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    missing = [name for name in shapes if name not in found]
    if missing:
        raise ValueError(
            f"{folder}: the drafter lacks {len(missing)} tensors, such as {quoted(missing[0])}; "
            "download the checkpoint again"
        )
    for name, shape in shapes.items():
        info = found[name][1]
        if tuple(info.shape) != shape:
            raise ValueError(
                f"{folder}: {name} has shape {list(info.shape)}; expected {list(shape)}, as "
                "config.json says"
            )


def _ordering(
    files: list[Path],
    found: Mapping[str, tuple[int, safetensors_header.TensorInfo]],
    vocab_size: int,
) -> list[int]:
    file, info = found[_ORDERING]
    if info.dtype != "I64":
        raise ValueError(f"{files[file]}: {_ORDERING} is {info.dtype}; expected I64")
    with files[file].open("rb") as stream:
        stream.seek(info.begin)
        ids = np.frombuffer(stream.read(info.end - info.begin), "<i8")
    if len(ids) != vocab_size or not np.array_equal(np.sort(ids), np.arange(vocab_size)):
        raise ValueError(
            f"{files[file]}: {_ORDERING} is no order of the ids 0 to {vocab_size - 1}; download "
            "the checkpoint again"
        )
    return [int(token) for token in ids]
