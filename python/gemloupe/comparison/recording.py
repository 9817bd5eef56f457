"""A reference in a file: recorded where transformers runs, compared where gemloupe runs.

A safetensors file. `__metadata__["gemloupe.reference"]` is a JSON object: version, label (what ran
in which dtype), dtype, embed_scale, shape (sizes of the model), prompts (a list of ids each).
Tensors are "{prompt}/{hook point}" in the dtype in which they were computed and, for a reference
that is not float32, "{prompt}/float32/{hook point}": the same weights computed in float32, with the
same experts ("{prompt}/float32-routed/logits": with float32's own).
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemloupe import safetensors_header, strict_json
from gemloupe.comparison import transformers_capture as hf
from gemloupe.comparison.engines import PLAIN, Engine
from gemloupe.comparison.sides import SHAPE_FIELDS, Experts, TransformersSide, Values
from gemloupe.comparison.tensors import Tensors
from gemloupe.errors import format_bytes, one_of, quoted
from gemloupe.prompt import Prompt, is_batch
from gemloupe.safetensors_header import TensorInfo

# float32 with the experts that float32 chooses.
_FREE = "float32-routed/"
_KEY = "gemloupe.reference"
_VERSION = 1
_MAX_TOKENS = 1 << 24
_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
}
_AGAIN = "Record the reference again with gl.record_reference."


def record_reference(
    hf_model: Any,
    inputs: Any,
    path: str | os.PathLike[str],
    *,
    points: str | Iterable[str] = "*",
) -> Path:
    """Runs a transformers Gemma 4 model and writes every hook point to a file for `gl.compare`.

    `hf_model`: a loaded model, text-only or multimodal, float32 or bfloat16; it is as it was when
    the call returns. `inputs`: ids, a list of these, or what `model.prepare` of gemloupe returned;
    a str is encoded with the tokenizer of the folder that the model was loaded from. `points`:
    names or patterns to keep ("layers.*.resid_post"); all together take about 10 KB for each
    hidden_size, layer and token. Without a point's inputs, `compare` can't tell noise from a bug
    there. For a bfloat16 model the same weights computed in float32 are recorded too.

    Returns the path. Raises ImportError without torch and transformers, ValueError for another
    kind of model or for ids outside its vocabulary.
    """
    hf.import_torch("gl.record_reference")
    from safetensors.torch import save_file

    side = TransformersSide(hf_model)
    prompts = _prompts(hf_model, inputs, side.shape["vocab_size"])
    patterns = [points] if isinstance(points, str) else list(points)
    tensors: dict[str, Any] = {}
    for number, ids in enumerate(prompts):
        runs = [("", False)]
        if side.engine.dtype not in ("float32", "float64"):
            runs.append(("float32/", True))
        experts: Experts | None = None
        for prefix, float32 in runs:
            found = hf.record(hf_model, ids, experts=experts, float32=float32)
            # The float32 run takes the same experts: rounding is compared, not routing.
            experts = {
                int(name.split(".")[1]): tensor.numpy()
                for name, tensor in found.items()
                if name.endswith(".router.experts")
            }
            kept = {n: t for n, t in found.items() if any(fnmatch.fnmatch(n, p) for p in patterns)}
            if not kept:
                raise KeyError(f"points {quoted(points)} match no hook point of this model")
            tensors |= {f"{number}/{prefix}{name}": tensor for name, tensor in kept.items()}
        if experts and len(runs) > 1 and f"{number}/logits" in tensors:
            free = hf.record(hf_model, ids, ["logits"], float32=True)
            tensors[f"{number}/{_FREE}logits"] = free["logits"]
    metadata = {
        "version": _VERSION,
        "label": side.engine.label,
        "dtype": side.engine.dtype,
        "embed_scale": side.embed_scale,
        "shape": side.shape,
        "prompts": [{"ids": [int(index) for index in ids]} for ids in prompts],
    }
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        save_file(tensors, unfinished, {_KEY: json.dumps(metadata)})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _prompts(model: Any, inputs: Any, vocab_size: int) -> list[list[int]]:
    rows = list(inputs) if is_batch(inputs) else [inputs]
    prompts = []
    for row in rows:
        if isinstance(row, Prompt):
            if row.media:
                raise ValueError(
                    "inputs has a prompt with media, which are not recorded; pass text, or compare "
                    "with the model itself"
                )
            ids = row.ids
        elif isinstance(row, str):
            ids = np.asarray(_encode(model, row))
        else:
            ids = np.asarray(row)
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise ValueError(
                f"inputs has {quoted(row)}; expected ids (a list or 1-D array of integers), a str, "
                "a Prompt, or a list of these"
            )
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"inputs has ids from {ids.min()} to {ids.max()}; expected 0 to {vocab_size - 1}"
            )
        prompts.append([int(index) for index in ids])
    return prompts


def _encode(model: Any, text: str) -> list[int]:
    from gemloupe.tokenizer import Tokenizer

    folder = Path(getattr(model, "name_or_path", "") or ".")
    tokenizer = Tokenizer(folder)
    if not tokenizer.exists:
        raise ValueError(
            f"inputs has the text {quoted(text)}, but the model was not loaded from a folder with "
            "tokenizer.json; pass ids, or what model.prepare(text) of gemloupe returns"
        )
    return tokenizer.encode(text)


class RecordedSide:
    """A file that `record_reference` wrote. Tensors are read when they are compared."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        infos = safetensors_header.read_header(self._path)
        data = self._metadata()
        self.prompts = [self._ids(row) for row in self._list(data, "prompts")]
        self.shape = self._shape(data)
        self.embed_scale = self._choice(data, "embed_scale", PLAIN)
        dtype = self._choice(data, "dtype", (*PLAIN, "float64"))
        label = data.get("label")
        if not isinstance(label, str) or len(label) > 500:
            self._refuse("label", label, "a text of at most 500 characters")
        self.engine = Engine(label=f"{label}, recorded in {self._path.name}", dtype=dtype)
        self._places = {info.name: self._checked(info) for info in infos}

    tensors: Tensors | None = None

    @property
    def can_force_experts(self) -> bool:
        return False

    def values(
        self, prompt: Prompt, names: Collection[str], experts: Experts | None = None
    ) -> Values:
        return self._read(prompt, names, "")

    def float32_values(
        self, prompt: Prompt, names: Collection[str], experts: Experts | None = None
    ) -> Values | None:
        if self.engine.dtype in ("float32", "float64"):
            return None
        return self._read(prompt, names, "float32/")

    def float32_logits(self, prompt: Prompt) -> np.ndarray | None:
        prefix = _FREE if self.shape["num_experts"] else "float32/"
        return self._read(prompt, ["logits"], prefix).get("logits")

    def _read(self, prompt: Prompt, names: Collection[str], prefix: str) -> Values:
        number = self._number(prompt)
        found = {}
        for name in names:
            place = self._places.get(f"{number}/{prefix}{name}")
            if place is not None:
                found[name] = self._array(place)
        return found

    def media_rows(self, prompt: Prompt, config: Any) -> None:
        return None

    def tower_values(
        self, prompt: Prompt, source: Any, points: Sequence[Any], float32: bool = False
    ) -> Values | None:
        return {}

    def _number(self, prompt: Prompt) -> int:
        if prompt.media:
            raise ValueError(
                f"{self._path}: a recorded reference holds text alone, but the prompt has media; "
                "pass the transformers model or its folder"
            )
        wanted = prompt.ids.tolist()
        for number, recorded in enumerate(self.prompts):
            if recorded == wanted:
                return number
        raise ValueError(
            f"{self._path}: the prompt of {len(wanted)} ids that begins with {wanted[:6]} was not "
            f"recorded; the file has {len(self.prompts)} prompts: leave inputs out to use them"
        )

    def _array(self, info: TensorInfo) -> np.ndarray:
        kind = _DTYPES[info.dtype]
        with self._path.open("rb") as file:
            file.seek(info.begin)
            raw = np.fromfile(file, kind, info.elements)
        if raw.size != info.elements:
            raise ValueError(f"{self._path}: the file ends inside {quoted(info.name)}. {_AGAIN}")
        if info.dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        elif info.dtype == "F16":
            raw = raw.astype(np.float32)
        array: np.ndarray = raw.reshape(info.shape)
        if array.dtype.kind == "i":
            experts = self.shape["num_experts"]
            if array.size and (array.min() < 0 or array.max() >= experts):
                raise ValueError(
                    f"{self._path}: {quoted(info.name)} has experts from {array.min()} to "
                    f"{array.max()}; expected 0 to {experts - 1}. {_AGAIN}"
                )
        return array

    def _metadata(self) -> dict[str, Any]:
        with self._path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = strict_json.parse_object(file.read(length), f"{self._path}, header")
        text = header.get("__metadata__", {}).get(_KEY)
        if text is None:
            raise ValueError(
                f"{self._path}: this safetensors file is no recorded reference: its metadata lacks "
                f"{_KEY!r}. Make one with gl.record_reference."
            )
        data = strict_json.parse_object(text.encode(), f"{self._path}, {_KEY}")
        if data.get("version") != _VERSION:
            self._refuse("version", data.get("version"), f"{_VERSION}")
        return data

    def _refuse(self, field: str, got: Any, expected: str) -> None:
        raise ValueError(f"{self._path}: {field} is {quoted(got)}; expected {expected}. {_AGAIN}")

    def _list(self, data: dict[str, Any], field: str) -> list[Any]:
        value = data.get(field)
        if not isinstance(value, list) or not value:
            self._refuse(field, value, "a list that is not empty")
        return list(value or ())

    def _ids(self, row: Any) -> list[int]:
        ids = row.get("ids") if isinstance(row, dict) else None
        good = isinstance(ids, list) and 0 < len(ids) <= _MAX_TOKENS
        if not good or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids or ()):
            self._refuse("prompts", row, 'objects with "ids", a list of integers')
        return list(ids or ())

    def _shape(self, data: dict[str, Any]) -> dict[str, int]:
        shape = data.get("shape")
        good = isinstance(shape, dict) and set(shape) == set(SHAPE_FIELDS)
        if not good or not all(isinstance(v, int) and 0 <= v < 2**32 for v in shape.values()):  # type: ignore[union-attr]
            self._refuse("shape", shape, f"counts for {one_of(SHAPE_FIELDS)}")
        return dict(shape or {})

    def _choice(self, data: dict[str, Any], field: str, choices: Sequence[str]) -> str:
        value = data.get(field)
        if value not in choices:
            self._refuse(field, value, one_of(choices))
        return str(value)

    def _checked(self, info: TensorInfo) -> TensorInfo:
        number, slash, name = info.name.partition("/")
        if not slash or not number.isdecimal() or int(number) >= len(self.prompts):
            self._refuse("a tensor's name", info.name, '"{number of a prompt}/{hook point}"')
        if info.dtype not in _DTYPES:
            self._refuse(f"the dtype of {info.name}", info.dtype, one_of(list(_DTYPES)))
        is_index = name.endswith("router.experts")
        if is_index != info.dtype.startswith("I"):
            self._refuse(f"the dtype of {info.name}", info.dtype, "integers for experts alone")
        return info

    def __repr__(self) -> str:
        size = format_bytes(self._path.stat().st_size)
        return f"RecordedSide({str(self._path)!r}, {len(self.prompts)} prompts, {size})"
