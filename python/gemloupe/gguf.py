"""Reads a GGUF file of llama.cpp's architecture "gemma4" as a checkpoint.

The engine's parser checks the file's structure. Here its metadata become the config.json that the
model would have, every key that describes the architecture is held against what Gemma 4 is, and
llama.cpp's tensor names become the checkpoint's. Keys and conventions are those of llama.cpp's
converter (`conversion/gemma.py`) and loader (`src/models/gemma4.cpp`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gemloupe import _core
from gemloupe.checkpoint import (
    Checkpoint,
    StoredTensor,
    TextTensor,
    expected_text_tensors,
    same_bytes,
    unused_text_tensors,
)
from gemloupe.config import ModelConfig, TextConfig, parse_config
from gemloupe.errors import MAX_LISTED, bullet_list, did_you_mean, format_shape, one_of, quoted
from gemloupe.gguf_tokenizer import GgufTokenizer
from gemloupe.recipe import PLAIN
from gemloupe.safetensors_header import TensorInfo
from gemloupe.tokenizer import Tokenizer

ARCHITECTURE = "gemma4"

# Types that load; vectors are plain.
BLOCKED_TYPES = ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k")

# The checkpoint's names (without prefix) to llama.cpp's.
_TOP_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "norm.weight": "output_norm.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "layer_scalar": "layer_output_scale.weight",
}
_ROPE_FREQS = "rope_freqs.weight"
_HEAD = "output.weight"

# What every Gemma 4 does, where a file says it; anything else would be another model.
_FIXED_KEYS: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (1.0,),
    "attn_logit_softcapping": (0.0,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (1.0,),
    "hidden_activation": ("gelu", "gelu_pytorch_tanh"),
    "leading_dense_block_count": (0,),
    "logit_scale": (1.0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.finetuned": (False,),
    "rope.scaling.type": ("none",),
    "tensor_data_layout": ("reference",),
}
_WHOLE_KEYS = ("general.", "tokenizer.", "split.", "clip.")
_MAX_LAYERS = 1024
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_MAX_SHARDS = 1000
# rope_freqs divides the frequencies that do not turn by this or more.
_STILL = 1e20

_AGAIN = "Download the file again, or convert the original checkpoint with llama.cpp's converter."


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A checkpoint in one GGUF file or in several shards; `folder` is the (first) file."""

    header: _core.GgufFile | None = field(default=None, repr=False)
    """Of the first file: its metadata."""

    @property
    def is_gguf(self) -> bool:
        return True

    def new_tokenizer(self) -> Tokenizer:
        assert self.header is not None
        return GgufTokenizer(self.folder, self.header, self.config)


