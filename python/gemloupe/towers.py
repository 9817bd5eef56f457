"""The vision and audio parts of a checkpoint: their tensors, and their sizes from a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core
from gemloupe.errors import one_of, quoted

if TYPE_CHECKING:
    from gemloupe.checkpoint import Checkpoint
    from gemloupe.safetensors_header import TensorInfo

# The modules whose tensors make a part.
VISION = ("vision_tower", "vision_embedder", "embed_vision")
AUDIO = ("audio_tower", "embed_audio")
# As safetensors and packed files call them.
ENGINE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ENGINE_DTYPES |= {name: name for name in ENGINE_DTYPES.values()}

# Buffers, which transformers doesn't count as parameters.
BUFFER_NAMES = ("_min", "_max", ".std_bias", ".std_scale", "layer_scalar")


def has_vision(checkpoint: Checkpoint) -> bool:
    """Whether the files hold what reads images, and config.json describes it."""
    return "embed_vision" in checkpoint.towers and bool(checkpoint.config.raw.get("vision_config"))


def has_audio(checkpoint: Checkpoint) -> bool:
    """Whether the files hold what reads sounds, and config.json describes it."""
    return "embed_audio" in checkpoint.towers and bool(checkpoint.config.raw.get("audio_config"))


def weights(checkpoint: Checkpoint, modules: Sequence[str]) -> _core.Weights:
    """The tensors of these modules for the engine, as they are stored, without "model.".

    Matrices that an mmproj file holds quantised are widened to float32. ValueError for a type that
    the engine does not read.
    """
    loaded = _core.Weights()
    files: dict[int, list[_core.TensorEntry]] = {}
    widened = []
    for name in (name for module in modules for name in checkpoint.towers.get(module, ())):
        stored = checkpoint.tensors[name]
        short = name.removeprefix("model.")
        if name in checkpoint.restore:
            loaded.add_values(short, restored(checkpoint, name))
            continue
        dtype = ENGINE_DTYPES.get(stored.info.dtype, stored.info.dtype)  # Packed files have ours.
        if dtype not in ENGINE_DTYPES.values():
            if checkpoint.mmproj is None:
                raise ValueError(
                    f"{checkpoint.files[stored.file].name}: {quoted(name)} has the type "
                    f"{stored.info.dtype}; expected F32, BF16 or F16"
                )
            widened.append(short)
        shape = list(stored.info.shape)
        entry = _core.TensorEntry(short, dtype, shape, stored.info.begin, stored.info.end)
        files.setdefault(stored.file, []).append(entry)
    for file, entries in files.items():
        loaded.add_file(str(checkpoint.files[file]), entries)
    for short in widened:
        loaded.set_target(short, "float32")
    return loaded


def restored(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor that an mmproj file holds changed (`checkpoint.restore`), float32."""
    stored = checkpoint.tensors[name]
    return checkpoint.restore[name](_read_plain(checkpoint.files[stored.file], stored.info))


def _read_plain(path: Path, info: TensorInfo) -> np.ndarray:
    """All values of a tensor of a plain type, float32 [elements]."""
    kind = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[info.dtype]
    values = np.fromfile(path, kind, info.elements, offset=info.begin)
    if info.dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def lacks(checkpoint: Checkpoint, what: str, models: str) -> ValueError:
    """The error of a model that lacks its "vision" or "audio" part; `models` are those with one."""
    text = f"{quoted(checkpoint.source)} has no {what} part; expected {models}: "
    if not checkpoint.is_gguf:
        return ValueError(f"{text}load the folder or hub id of the whole model")
    if checkpoint.mmproj is not None:
        return ValueError(f"{text}{checkpoint.mmproj.name} holds none")
    found = [path.name for path in mmproj_files(checkpoint.folder)]
    near = f", such as {one_of(found[:3])} beside it" if found else ""
    return ValueError(f"{text}pass mmproj=, the file of the model's towers{near}")


def mmproj_files(model: Path) -> list[Path]:
    """The files beside a GGUF file that are called mmproj-*.gguf."""
    return sorted(
        path
        for path in model.parent.iterdir()
        if path.name.lower().startswith("mmproj") and path.suffix.lower() == ".gguf"
        if path.is_file() and path != model
    )


def tower_parameters(raw: Mapping[str, Any]) -> dict[str, int]:
    """Returns module -> parameters from a config.json; {} for a text-only one.

    Fields that the file lacks have the values of transformers' config classes. Unusable fields
    make a tower be left out: loading the text decoder doesn't depend on them.
    """
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        return {}
    unified = str(raw.get("model_type", "")).startswith("gemma4_unified")
    vision = _unified_vision if unified else _vision
    audio = _unified_audio if unified else _audio
    counts: dict[str, int] = {}
    for part, count in (("vision_config", vision), ("audio_config", audio)):
        section = raw.get(part)
        if isinstance(section, Mapping):
            try:
                counts |= count(section, int(text["hidden_size"]))
            except (KeyError, TypeError, ValueError):
                continue
    return counts


def _vision(config: Mapping[str, Any], text_width: int) -> dict[str, int]:
    width = int(config.get("hidden_size", 768))
    inner = int(config.get("intermediate_size", 3072))
    head = int(config.get("head_dim", 64))
    query = int(config.get("num_attention_heads", 12)) * head
    key = int(config.get("num_key_value_heads", 12)) * head
    layer = 2 * width * query + 2 * width * key + 3 * width * inner  # Seven matrices.
    layer += 4 * width + 2 * head  # Norms.
    tower = int(config.get("num_hidden_layers", 16)) * layer
    tower += 3 * int(config.get("patch_size", 16)) ** 2 * width
    tower += 2 * int(config.get("position_embedding_size", 10_240)) * width
    return {"vision_tower": tower, "embed_vision": width * text_width}


def _audio(config: Mapping[str, Any], text_width: int) -> dict[str, int]:
    width = int(config.get("hidden_size", 1024))
    out = int(config.get("output_proj_dims", 1536))
    first, second = (int(n) for n in config.get("subsampling_conv_channels", (128, 32)))
    head = width // int(config.get("num_attention_heads", 8))
    # Per layer: two feed-forward blocks, attention with its positions, convolution, norms.
    layer = 2 * (8 * width * width + 2 * width)
    layer += 5 * width * width + head
    layer += 3 * width * width + int(config.get("conv_kernel_size", 5)) * width + 2 * width
    layer += 3 * width
    tower = int(config.get("num_hidden_layers", 12)) * layer
    tower += 9 * first + first + 9 * first * second + second
    tower += first // 4 * second * width
    tower += width * out + out
    return {"audio_tower": tower, "embed_audio": out * text_width}


def _unified_vision(config: Mapping[str, Any], text_width: int) -> dict[str, int]:
    width = int(config.get("mm_embed_dim", 3840))
    pixels = int(config.get("patch_size", 16)) * int(config.get("pooling_kernel_size", 3))
    patch = 3 * pixels**2
    positions = int(config.get("mm_posemb_size", 1120))
    embedder = 2 * patch + patch * width + width + 2 * width + 2 * width * positions + 2 * width
    out = int(config.get("output_proj_dims", 3840))
    return {"vision_embedder": embedder, "embed_vision": out * text_width}


def _unified_audio(config: Mapping[str, Any], text_width: int) -> dict[str, int]:
    return {"embed_audio": int(config.get("audio_embed_dim", 640)) * text_width}
