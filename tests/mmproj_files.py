"""Files of towers (mmproj) of tiny checkpoints, written as llama.cpp's converter does.

Names come from the `gguf` package's own table, but for the encoder-free model, which its version
0.19 does not know; metadata and changes follow `conversion/base.py` and `conversion/gemma.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

_SUFFIXES = (".weight", ".bias", ".input_max", ".input_min", ".output_max", ".output_min")
# What conversion/gemma.py of later versions calls the tensors of Gemma4Unified.
_UNIFIED_NAMES = {
    "model.vision_embedder.patch_dense.weight": "v.patch_embd.weight",
    "model.vision_embedder.patch_dense.bias": "v.patch_embd.bias",
    "model.vision_embedder.patch_ln1.weight": "v.patch_norm.1.weight",
    "model.vision_embedder.patch_ln1.bias": "v.patch_norm.1.bias",
    "model.vision_embedder.patch_ln2.weight": "v.patch_norm.2.weight",
    "model.vision_embedder.patch_ln2.bias": "v.patch_norm.2.bias",
    "model.vision_embedder.pos_norm.weight": "v.patch_norm.3.weight",
    "model.vision_embedder.pos_norm.bias": "v.patch_norm.3.bias",
    "model.vision_embedder.pos_embedding": "v.position_embd.weight",
}


def write_mmproj(
    path: Path,
    folder: Path,
    wanted: Type = Type.F32,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    types: Mapping[str, Type] | None = None,
) -> dict[str, np.ndarray]:
    """Writes the towers of a checkpoint folder; returns the values held, by full HF names.

    `metadata` and `tensors` (llama.cpp's names) replace what the converter would write; None
    leaves it out. `types`: of single tensors.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "clip")
    for key, value in {**_metadata(config), **(metadata or {})}.items():
        _put(writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 128)
    held, replaced = {}, dict(tensors or {})
    for file in sorted(folder.glob("*.safetensors")):
        for full_name, tensor in load_file(file).items():
            if "language_model" in full_name or not full_name.startswith("model."):
                continue
            values = tensor.float().numpy()
            name, stored = _converted(names, config, full_name, values)
            if name in replaced:
                continue
            kind = (types or {}).get(name) or _type_of(full_name, name, stored, wanted)
            data = gguf.quantize(np.ascontiguousarray(stored, np.float32), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            back = gguf.dequantize(data, kind).reshape(stored.shape)
            held[full_name] = _converted_back(config, full_name, back, values)
    for name, values in replaced.items():
        if values is not None:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _type_of(full_name: str, name: str, values: np.ndarray, wanted: Type) -> Type:
    """The converter's tensor_force_quant, and float32 for vectors."""
    audio = "audio_tower" in full_name or "embed_audio" in full_name
    if values.ndim == 1 or "position" in full_name or "pos_embedding" in full_name:
        return Type.F32
    if audio and (".conv" in full_name or "_conv" in full_name):
        return Type.F32
    if "patch_embd" in name:
        return Type.F16 if wanted is Type.F16 else Type.F32
    return wanted


def _converted(
    names: gguf.TensorNameMap, config: dict[str, Any], full_name: str, values: np.ndarray
) -> tuple[str, np.ndarray]:
    if values.ndim == 0:
        values = values[None]
    name = full_name
    if full_name in _UNIFIED_NAMES:
        side = config["vision_config"]["patch_size"] * 3
        if full_name.endswith("pos_embedding"):
            values = values.transpose(1, 0, 2)
        elif "patch_dense.weight" in full_name or "patch_ln1" in full_name:
            values = values[..., _channels_first(side)]
        return _UNIFIED_NAMES[full_name], values
    if "audio_tower" in name or "embed_audio" in name:
        name = name.replace("model.audio_tower.", "conformer.").replace(".linear.", ".")
        if name.endswith("per_dim_scale"):
            name += ".weight"
            values = np.logaddexp(0, values)  # softplus
        if "depthwise_conv1d" in name:
            values = values.reshape(len(values), -1)
    else:
        name = name.replace("model.vision_tower.encoder.", "vision_model.model.")
        name = name.replace(".linear.weight", ".weight")
        if name.endswith("position_embedding_table"):
            name += ".weight"
        if name.endswith("patch_embedder.input_proj.weight"):
            side = config["vision_config"]["patch_size"]
            values = values.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
    found = names.get_name(name, try_suffixes=_SUFFIXES)
    assert found is not None, name
    return found, values


def _converted_back(
    config: dict[str, Any], full_name: str, stored: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """What the file's values mean in the checkpoint."""
    if full_name.endswith("per_dim_scale"):
        return values  # Always float32.
    if full_name.endswith("pos_embedding"):
        return stored.transpose(1, 0, 2)
    if full_name.endswith("patch_embedder.input_proj.weight"):
        return stored.transpose(0, 2, 3, 1).reshape(values.shape)
    if "patch_dense.weight" in full_name or "patch_ln1" in full_name:
        back = np.empty_like(stored)
        back[..., _channels_first(config["vision_config"]["patch_size"] * 3)] = stored
        return back
    return stored.reshape(values.shape)


def _channels_first(side: int) -> np.ndarray:
    """For place i of (channel, row, column), the place in (row, column, channel)."""
    i = np.arange(3 * side * side)
    return i % (side * side) // side * side * 3 + i % side * 3 + i // (side * side)


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What MmprojModel.set_gguf_parameters and its subclasses write."""
    unified = config["model_type"] == "gemma4_unified"
    vision, audio = config.get("vision_config"), config.get("audio_config")
    width = config["text_config"]["hidden_size"]
    result: dict[str, Any] = {"general.type": "mmproj"}
    if vision:
        key = "clip.vision."
        hidden = vision["mm_embed_dim"] if unified else vision["hidden_size"]
        result |= {
            "clip.has_vision_encoder": True,
            f"{key}projector_type": "gemma4uv" if unified else "gemma4v",
            f"{key}projection_dim": width,
            f"{key}image_size": 224,
            f"{key}patch_size": vision["patch_size"],
            f"{key}embedding_length": hidden,
            f"{key}feed_forward_length": 0 if unified else vision["intermediate_size"],
            f"{key}block_count": 0 if unified else vision["num_hidden_layers"],
            f"{key}attention.head_count": 0 if unified else vision["num_attention_heads"],
            f"{key}attention.layer_norm_epsilon": 1e-6,
            f"{key}image_mean": [0.0, 0.0, 0.0],
            f"{key}image_std": [1.0, 1.0, 1.0],
        }
    if audio:
        key = "clip.audio."
        hidden = audio["audio_embed_dim"] if unified else audio["hidden_size"]
        result |= {
            "clip.has_audio_encoder": True,
            f"{key}projector_type": "gemma4ua" if unified else "gemma4a",
            f"{key}projection_dim": width,
            f"{key}embedding_length": hidden,
            f"{key}feed_forward_length": 0 if unified else 4 * hidden,
            f"{key}block_count": 0 if unified else audio["num_hidden_layers"],
            f"{key}attention.head_count": 0 if unified else audio["num_attention_heads"],
            f"{key}num_mel_bins": 128,
            f"{key}attention.layer_norm_epsilon": 1e-6,
        }
    return result


def _put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_uint32(key, value)