def gguf_name(name: str) -> str:
    """Returns llama.cpp's name: "layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight"."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, index, rest = name.split(".", 2)
    return f"blk.{index}.{_LAYER_NAMES[rest]}"


def open_gguf(source: str, path: Path) -> GgufCheckpoint:
    """Reads a GGUF file, or all shards of the set that it belongs to; no weight is read.

    Raises FileNotFoundError for a missing shard, and ValueError naming file, key or tensor, got
    and expected.
    """
    paths, headers = _read_shards(path)
    metadata = Metadata(paths[0], headers[0])
    tensors = all_tensors(paths, headers)
    config = _read_config(metadata, paths, tensors)
    expected = expected_text_tensors(config.text)
    _check_tensors(paths, config.text, expected, tensors)
    ignored = [name for name in tensors if name == _HEAD]
    names = {gguf_name(name) for name in unused_text_tensors(config.text)}
    ignored += [name for name in tensors if name in names]
    text_tensors = {}
    for name in expected:
        number, info = tensors[gguf_name(name)]
        text_tensors[name] = TextTensor(number, info.dtype, info.shape, info.begin, info.end)
    return GgufCheckpoint(
        source=source,
        folder=paths[0],
        config=config,
        generation_config=_generation_config(metadata, config),
        files=tuple(paths),
        prefix="",
        tensors=tensors,
        text_tensors=text_tensors,
        ignored=tuple(ignored),
        towers={},
        header=headers[0],
    )


def _read_shards(path: Path) -> tuple[list[Path], list[_core.GgufFile]]:
    header = _core.GgufFile(str(path))
    count = Metadata(path, header).integer("split.count", 1, high=_MAX_SHARDS)
    if count <= 1:
        return [path], [header]
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise ValueError(
            f"{path}: split.count is {count}; expected a name that ends in "
            f"-00001-of-{count:05d}.gguf, so that the other shards are found. Rename the files."
        )
    paths = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: {one_of(missing[:3])} missing beside it; expected all {count} shards in one "
            "folder. Download the rest."
        )
    headers = [header if p == path else _core.GgufFile(str(p)) for p in paths]
    for number, (shard, shard_header) in enumerate(zip(paths, headers, strict=True)):
        values = Metadata(shard, shard_header)
        if values.integer("split.count", high=_MAX_SHARDS) != count:
            values.refuse("split.count", str(count))
        if values.integer("split.no", low=0, high=_MAX_SHARDS) != number:
            values.refuse("split.no", f"{number}, as the file's name says")
    total = sum(len(h.tensors) for h in headers)
    first = Metadata(paths[0], headers[0])
    if first.integer("split.tensors.count", total, low=0, high=1 << 31) != total:
        first.refuse("split.tensors.count", f"{total}, as many as the shards have")
    return paths, headers


def all_tensors(paths: list[Path], headers: list[_core.GgufFile]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for number, header in enumerate(headers):
        for entry in header.tensors:
            if entry.name in tensors:
                raise ValueError(
                    f"{paths[number]}: tensor {quoted(entry.name)} is in "
                    f"{paths[tensors[entry.name].file].name} too; expected it once. {_AGAIN}"
                )
            shape = tuple(entry.shape)
            info = TensorInfo(entry.name, entry.dtype, shape, entry.begin, entry.end)
            tensors[entry.name] = StoredTensor(number, info)
    return tensors


class Metadata:
    """A file's keys, read one by one with checks. Architecture keys are given without "gemma4."."""

    def __init__(self, path: Path, header: _core.GgufFile) -> None:
        self.path = path
        self.header = header
        self.keys = frozenset(header.keys)
        self.read: set[str] = set()

    def full(self, key: str) -> str:
        return key if key.startswith(_WHOLE_KEYS) else f"{ARCHITECTURE}.{key}"

    def __contains__(self, key: str) -> bool:
        return self.full(key) in self.keys

    def refuse(self, key: str, expected: str, advice: str = _AGAIN) -> NoReturn:
        key = self.full(key)
        got = "missing"
        if key in self.keys:
            length = self.header.length(key)
            got = quoted(self.header.get(key)) if length is None else f"an array of {length}"
            if length is not None and length <= _MAX_LAYERS:
                got = quoted(self.header.get(key))
        raise ValueError(f"{self.path}: {key} is {got}; expected {expected}. {advice}")

    def value(self, key: str, expected: str, default: object = None) -> Any:
        """The scalar `key`; without a default it must be there."""
        self.read.add(self.full(key))
        if key not in self:
            if default is None:
                self.refuse(key, expected)
            return default
        if self.header.length(self.full(key)) is not None:
            self.refuse(key, expected)
        return self.header.get(self.full(key))

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        expected = f"an integer from {low} to {high}"
        value = self.value(key, expected, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(key, expected)
        return value

    def number(self, key: str, default: float | None = None, *, low: float, high: float) -> float:
        """A number in [low, high]. Files hold float32: the shortest decimal is what was meant."""
        expected = f"a number from {low:g} to {high:g}"
        value = self.value(key, expected, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(key, expected)
        if not (math.isfinite(value) and low <= value <= high):
            self.refuse(key, expected)
        return float(str(np.float32(value)))

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value(key, "a string", default)
        if not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def per_layer(self, key: str, layers: int, *, high: int) -> list[int]:
        """One integer for all layers, or one for each."""
        expected = f"an integer from 1 to {high}, or {layers} of them (block_count)"
        full = self.full(key)
        if full not in self.keys or self.header.length(full) is None:
            return [self.integer(key, high=high)] * layers
        self.read.add(full)
        values = self.array(key, layers, expected)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                self.refuse(key, expected)
        return values

    def array(self, key: str, length: int, expected: str) -> list[Any]:
        self.read.add(self.full(key))
        if key not in self or self.header.length(self.full(key)) != length:
            self.refuse(key, expected)
        return self.header.get(self.full(key))


_WIDTH, _VOCAB, _HEADS, _POSITIONS = 1 << 20, 1 << 26, 4096, 1 << 24


def _read_config(
    metadata: Metadata, paths: list[Path], tensors: Mapping[str, StoredTensor]
) -> ModelConfig:
    """Writes the config.json that the metadata stand for, and reads it."""
    _check_architecture(metadata)
    layers = metadata.integer("block_count", high=_MAX_LAYERS)
    types = _layer_types(metadata, layers)
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    sliding = [i for i, kind in enumerate(types) if kind != "full_attention"]
    num_shared = metadata.integer("attention.shared_kv_layers", 0, low=0, high=layers - 1)
    width = metadata.integer("embedding_length", high=_WIDTH)
    heads = _same(metadata, "attention.head_count", layers, high=_HEADS)
    kv_heads = metadata.per_layer("attention.head_count_kv", layers, high=_HEADS)
    for group in (full, sliding):
        if len({kv_heads[i] for i in group}) > 1:
            metadata.refuse("attention.head_count_kv", f"one number for the layers {group}")
    if any(heads % count for count in kv_heads):
        metadata.refuse("attention.head_count_kv", f"divisors of the {heads} heads")
    head_dims = [_head_dim(metadata, suffix) for suffix in ("", "_swa")]
    pairs = _rotary_pairs(metadata, paths, tensors, head_dims[0])
    per_layer = metadata.integer("embedding_length_per_layer_input", 0, low=0, high=_WIDTH)
    vocab = _rows(metadata, tensors, "embed_tokens.weight")
    if metadata.integer("vocab_size", vocab, high=_VOCAB) != vocab:
        metadata.refuse("vocab_size", f"{vocab}, the rows of token_embd.weight")
    if metadata.integer("embedding_length_out", width, high=_WIDTH) != width:
        metadata.refuse("embedding_length_out", f"{width}, the embedding_length")
    ffn_width, double_wide = _feed_forward(metadata, layers, num_shared)
    theta = {"low": 1e-3, "high": 1e15}
    raw: dict[str, Any] = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ffn_width,
        "use_double_wide_mlp": double_wide,
        "num_hidden_layers": layers,
        "layer_types": types,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads[sliding[0] if sliding else 0],
        "head_dim": head_dims[1],
        "per_layer_config": {
            str(i): {"head_dim": head_dims[0], "num_key_value_heads": kv_heads[i]} for i in full
        },
        "attention_k_eq_v": _values_are_keys(metadata, tensors, full, layers - num_shared),
        "num_kv_shared_layers": num_shared,
        "sliding_window": metadata.integer("attention.sliding_window", high=_POSITIONS),
        "max_position_embeddings": metadata.integer("context_length", high=_POSITIONS),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon", low=1e-20, high=0.1),
        # llama.cpp takes 30 where the key is missing, the reference no cap: refused as ambiguous.
        "final_logit_softcapping": metadata.number("final_logit_softcapping", low=0.0, high=1e6),
        "hidden_size_per_layer_input": per_layer,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.number("rope.freq_base_swa", **theta),
            },
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": metadata.number("rope.freq_base", **theta),
                "partial_rotary_factor": _fraction(pairs, head_dims[0]),
            },
        },
        # No key says it: the models without per-layer inputs see image blocks whole.
        "use_bidirectional_attention": None if per_layer else "vision",
        "tie_word_embeddings": True,
        **_experts(metadata, layers),
        **_token_ids(metadata, vocab),
    }
    raw["final_logit_softcapping"] = raw["final_logit_softcapping"] or None
    if per_layer:
        table = _rows(metadata, tensors, "embed_tokens_per_layer.weight")
        raw["vocab_size_per_layer_input"] = table
    _check_all_read(metadata)
    return parse_config(raw, str(metadata.path))


