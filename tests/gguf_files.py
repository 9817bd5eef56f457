"""GGUF files of tiny checkpoints, written with the `gguf` package as llama.cpp's converter does.

Names come from the package's own table, metadata from the rules of llama.cpp's
`conversion/gemma.py`: nothing here is gemloupe's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

K_TYPES = (Type.Q4_K, Type.Q5_K, Type.Q6_K)
TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q8_0, *K_TYPES)

# Rows of whole blocks of 32 and, but for the per-layer matrices, of 256; the rest is as odd as it
# may be. llama.cpp loads these sizes, too.
SIZES: dict[str, dict[str, Any]] = {
    "e2b": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "head_dim": 64,
        "global_head_dim": 128,
        "hidden_size_per_layer_input": 32,
    },
    "e4b": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "global_head_dim": 192,
        "hidden_size_per_layer_input": 96,
    },
    "12b": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 128,
    },
    "26b": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 128,
        "moe_intermediate_size": 256,
    },
    "31b": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 64,
    },
}
TypeOf = Callable[[str, np.ndarray], Type]


def all_of(wanted: Type) -> TypeOf:
    """Matrices in `wanted`, or in Q8_0 where its blocks don't fit; what llama.cpp keeps is kept."""

    def type_of(name: str, values: np.ndarray) -> Type:
        if values.ndim == 1 or "ffn_gate_inp" in name or "per_layer_model_proj" in name:
            return Type.F32
        fits = values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        return wanted if fits else Type.Q8_0

    return type_of


def as_llama_quantize(name: str, values: np.ndarray) -> Type:
    """The types of `llama-quantize Q4_0`: both embeddings Q6_K where their rows allow it."""
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return all_of(Type.Q6_K)(name, values)
    if name == "per_layer_model_proj.weight":
        return Type.BF16
    return all_of(Type.Q4_0)(name, values)


def write_gguf(
    path: Path,
    folder: Path,
    type_of: TypeOf = as_llama_quantize,
    *,
    tokenizer: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    shards: int = 1,
) -> dict[str, np.ndarray]:
    """Converts a checkpoint folder; returns the values that the file holds, by full HF names.

    `metadata` and `tensors` (llama.cpp's names) replace what the converter would write; None
    leaves it out. `shards` > 1 writes `path` with llama.cpp's suffixes.
    """
    text = json.loads((folder / "config.json").read_text())
    text = _released(text.get("text_config", text))
    writer = _Writer(path, shards, sum(1 for _ in _stored(folder)))
    for key, value in {**config_metadata(text), **(metadata or {})}.items():
        writer.put(key, value)
    if tokenizer is not None:
        add_tokenizer(writer.writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, text["num_hidden_layers"])
    replaced = dict(tensors or {})
    held = {}
    random = np.random.default_rng(5)
    for full_name, values in _stored(folder):
        name = gguf_name(names, full_name)
        if name in replaced:
            continue
        data, held[full_name] = encode(values, type_of(name, values), random)
        writer.add(name, data, type_of(name, values))
    if "rope_freqs.weight" not in replaced:
        replaced["rope_freqs.weight"] = rope_freqs(text)
    for name, values in replaced.items():
        if values is not None:
            writer.add(name, np.ascontiguousarray(values), None)
    writer.close()
    return held


def _released(text: dict[str, Any]) -> dict[str, Any]:
    """The released spelling, of a config that transformers 5.23 wrote."""
    if "per_layer_config" not in text:
        return text
    full = next(iter(text["per_layer_config"].values()), {})
    heads = text["num_key_value_heads"]
    return {
        **text,
        "global_head_dim": full.get("head_dim", text["head_dim"]),
        "num_global_key_value_heads": full.get("num_key_value_heads", heads),
    }


