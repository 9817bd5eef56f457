"""Finds a checkpoint and reads everything about it but the weights.

`open_checkpoint` resolves a source to a folder, reads its JSON files, and checks names, shapes and
types of the text model's tensors against the config. The engine then maps the files by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gemloupe import compressed_tensors, hub, packed, recipe, safetensors_header, strict_json
from gemloupe.config import ModelConfig, TextConfig, read_config
from gemloupe.errors import (
    MAX_LISTED,
    bullet_list,
    close_matches,
    did_you_mean,
    format_shape,
    one_of,
    quoted,
)
from gemloupe.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from gemloupe.tokenizer import Tokenizer

DEMO_NAMES = ("edge", "moe", "dense")
DEMO_FOLDER = Path(__file__).parent / "demo"

# Where the text decoder's tensors stand: multimodal, text-only, an older spelling, bare modules.
_PREFIXES = ("model.language_model.", "model.", "language_model.model.", "language_model.", "")
_TOWERS = (
    "vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder",
    "audio_embedder", "multi_modal_projector",
)  # fmt: skip
_TOWER_NAME = re.compile(rf"(?:model\.)?({'|'.join(_TOWERS)})\.")
_HEAD_NAME = re.compile(r"(?:model\.|language_model\.)*lm_head\.weight")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "W4A16": "w4a16"}
_NARROW_DTYPES = (*recipe.BITS, "W4A16")  # Of packed files and compressed-tensors: matrices only.

_SUFFIXES = (".gguf", ".safetensors", ".json", ".bin", ".pt", ".pth", ".zip")


class StoredTensor(NamedTuple):
    """Where a tensor lies: `files[file]`, bytes [info.begin, info.end)."""

    file: int
    info: TensorInfo


class TextTensor(NamedTuple):
    """A tensor of the text decoder as the engine takes it."""

    file: int
    dtype: str
    """"float32", "bfloat16" or "float16"; of GGUF files also "q4_0" and its like."""
    shape: tuple[int, ...]
    begin: int
    end: int
    pair: compressed_tensors.Pair | None = None
    """Of a "w4a16" matrix; begin and end are those of its integers."""

    @property
    def nbytes(self) -> int:
        scale = self.pair.scale[1] if self.pair else None
        return self.end - self.begin + (scale.end - scale.begin if scale else 0)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, shapes and types have been checked; no weight has been read."""

    source: str
    folder: Path
    config: ModelConfig
    generation_config: dict[str, Any]
    files: tuple[Path, ...]
    prefix: str
    """What stands before the text decoder's names in the files."""
    tensors: dict[str, StoredTensor] = field(repr=False)
    """Every tensor of the files by its full name, the unread ones included."""
    text_tensors: dict[str, TextTensor] = field(repr=False)
    """What the text decoder needs, by names without the prefix, in the order of the config."""
    ignored: tuple[str, ...] = field(repr=False)
    """Full names of tensors that no part reads: a tied head, keys and values of sharing layers."""
    towers: dict[str, tuple[str, ...]] = field(repr=False)
    """Full names of vision and audio tensors, by the module that holds them."""
    provenance: packed.Provenance | None = None
    """Of a packed checkpoint."""
    mmproj: Path | None = None
    """The file that the towers of a GGUF checkpoint are in."""
    restore: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(
        default_factory=dict, repr=False
    )
    """Of tower tensors that an mmproj file holds changed: their values from what is stored."""

    @property
    def dtype(self) -> str:
        """The type that most of the text decoder's bytes have, or what it was packed as."""
        if self.provenance is not None:
            return self.provenance.dtype
        sizes: dict[str, int] = {}
        for name, tensor in self.text_tensors.items():
            if name == recipe.TABLE:  # Larger than all else, and hardly read.
                continue
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda name: sizes[name])

    @property
    def is_gguf(self) -> bool:
        """Whether llama.cpp's file holds it; its conventions differ in the embedding's scale."""
        return self.folder.is_file()

    def new_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; nothing is read before it is used."""
        from gemloupe.tokenizer import Tokenizer

        return Tokenizer(self.folder, self.config)


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    folder: Path | None = None,
    mmproj: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Reads the checkpoint that `source` names: a folder, a GGUF file, a hub id, or "demo:edge".

    `folder` skips the search and is read as it is. `mmproj`: llama.cpp's file of the towers of a
    GGUF file's model, "auto" for the one beside it. Raises FileNotFoundError (with close matches),
    ConnectionError (hub out of reach), and ValueError naming file, field or tensor, got and
    expected.
    """
    folder = resolve(source) if folder is None else folder
    if folder.is_file():
        from gemloupe import gguf
        from gemloupe import mmproj as _mmproj

        return _mmproj.attach(gguf.open_gguf(os.fspath(source), folder), mmproj)
    if mmproj not in (None, "auto"):
        raise ValueError(
            f"mmproj is {quoted(os.fspath(mmproj))}, but {folder} is a folder, which holds its own "
            "towers; expected a GGUF file as the model. Leave out mmproj."
        )
    config = read_folder_config(folder)
    if packed.is_packed(folder):
        infos, provenance = packed.read(folder)
        tensors = {name: StoredTensor(0, info) for name, info in infos.items()}
        files = [folder / packed.FILE_NAME]
        opened = _checked(os.fspath(source), folder, config, files, tensors, {})
        return replace(opened, provenance=provenance)
    files, found = safetensors_header.read_folder(folder)
    pairs: dict[str, compressed_tensors.Pair] = {}
    if config.raw.get("quantization_config") is not None:
        found, pairs = compressed_tensors.pair_tensors(files, found)
    tensors = {name: StoredTensor(*place) for name, place in found.items()}
    return _checked(os.fspath(source), folder, config, files, tensors, pairs)