def _check_architecture(metadata: Metadata) -> None:
    name = metadata.text("general.architecture")
    if name == ARCHITECTURE:
        return
    advice = (
        "gemloupe runs the Gemma 4 family only; load a file that was converted from one of its "
        "checkpoints."
    )
    if name == "clip":
        advice = (
            "This file holds image and audio encoders: load the text model's file, and give this "
            "one as mmproj=."
        )
    elif "assistant" in name or "diffusion" in name:
        advice = "Drafters and diffusion models aren't run by this version."
    metadata.refuse("general.architecture", quoted(ARCHITECTURE), advice)


def _layer_types(metadata: Metadata, layers: int) -> list[str]:
    key = "attention.sliding_window_pattern"
    expected = f"{layers} booleans (block_count), true for a sliding layer, false for the last"
    pattern = metadata.array(key, layers, expected)
    if not all(isinstance(value, bool) for value in pattern) or pattern[-1]:
        metadata.refuse(key, expected)
    return ["sliding_attention" if value else "full_attention" for value in pattern]


def _same(metadata: Metadata, key: str, layers: int, *, high: int) -> int:
    values = metadata.per_layer(key, layers, high=high)
    if len(set(values)) > 1:
        metadata.refuse(key, "one number for all layers")
    return values[0]


def _head_dim(metadata: Metadata, suffix: str) -> int:
    """The head size of full ("") or sliding ("_swa") layers, which four keys give alike."""
    name = f"attention.key_length{suffix}"
    size = metadata.integer(name, low=2, high=8192)
    for other in (f"attention.value_length{suffix}", f"rope.dimension_count{suffix}"):
        if metadata.integer(other, size, high=8192) != size:
            metadata.refuse(other, f"{size}, as {metadata.full(name)}")
    return size