def _stored(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tower = any(part in name for part in ("vision", "audio"))
            if not tower and ("language_model" in name or name.startswith("model.")):
                yield name, tensor.float().numpy()


def gguf_name(names: gguf.TensorNameMap, full_name: str) -> str:
    """llama.cpp's name; the converter renames these before it asks the table."""
    name = full_name.replace("language_model.", "")
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if name.endswith("router.scale"):
        return f"blk.{layer[1]}.ffn_gate_inp.scale"
    if name.endswith("router.per_expert_scale"):
        return f"blk.{layer[1]}.ffn_down_exps.scale"
    if not name.endswith(".weight"):
        name += ".weight"
    found = names.get_name(name, try_suffixes=(".weight",))
    assert found is not None, name
    return found


def encode(
    values: np.ndarray, kind: Type, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the stored bytes and the float32 values that they stand for.

    The package can't quantise to K types: blocks of these are random, with scales like `values`'.
    """
    if kind in K_TYPES:
        data = random_blocks(values.shape, kind, float(values.std()), random)
    else:
        data = gguf.quantize(np.ascontiguousarray(values, np.float32), kind)
    return data, gguf.dequantize(data, kind)


# Block bytes, where the float16 scale is, and the spread of what it multiplies.
_K_BLOCKS = {
    Type.Q4_K: (144, 0, 4.6 * 36),
    Type.Q5_K: (176, 0, 9.2 * 36),
    Type.Q6_K: (210, 208, 1370),
}
_MIDDLE = {Type.Q4_K: 7.5, Type.Q5_K: 15.5}


def random_blocks(
    shape: tuple[int, ...], kind: Type, spread: float, random: np.random.Generator
) -> np.ndarray:
    """Random K blocks of values around 0 with about the standard deviation `spread`."""
    size, place, unit = _K_BLOCKS[kind]
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // 256, size), dtype=np.uint8)
    scales = random.uniform(0.5, 1.5, blocks.shape[:-1]) * spread / unit
    blocks[..., place : place + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    if kind in _MIDDLE:
        # Minima that are the middle of the integers: their 6-bit parts equal those of the scales.
        minima = (scales * _MIDDLE[kind]).astype("<f2")
        blocks[..., 2:4] = minima[..., None].view(np.uint8)
        blocks[..., 8:12] = blocks[..., 4:8]
        blocks[..., 12:16] = (blocks[..., 12:16] & 15) * 17
    return blocks.reshape(*shape[:-1], -1)


def rope_freqs(text: Mapping[str, Any]) -> np.ndarray:
    head_dim = text.get("global_head_dim", 512)
    fraction = text["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    turning = int(head_dim * fraction / 2)
    values = [1.0] * turning + [1e30] * (head_dim // 2 - turning)
    return np.array(values, np.float32)


def config_metadata(text: Mapping[str, Any]) -> dict[str, Any]:
    """What the converter writes of a text config in the released spelling."""
    rope = text["rope_parameters"]
    layers, shared = text["num_hidden_layers"], text.get("num_kv_shared_layers") or 0
    sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    width, heads = text["intermediate_size"], text["num_key_value_heads"]
    full_heads = text.get("num_global_key_value_heads")
    full_dim, dim = text.get("global_head_dim", 512), text["head_dim"]
    result: dict[str, Any] = {
        "general.type": "model",
        "general.quantization_version": np.uint32(2),
        "block_count": layers,
        "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"],
        "feed_forward_length": width,
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": heads,
        "rope.freq_base": rope["full_attention"]["rope_theta"],
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        "attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "attention.key_length": full_dim,
        "attention.value_length": full_dim,
        "final_logit_softcapping": text["final_logit_softcapping"],
        "attention.sliding_window": text["sliding_window"],
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": text.get("hidden_size_per_layer_input") or 0,
        "attention.sliding_window_pattern": sliding,
        "attention.key_length_swa": dim,
        "attention.value_length_swa": dim,
        "rope.dimension_count": full_dim,
        "rope.dimension_count_swa": dim,
    }
    if text.get("enable_moe_block"):
        result["expert_count"] = text["num_experts"]
        result["expert_used_count"] = text["top_k_experts"]
        result["expert_feed_forward_length"] = text["moe_intermediate_size"]
    if text.get("use_double_wide_mlp"):
        own = layers - shared
        result["feed_forward_length"] = [width * (1 if i < own else 2) for i in range(layers)]
    if full_heads is not None:
        result["attention.head_count_kv"] = [heads if s else full_heads for s in sliding]
    return result


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    """As the converter's set_vocab."""
    vocab = gguf.LlamaHfVocab(folder)
    shown = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"}
    shown |= {"<|tool_response>", "<tool_response|>", '<|"|>'}
    tokens, scores, types = [], [], []
    for text, score, kind in vocab.all_tokens():
        tokens.append(text)
        scores.append(score)
        types.append(gguf.TokenType.USER_DEFINED if text.decode() in shown else kind)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)


class _Writer:
    """A GGUFWriter that takes plain values, and full or architecture keys."""

    def __init__(self, path: Path, shards: int, tensors: int) -> None:
        limit = 0 if shards == 1 else -(-(tensors + 1) // shards)
        self.writer = gguf.GGUFWriter(path, "gemma4", split_max_tensors=limit)

    def put(self, key: str, value: Any) -> None:
        if value is None:
            return
        if not key.startswith(("general.", "tokenizer.", "split.")):
            key = f"gemma4.{key}"
        if isinstance(value, bool):
            self.writer.add_bool(key, value)
        elif isinstance(value, str):
            self.writer.add_string(key, value)
        elif isinstance(value, (list, tuple)):
            self.writer.add_array(key, value)
        elif isinstance(value, float):
            self.writer.add_float32(key, value)
        else:
            self.writer.add_uint32(key, int(value))

    def add(self, name: str, data: np.ndarray, kind: Type | None) -> None:
        self.writer.add_tensor(name, data, raw_dtype=kind)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