def resolve(source: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """Returns the folder or GGUF file that `source` names; a hub id's is downloaded.

    With `weights=False` only config.json is downloaded.
    """
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(
            f"source is {quoted(source)}; expected a checkpoint folder, a hub id such as "
            "'google/gemma-4-E2B-it', or \"demo:edge\". Give one of these."
        )
    if text.startswith("demo:"):
        return _demo_folder(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if _is_gguf(path):
        return path
    if path.exists():
        raise ValueError(
            f"{text}: this is a file; expected a checkpoint folder or a GGUF file. Give the folder "
            f"that holds it: {quoted(str(path.parent))}."
        )
    if text.lower().endswith(".gguf"):
        raise _no_such_file(text, path)
    if isinstance(source, str) and hub.is_id(text) and not _is_path_like(text):
        return hub.download(text) if weights else hub.download_config(text)
    raise _no_such_folder(text, path)


def _is_gguf(path: Path) -> bool:
    """True for a file that is called .gguf, or that begins as such files do."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _no_such_file(text: str, path: Path) -> FileNotFoundError:
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    except OSError:
        siblings = []
    matches = [str(Path(text).parent / name) for name in close_matches(path.name, siblings)]
    advice = f"Did you mean {one_of(matches)}?" if matches else "Check the path."
    return FileNotFoundError(f"{text}: no such file; expected a GGUF file. {advice}")


def _demo_folder(text: str) -> Path:
    name = text.removeprefix("demo:")
    if name not in DEMO_NAMES:
        raise ValueError(
            f"source is {quoted(text)}; expected {one_of([f'demo:{n}' for n in DEMO_NAMES])}. "
            "Give one of these names."
        )
    folder = DEMO_FOLDER / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: the demo model is not in this installation. Install gemloupe again, or "
            "load another checkpoint."
        )
    return folder


def _is_path_like(text: str) -> bool:
    """True where "a/b" rather means a folder: folder "a" exists, or it ends like a file's name."""
    if hub.released(text) is not None:
        return False
    return Path(text).parent.is_dir() or text.lower().endswith(_SUFFIXES)


def _no_such_folder(text: str, path: Path) -> FileNotFoundError:
    parent = path.parent
    try:
        siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        siblings = []
    matches = [str(Path(text).parent / name) for name in close_matches(path.name, siblings)]
    if matches:
        advice = f"Did you mean {one_of(matches)}?"
    elif not parent.is_dir():
        advice = f"The folder {quoted(str(parent))} doesn't exist either: check the path."
    else:
        advice = (
            "Check the path, or give a hub id of the form 'owner/name', such as "
            "'google/gemma-4-E2B-it'."
        )
    if hub.is_id(text) and parent.is_dir():
        advice += f" For a model of the hub, run where no folder {quoted(str(parent))} is."
    return FileNotFoundError(f"{text}: no such folder; expected a checkpoint. {advice}")


def read_folder_config(folder: Path) -> ModelConfig:
    """Reads a folder's config.json; FileNotFoundError saying what to give instead without one."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder}: this is an adapter; expected a checkpoint with config.json. Load the "
                "model that it was trained on."
            )
        inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        inside += sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"Did you mean {one_of([str(folder / name) for name in inside[:3]])}?"
        raise FileNotFoundError(
            f"{path}: no such file; expected a checkpoint folder. "
            + (hint if inside else "Give the folder that holds config.json and the weights.")
        )
    return read_config(path)


# The one table of the text decoder's tensor names in Python; csrc/models has the engine's.
def expected_text_tensors(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor that the text decoder needs, without prefix."""
    hidden, per_layer = config.hidden_size, config.hidden_size_per_layer_input
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, hidden)}
    if per_layer:
        packed = config.num_hidden_layers * per_layer
        shapes["embed_tokens_per_layer.weight"] = (config.vocab_size_per_layer_input, packed)
        shapes["per_layer_model_projection.weight"] = (packed, hidden)
        shapes["per_layer_projection_norm.weight"] = (per_layer,)
    for index in range(config.num_hidden_layers):
        for name, shape in _layer_tensors(config, index):
            shapes[f"layers.{index}.{name}"] = shape
    shapes["norm.weight"] = (hidden,)
    return shapes