def _feed_forward(metadata: Metadata, layers: int, num_shared: int) -> tuple[int, bool]:
    """Returns (width, whether the layers that share keys and values are twice as wide)."""
    widths = metadata.per_layer("feed_forward_length", layers, high=_WIDTH)
    own = max(layers - num_shared, 1)
    if len(set(widths)) == 1:
        return widths[0], False
    if set(widths[:own]) == {widths[0]} and set(widths[own:]) == {2 * widths[0]}:
        return widths[0], True
    metadata.refuse(
        "feed_forward_length",
        f"one width for all layers, or twice as much in the last {num_shared} (shared_kv_layers)",
    )


def _rows(metadata: Metadata, tensors: Mapping[str, StoredTensor], name: str) -> int:
    stored = tensors.get(gguf_name(name))
    if stored is None or len(stored.info.shape) != 2:
        raise ValueError(
            f"{metadata.path}: the tensor {gguf_name(name)} is "
            f"{'missing' if stored is None else format_shape(stored.info.shape)}; expected a "
            f"matrix. {_AGAIN}"
        )
    return stored.info.shape[0]


def _values_are_keys(
    metadata: Metadata, tensors: Mapping[str, StoredTensor], full: list[int], own: int
) -> bool:
    """Whether the full layers that store keys have no value projection: llama.cpp looks, too."""
    storing = [i for i in full if i < own]
    without = [i for i in storing if f"blk.{i}.attn_v.weight" not in tensors]
    if without and without != storing:
        raise ValueError(
            f"{metadata.path}: the tensor blk.{without[0]}.attn_v.weight is missing, but "
            f"{len(storing) - len(without)} other full layers have theirs; expected all or none. "
            f"{_AGAIN}"
        )
    return bool(without)