def _layer_tensors(config: TextConfig, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    layer = config.layers[index]
    hidden, per_layer = config.hidden_size, config.hidden_size_per_layer_input
    q_width = config.num_attention_heads * layer.head_dim
    kv_width = layer.num_kv_heads * layer.head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "self_attn.q_proj.weight", (q_width, hidden)
    yield "self_attn.q_norm.weight", (layer.head_dim,)
    if layer.kv_source == index:
        yield "self_attn.k_proj.weight", (kv_width, hidden)
        yield "self_attn.k_norm.weight", (layer.head_dim,)
        if not layer.values_are_keys:
            yield "self_attn.v_proj.weight", (kv_width, hidden)
    yield "self_attn.o_proj.weight", (hidden, q_width)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "pre_feedforward_layernorm.weight", (hidden,)
    yield "mlp.gate_proj.weight", (layer.intermediate_size, hidden)
    yield "mlp.up_proj.weight", (layer.intermediate_size, hidden)
    yield "mlp.down_proj.weight", (hidden, layer.intermediate_size)
    if layer.has_experts:
        experts, width = config.num_experts, config.moe_intermediate_size
        yield "post_feedforward_layernorm_1.weight", (hidden,)
        yield "router.scale", (hidden,)
        yield "router.proj.weight", (experts, hidden)
        yield "router.per_expert_scale", (experts,)
        yield "pre_feedforward_layernorm_2.weight", (hidden,)
        yield "experts.gate_up_proj", (experts, 2 * width, hidden)
        yield "experts.down_proj", (experts, hidden, width)
        yield "post_feedforward_layernorm_2.weight", (hidden,)
    yield "post_feedforward_layernorm.weight", (hidden,)
    if per_layer:
        yield "per_layer_input_gate.weight", (per_layer, hidden)
        yield "per_layer_projection.weight", (hidden, per_layer)
        yield "post_per_layer_input_norm.weight", (hidden,)
    yield "layer_scalar", (1,)


def tower_of(full_name: str) -> str | None:
    """The vision or audio module that a full name belongs to; None for the text decoder's."""
    match = _TOWER_NAME.match(full_name)
    return match[1] if match else None


def unused_text_tensors(config: TextConfig) -> set[str]:
    """Returns names that published files hold and no model reads: sharing layers' keys, values."""
    return {
        f"layers.{index}.self_attn.{name}.weight"
        for index, layer in enumerate(config.layers)
        if layer.kv_source != index
        for name in ("k_proj", "v_proj", "k_norm")
    }


def _checked(
    source: str,
    folder: Path,
    config: ModelConfig,
    files: list[Path],
    tensors: dict[str, StoredTensor],
    pairs: dict[str, compressed_tensors.Pair],
) -> Checkpoint:
    """Assigns every tensor of the files to a part of the model; ValueError where one is wrong."""
    prefix = _text_prefix(folder, tensors)
    expected = expected_text_tensors(config.text)
    unused = unused_text_tensors(config.text)
    found: dict[str, TextTensor] = {}
    towers: dict[str, list[str]] = {}
    ignored: list[str] = []
    problems: list[str] = []
    for full_name, (number, info) in tensors.items():
        name = full_name.removeprefix(prefix) if full_name.startswith(prefix) else ""
        tower = tower_of(full_name)
        if name in expected:
            problem = _tensor_problem(info, expected[name])
            if problem:
                problems.append(f"{files[number].name}: {full_name}: {problem}")
            else:
                dtype = _DTYPES.get(info.dtype, info.dtype)
                pair = pairs.get(full_name)
                found[name] = TextTensor(number, dtype, info.shape, info.begin, info.end, pair)
        elif name in unused:
            ignored.append(full_name)
        elif tower:
            towers.setdefault(tower, []).append(full_name)
        elif _HEAD_NAME.fullmatch(full_name):
            ignored.append(full_name)
        else:
            # Only texts that are shown get a hint: a hostile file may have 100,000 names.
            hint = did_you_mean(name, expected) if len(problems) < MAX_LISTED else ""
            text = f"{files[number].name}: {quoted(full_name)} is no tensor of this model. {hint}"
            problems.append(text.rstrip())
    present = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    problems += [
        f"{prefix}{name} is missing; expected {format_shape(shape)}"
        for name, shape in expected.items()
        if name not in present
    ]
    if problems:
        raise ValueError(
            f"{folder}: the tensors don't match config.json:\n{bullet_list(problems)}\n"
            "Download the checkpoint again, or give the config.json that belongs to it."
        )
    for full_name in ignored:
        if _HEAD_NAME.fullmatch(full_name):
            _check_tied(files, tensors, full_name, f"{prefix}embed_tokens.weight")
    return Checkpoint(
        source=source,
        folder=folder,
        config=config,
        generation_config=_read_generation_config(folder),
        files=tuple(files),
        prefix=prefix,
        tensors=tensors,
        text_tensors={name: found[name] for name in expected},
        ignored=tuple(ignored),
        towers={tower: tuple(names) for tower, names in towers.items()},
    )


def _text_prefix(folder: Path, tensors: dict[str, StoredTensor]) -> str:
    prefixes = [p for p in _PREFIXES if f"{p}embed_tokens.weight" in tensors]
    if len(prefixes) == 1:
        return prefixes[0]
    if prefixes:
        raise ValueError(
            f"{folder}: there are several text models, under {one_of(prefixes)}; expected one. "
            "Save the model that you mean alone."
        )
    names = sorted(tensors)
    raise ValueError(
        f"{folder}: {_PREFIXES[0]}embed_tokens.weight and {_PREFIXES[1]}embed_tokens.weight are "
        f"missing among {len(names)} tensors, the first of which is "
        f"{quoted(names[0]) if names else 'none'}. Load a checkpoint of a whole Gemma 4 model."
    )


def _tensor_problem(info: TensorInfo, shape: tuple[int, ...]) -> str:
    if info.shape != shape:
        return f"shape is {format_shape(info.shape)}; expected {format_shape(shape)}"
    if info.dtype in _NARROW_DTYPES and (len(shape) > 1 or info.dtype in recipe.PLAIN):
        return ""
    if info.dtype not in _DTYPES or info.dtype == "W4A16":
        return f"dtype is {info.dtype}; expected {one_of(['F32', 'BF16', 'F16'])}"
    return ""


def _check_tied(
    files: list[Path], tensors: dict[str, StoredTensor], head_name: str, embed_name: str
) -> None:
    """A stored output matrix that differs from the embedding would be used by transformers."""
    head = tensors[head_name]
    if not same_bytes(files, head, tensors[embed_name]):
        raise ValueError(
            f"{files[head.file]}: tensor {quoted(head_name)} differs from {quoted(embed_name)}; "
            "expected a tied output matrix. Checkpoints with an output matrix of their own can't "
            "be loaded by this version; load the original checkpoint."
        )


def same_bytes(files: list[Path], a: StoredTensor, b: StoredTensor) -> bool:
    """True where two tensors have one type, one shape and the same bytes."""
    if a.info.shape != b.info.shape or a.info.dtype != b.info.dtype:
        return False
    step = 64 << 20
    first, second = _bytes_of(files, a), _bytes_of(files, b)
    return all(
        np.array_equal(first[i : i + step], second[i : i + step])
        for i in range(0, len(first), step)
    )


def _bytes_of(files: list[Path], tensor: StoredTensor) -> np.ndarray:
    begin, end = tensor.info.begin, tensor.info.end
    return np.memmap(files[tensor.file], np.uint8, mode="r", offset=begin, shape=(end - begin,))


_GENERATION_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "do_sample": ((bool,), "true or false"),
    "temperature": ((int, float), "a number"),
    "top_p": ((int, float), "a number"),
    "min_p": ((int, float), "a number"),
    "top_k": ((int,), "an integer"),
    "repetition_penalty": ((int, float), "a number"),
    "bos_token_id": ((int,), "a token id"),
    "pad_token_id": ((int,), "a token id"),
    "eos_token_id": ((int, list), "a token id or a list of token ids"),
    "suppress_tokens": ((list,), "a list of token ids"),
}


def _read_generation_config(folder: Path) -> dict[str, Any]:
    """Reads generation_config.json, {} where there is none; checks the fields that are used."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    values = strict_json.read_object(path)
    for name, (types, expected) in _GENERATION_FIELDS.items():
        value = values.get(name)
        is_right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if isinstance(value, list):
            is_right = is_right and all(type(token) is int and token >= 0 for token in value)
        if value is not None and not is_right:
            raise ValueError(
                f"{path}: {name} is {quoted(value)}; expected {expected}. Correct the field, or "
                "delete the file to use the defaults."
            )
    return values