def _experts(metadata: Metadata, layers: int) -> dict[str, Any]:
    count = metadata.integer("expert_count", 0, low=0, high=1 << 16)
    if count == 0:
        for key in ("expert_used_count", "expert_feed_forward_length"):
            if metadata.integer(key, 0, low=0, high=_WIDTH):
                metadata.refuse(key, "0, as expert_count")
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "num_experts": count,
        "top_k_experts": metadata.integer("expert_used_count", high=count),
        "moe_intermediate_size": _same(metadata, "expert_feed_forward_length", layers, high=_WIDTH),
    }


def _rotary_pairs(
    metadata: Metadata, paths: list[Path], tensors: Mapping[str, StoredTensor], head_dim: int
) -> int:
    """Reads from rope_freqs how many pairs of a full layer turn: divisors 1, then huge ones."""
    expected = f"float32 [{head_dim // 2}]: 1 for pairs that turn, then 1e30"
    stored = tensors.get(_ROPE_FREQS)
    got = "missing"
    if stored is not None:
        info = stored.info
        got = f"{info.dtype} {format_shape(info.shape)}"
        if info.dtype == "float32" and info.shape == (head_dim // 2,):
            divisors = np.fromfile(paths[stored.file], "<f4", head_dim // 2, offset=info.begin)
            pairs = int(np.argmin(np.append(divisors, 0) == 1))
            if np.all(divisors[pairs:] >= _STILL):
                return pairs
            got = f"{divisors[pairs]:g} at {pairs}"
    raise ValueError(
        f"{metadata.path}: tensor {_ROPE_FREQS} is {got}; expected {expected}. {_AGAIN}"
    )


def _fraction(pairs: int, head_dim: int) -> float:
    """The partial_rotary_factor of which config.py's rule makes `pairs` again."""
    fraction = 2 * pairs / head_dim
    while int(fraction * head_dim // 2) < pairs:
        fraction = math.nextafter(fraction, math.inf)
    return fraction


def _check_all_read(metadata: Metadata) -> None:
    """Refuses what the architecture's keys say beyond what has been read."""
    for key, allowed in _FIXED_KEYS.items():
        if key in metadata:
            value = metadata.value(key, one_of([str(a) for a in allowed]))
            # Python's True equals 1: a flag must be a flag.
            if not any(type(value) is type(a) and value == a for a in allowed):
                metadata.refuse(key, " or ".join(repr(a) for a in allowed))
    unknown = sorted(
        key for key in metadata.keys if key.startswith("gemma4.") and key not in metadata.read
    )
    if unknown:
        known = [*metadata.read, *(metadata.full(key) for key in _FIXED_KEYS)]
        key = unknown[0]
        got = (
            quoted(metadata.header.get(key)) if metadata.header.length(key) is None else "an array"
        )
        raise ValueError(
            f"{metadata.path}: the architecture key {quoted(key)} is {got}; expected only keys "
            f"that llama.cpp writes for Gemma 4. {did_you_mean(key, known)} {_AGAIN}".replace(
                "  ", " "
            )
        )


# ModelConfig's fields and the pieces whose ids they hold.
_MEDIA_PIECES = {
    "image_token_id": "<|image|>",
    "audio_token_id": "<|audio|>",
    "video_token_id": "<|video|>",
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "boa_token_id": "<|audio>",
    "eoa_token_id": "<audio|>",
}
# A chat model ends its turn, or a call that waits for the result; as Google's generation configs.
_END_PIECES = ("<turn|>", "<|tool_response>")
_TOKENS = "tokenizer.ggml.tokens"


def _token_ids(metadata: Metadata, vocab: int) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            value = metadata.integer(f"tokenizer.ggml.{key}_token_id", low=0, high=vocab - 1)
            ids[f"{name}_token_id"] = value
    ends = [
        metadata.integer(f"tokenizer.ggml.{key}_token_id", low=0, high=vocab - 1)
        for key in ("eos", "eot", "eom")
        if f"tokenizer.ggml.{key}_token_id" in metadata
    ]
    if _TOKENS in metadata:
        if metadata.header.length(_TOKENS) != vocab:
            metadata.refuse(_TOKENS, f"{vocab} strings, one for each row of token_embd.weight")
        pieces = [*_END_PIECES, *_MEDIA_PIECES.values()]
        found = metadata.header.indices(_TOKENS, pieces)
        if "tokenizer.chat_template" in metadata:
            ends += [index for index in found[: len(_END_PIECES)] if index is not None]
        ids |= dict(zip(_MEDIA_PIECES, found[len(_END_PIECES) :], strict=True))
    return {**ids, "eos_token_id": list(dict.fromkeys(ends))}


def _generation_config(metadata: Metadata, config: ModelConfig) -> dict[str, Any]:
    """What generation_config.json would say, as far as the file does."""
    result: dict[str, Any] = {}
    for name, key, high in (
        ("temperature", "temp", 1e6),
        ("top_p", "top_p", 1.0),
        ("min_p", "min_p", 1.0),
        ("repetition_penalty", "penalty_repeat", 1e6),
    ):
        if f"general.sampling.{key}" in metadata:
            result[name] = metadata.number(f"general.sampling.{key}", low=0.0, high=high)
    if "general.sampling.top_k" in metadata:
        result["top_k"] = metadata.integer("general.sampling.top_k", low=0, high=1 << 31)
    key = "tokenizer.ggml.suppress_tokens"
    if key in metadata:
        length = metadata.header.length(key)
        expected = "a list of token ids"
        if length is None or length > config.text.vocab_size:
            metadata.refuse(key, expected)
        ids = metadata.header.get(key)
        if not all(type(i) is int and 0 <= i < config.text.vocab_size for i in ids):
            metadata.refuse(key, expected)
        result["suppress_tokens"] = ids
    return result


def _check_tensors(
    paths: list[Path],
    config: TextConfig,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Every tensor must be one of the model's, of a type that loads and of its shape."""
    by_name = {gguf_name(name): shape for name, shape in expected.items()}
    unused = {gguf_name(name) for name in unused_text_tensors(config)} | {_ROPE_FREQS, _HEAD}
    problems = list(_problems(paths, by_name, unused, tensors))
    if problems:
        raise ValueError(
            f"{paths[0]}: the tensors don't match the metadata:\n{bullet_list(problems)}\n{_AGAIN}"
        )
    if _HEAD in tensors and not same_bytes(paths, tensors[_HEAD], tensors["token_embd.weight"]):
        raise ValueError(
            f"{paths[0]}: tensor {_HEAD} differs from token_embd.weight; expected a tied output "
            "matrix, as every Gemma 4 has. Convert the original checkpoint."
        )


def _problems(
    paths: list[Path],
    expected: Mapping[str, tuple[int, ...]],
    unused: set[str],
    tensors: Mapping[str, StoredTensor],
) -> Iterator[str]:
    hints = 0
    for name, (number, info) in tensors.items():
        where = f"{paths[number].name}: {quoted(name)}"
        if name in unused:
            continue
        if name not in expected:
            # Only texts that are shown get a hint: a hostile file may have 100,000 names.
            hints += 1
            hint = did_you_mean(name, expected) if hints < MAX_LISTED else ""
            yield f"{where} is no tensor of this model. {hint}".rstrip()
        elif info.shape != expected[name]:
            yield (
                f"{where}: shape is {format_shape(info.shape)}; expected "
                f"{format_shape(expected[name])}"
            )
        else:
            loads = PLAIN if len(info.shape) == 1 else (*PLAIN, *BLOCKED_TYPES)
            if info.dtype not in loads:
                yield f"{where}: type is {info.dtype}; expected {one_of(loads)}"
    for name, shape in expected.items():
        if name not in tensors:
            yield f"{name} is missing; expected {format_shape(shape)}"
