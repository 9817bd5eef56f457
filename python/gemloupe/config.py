"""Reads a checkpoint's config.json into the figures that the engine is built from.

`TextConfig` and `LayerConfig` have the same fields as the C++ structs of these names. What differs
between the models of the family is data in `LayerConfig`; nothing later asks for a model's name.
The rules follow the configuration classes of transformers 5.23 (`models/gemma4*`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from gemloupe import compressed_tensors, strict_json
from gemloupe.errors import did_you_mean, one_of, quoted, sentences

_MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
_TEXT_MODEL_TYPE = {"gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
_LAYER_KINDS = {"full_attention": "full", "sliding_attention": "sliding"}

# Above these a file is broken or hostile; the largest released values are far below.
_MAX_LAYERS = 1024
_MAX_WIDTH = 1 << 20
_MAX_VOCAB = 1 << 26
_MAX_HEADS = 4096
_MAX_HEAD_DIM = 8192
_MAX_EXPERTS = 1 << 16
_MAX_POSITIONS = 1 << 24  # float32, in which angles are computed, counts exactly up to here.

_FIX = "Correct the field, or download the checkpoint again."
_OTHER_MODEL = (
    "gemloupe runs the Gemma 4 family only; load for example 'google/gemma-4-E2B-it', "
    'or "demo:edge", which needs no download.'
)


@dataclass(frozen=True)
class LayerConfig:
    """What one decoder layer is made of."""

    kind: str
    """"full" or "sliding" attention."""
    window: int
    """How many positions a query sees, its own included; 0 for full attention."""
    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    """Width of the dense feed-forward block."""
    kv_source: int
    """Index of the layer whose keys and values this one reads: its own unless it shares."""
    values_are_keys: bool
    """Values come from the key projection; there is no value projection."""
    has_experts: bool
    rope_theta: float
    rotary_pairs: int
    """How many of the head_dim / 2 pairs (j, j + head_dim / 2) rotate, from j = 0."""
    rope_factor: float
    """Frequencies are divided by this."""


@dataclass(frozen=True)
class TextConfig:
    """The text decoder."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rms_norm_eps: float
    max_position_embeddings: int
    final_logit_softcapping: float
    """logits = c tanh(logits / c); 0.0 where there is no cap."""
    hidden_size_per_layer_input: int
    """0 where the model has no per-layer embeddings."""
    vocab_size_per_layer_input: int
    num_experts: int
    """0 where the model has no experts; so the next two."""
    top_k_experts: int
    moe_intermediate_size: int
    sliding_window: int
    bidirectional: str
    """"none", "vision" (image blocks see themselves whole) or "all"."""
    layers: tuple[LayerConfig, ...]


@dataclass(frozen=True)
class ModelConfig:
    """A checkpoint's config.json. Token ids are as in the file, None or () where it has none."""

    model_type: str
    architecture: str
    """First entry of `architectures`; "" where the file has none."""
    text: TextConfig
    dtype: str | None
    """What the file calls the stored type; the tensors' own types decide."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    image_token_id: int | None
    video_token_id: int | None
    audio_token_id: int | None
    boi_token_id: int | None
    eoi_token_id: int | None
    boa_token_id: int | None
    eoa_token_id: int | None
    raw: dict[str, Any] = field(repr=False)


def read_config(path: Path) -> ModelConfig:
    """Reads a config.json; ValueError naming file, field, got and expected if it is unusable."""
    return parse_config(strict_json.read_object(path), str(path))


def parse_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Checks a parsed config.json; `where` begins every error text.

    Both on-disk styles are accepted: the published one (`global_head_dim`,
    `num_global_key_value_heads`) and that of transformers 5.23 (`per_layer_config`).
    """
    top = Fields(where, raw)
    model_type = _model_type(top)
    _refuse_quantised(top)
    nested = model_type in _TEXT_MODEL_TYPE
    text = top.section("text_config") if nested else top
    if nested:
        _refuse_quantised(text)
        expected = _TEXT_MODEL_TYPE[model_type]
        if text.values.get("model_type", expected) != expected:
            text.refuse("model_type", quoted(expected))
    if not top.boolean("tie_word_embeddings", True):
        top.refuse(
            "tie_word_embeddings",
            "true: the output matrix of Gemma 4 is its embedding",
            "Checkpoints with an output matrix of their own can't be loaded by this version; "
            "load the original checkpoint.",
        )
    architectures = top.values.get("architectures")
    if architectures is None:
        architectures = []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        top.refuse("architectures", "a list of class names")
    dtype = top.text("dtype") or top.text("torch_dtype") or text.text("dtype")
    return ModelConfig(
        model_type=model_type,
        architecture=architectures[0] if architectures else "",
        text=_text_config(text, unified=model_type.startswith("gemma4_unified")),
        dtype=dtype or text.text("torch_dtype"),
        bos_token_id=_first_id(top, text, "bos_token_id"),
        eos_token_ids=top.token_ids("eos_token_id") or text.token_ids("eos_token_id"),
        pad_token_id=_first_id(top, text, "pad_token_id"),
        image_token_id=top.token_id("image_token_id"),
        video_token_id=top.token_id("video_token_id"),
        audio_token_id=top.token_id("audio_token_id"),
        boi_token_id=top.token_id("boi_token_id"),
        eoi_token_id=top.token_id("eoi_token_id"),
        boa_token_id=top.token_id("boa_token_id"),
        # Published files have both spellings, transformers only the second.
        eoa_token_id=_first_of(top.token_id("eoa_token_id"), top.token_id("eoa_token_index")),
        raw=raw,
    )


_MISSING = object()


class Fields:
    """One JSON object of a config, read field by field with checks."""

    def __init__(self, where: str, values: Mapping[str, Any], path: str = "") -> None:
        self.where = where
        self.values = values
        self.path = path

    def refuse(self, name: str, expected: str, advice: str = _FIX) -> NoReturn:
        got = _json_text(self.values[name]) if name in self.values else "missing"
        raise ValueError(f"{self.where}: {self.path}{name} is {got}; expected {expected}. {advice}")

    def section(self, name: str) -> Fields:
        value = self.values.get(name)
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return Fields(self.where, value, f"{self.path}{name}.")

    def integer(self, name: str, default: object = _MISSING, *, low: int = 1, high: int) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: object = _MISSING, *, low: float, high: float) -> float:
        """Reads a number in the open interval (low, high)."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(name, "a number")
        if not (math.isfinite(value) and low < value < high):
            self.refuse(name, f"a number between {low:g} and {high:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def token_id(self, name: str) -> int | None:
        return None if self.values.get(name) is None else self.integer(name, low=0, high=_MAX_VOCAB)

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if (
                isinstance(token, bool)
                or not isinstance(token, int)
                or not 0 <= token <= _MAX_VOCAB
            ):
                self.refuse(name, "a token id or a list of token ids")
        return tuple(ids)


def _json_text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return quoted(value)


def _first_of(first: int | None, second: int | None) -> int | None:
    return second if first is None else first


def _first_id(top: Fields, text: Fields, name: str) -> int | None:
    return _first_of(top.token_id(name), text.token_id(name))


def _model_type(top: Fields) -> str:
    model_type = top.values.get("model_type")
    if isinstance(model_type, str) and model_type in _MODEL_TYPES:
        return model_type
    advice = _OTHER_MODEL
    if isinstance(model_type, str):
        if "assistant" in model_type:
            advice = (
                "This is a drafter, which can't run alone and isn't used by this version; "
                "load the model that it drafts for."
            )
        elif "diffusion" in model_type:
            advice = (
                "Diffusion models aren't run by this version; load 'google/gemma-4-26B-A4B-it'."
            )
        elif model_type.startswith(("gemma2", "gemma3")):
            family = "Gemma 3n" if model_type.startswith("gemma3n") else f"Gemma {model_type[5]}"
            advice = f"This is a {family} checkpoint. {_OTHER_MODEL}"
        else:
            advice = sentences(did_you_mean(model_type, _MODEL_TYPES), _OTHER_MODEL)
    top.refuse("model_type", one_of(_MODEL_TYPES), advice)


def _refuse_quantised(fields: Fields) -> None:
    """Lets only formats pass that `compressed_tensors` reads, at the top of the file."""
    for name in ("quantization_config", "compression_config"):
        value = fields.values.get(name)
        if value is not None:
            compressed_tensors.check(value, f"{fields.where}: {fields.path}{name}")
            if fields.path or name != "quantization_config":
                fields.refuse(name, "none here, but quantization_config at the top of the file")


def _text_config(text: Fields, *, unified: bool) -> TextConfig:
    """`unified`: the defaults of Gemma 4 Unified, which has no per-layer input and no experts."""
    activation = text.values.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        text.refuse("hidden_activation", "'gelu_pytorch_tanh'")
    if text.boolean("attention_bias", False):
        text.refuse("attention_bias", "false")
    hidden_size = text.integer("hidden_size", 2304, high=_MAX_WIDTH)
    num_layers = text.integer("num_hidden_layers", 30, high=_MAX_LAYERS)
    num_heads = text.integer("num_attention_heads", 8, high=_MAX_HEADS)

    per_layer_input = 0
    vocab_per_layer_input = 0
    if not unified and text.values.get("hidden_size_per_layer_input", 256) is not None:
        per_layer_input = text.integer("hidden_size_per_layer_input", 256, low=0, high=_MAX_WIDTH)
    if per_layer_input:
        vocab_per_layer_input = text.integer("vocab_size_per_layer_input", 262_144, high=_MAX_VOCAB)
        vocab_size = text.integer("vocab_size", 262_144, high=_MAX_VOCAB)
        if vocab_per_layer_input < vocab_size:
            text.refuse("vocab_size_per_layer_input", f"at least vocab_size, {vocab_size}")

    num_experts = top_k = expert_width = 0
    if not unified and text.boolean("enable_moe_block", False):
        num_experts = text.integer("num_experts", high=_MAX_EXPERTS)
        top_k = text.integer("top_k_experts", high=num_experts)
        expert_width = text.integer("moe_intermediate_size", high=_MAX_WIDTH)

    softcap = 0.0
    if text.values.get("final_logit_softcapping") is not None:
        softcap = text.number("final_logit_softcapping", low=0.0, high=1e6)

    bidirectional = text.values.get("use_bidirectional_attention", "vision" if unified else None)
    if bidirectional not in (None, "vision", "all"):
        text.refuse("use_bidirectional_attention", "null, 'vision' or 'all'")
    window = text.integer("sliding_window", 1024 if unified else 512, high=_MAX_POSITIONS)
    if bidirectional == "all":
        window = window // 2 + 1  # transformers' rule: the largest distance to either side.

    return TextConfig(
        vocab_size=text.integer("vocab_size", 262_144, high=_MAX_VOCAB),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        rms_norm_eps=text.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        max_position_embeddings=text.integer(
            "max_position_embeddings", 262_144 if unified else 131_072, high=_MAX_POSITIONS
        ),
        final_logit_softcapping=softcap,
        hidden_size_per_layer_input=per_layer_input,
        vocab_size_per_layer_input=vocab_per_layer_input,
        num_experts=num_experts,
        top_k_experts=top_k,
        moe_intermediate_size=expert_width,
        sliding_window=window,
        bidirectional=bidirectional or "none",
        layers=_layers(text, num_layers, num_heads, window, has_experts=num_experts > 0),
    )


def _layers(
    text: Fields, num_layers: int, num_heads: int, window: int, *, has_experts: bool
) -> tuple[LayerConfig, ...]:
    types = _layer_types(text, num_layers)
    sizes = _head_sizes(text, types, num_heads)
    sources = _kv_sources(text, types)
    ropes = {kind: _rope(text, kind, sizes[types.index(kind)][0]) for kind in sorted(set(types))}
    width = text.integer("intermediate_size", 9216, high=_MAX_WIDTH)
    double_wide = text.boolean("use_double_wide_mlp", False)
    keys_are_values = text.boolean("attention_k_eq_v", False)
    layers = []
    for index, layer_type in enumerate(types):
        is_full = layer_type == "full_attention"
        theta, pairs, factor = ropes[layer_type]
        shares = sources[index] != index
        layers.append(
            LayerConfig(
                kind=_LAYER_KINDS[layer_type],
                window=0 if is_full else window,
                head_dim=sizes[index][0],
                num_kv_heads=sizes[index][1],
                intermediate_size=width * (2 if double_wide and shares else 1),
                kv_source=sources[index],
                values_are_keys=keys_are_values and is_full,
                has_experts=has_experts,
                rope_theta=theta,
                rotary_pairs=pairs,
                rope_factor=factor,
            )
        )
    return tuple(layers)


def _layer_types(text: Fields, num_layers: int) -> list[str]:
    types = text.values.get("layer_types")
    if types is None:
        types = [
            "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(num_layers)
        ]
    if not isinstance(types, list):
        text.refuse("layer_types", f"a list of {num_layers} strings")
    if len(types) != num_layers:
        raise ValueError(
            f"{text.where}: {text.path}layer_types has {len(types)} entries; expected {num_layers} "
            f"(num_hidden_layers). {_FIX}"
        )
    for index, layer_type in enumerate(types):
        if not isinstance(layer_type, str) or layer_type not in _LAYER_KINDS:
            raise ValueError(
                f"{text.where}: {text.path}layer_types[{index}] is {quoted(layer_type)}; expected "
                f"{one_of(list(_LAYER_KINDS))}. {_FIX}"
            )
    if types[-1] != "full_attention":
        warnings.warn(
            f"{text.where}: the last layer is {types[-1]!r}; it is run with full attention, as "
            "transformers does",
            stacklevel=2,
        )
        types = [*types[:-1], "full_attention"]
    return cast("list[str]", types)


def _head_sizes(text: Fields, types: list[str], num_heads: int) -> list[tuple[int, int]]:
    """Returns (head_dim, num_kv_heads) of every layer."""
    overrides = _layer_overrides(text, types)
    shared = {
        name: text.values[name]
        for name in ("head_dim", "num_key_value_heads")
        if name in text.values
    }
    sizes = []
    for index in range(len(types)):
        override = overrides.get(index, Fields(text.where, {}))
        layer = Fields(text.where, {**shared, **override.values}, override.path or text.path)
        head_dim = layer.integer("head_dim", 256, low=2, high=_MAX_HEAD_DIM)
        if head_dim % 2:
            layer.refuse("head_dim", "an even number, because rotary embedding turns pairs")
        kv_heads = layer.integer("num_key_value_heads", 4, high=_MAX_HEADS)
        if num_heads % kv_heads:
            layer.refuse(
                "num_key_value_heads",
                f"a divisor of num_attention_heads, which is {num_heads}, in layer {index}",
            )
        sizes.append((head_dim, kv_heads))
    for index, layer_type in enumerate(types):
        first = types.index(layer_type)
        if sizes[index] != sizes[first]:
            raise ValueError(
                f"{text.where}: {text.path}per_layer_config gives layer {index} (head_dim, "
                f"num_key_value_heads) = {sizes[index]} and layer {first} {sizes[first]}; expected "
                f"the same in all {layer_type} layers. {_FIX}"
            )
    return sizes


def _layer_overrides(text: Fields, types: list[str]) -> dict[int, Fields]:
    """Returns what differs from the common head sizes, by layer, in either on-disk style."""
    if "per_layer_config" not in text.values:
        full: dict[str, Any] = {"head_dim": 512}
        if text.values.get("global_head_dim") is not None:
            full["head_dim"] = text.integer("global_head_dim", low=2, high=_MAX_HEAD_DIM)
        heads = text.values.get("num_global_key_value_heads")
        if heads is not None and text.boolean("attention_k_eq_v", False):
            full["num_key_value_heads"] = text.integer(
                "num_global_key_value_heads", high=_MAX_HEADS
            )
        fields = Fields(text.where, full, f"{text.path}(full attention) ")
        return {i: fields for i, kind in enumerate(types) if kind == "full_attention"}
    if text.values["per_layer_config"] is None:
        return {}
    section = text.section("per_layer_config")
    overrides: dict[int, Fields] = {}
    for key in section.values:
        index = int(key) if key.isascii() and key.isdigit() and len(key) <= 6 else -1
        if not 0 <= index < len(types) or index in overrides:
            raise ValueError(
                f"{text.where}: {section.path.rstrip('.')} has the key {quoted(key)}; expected "
                f"each layer index from 0 to {len(types) - 1} at most once. {_FIX}"
            )
        overrides[index] = section.section(key)
        for name, value in overrides[index].values.items():
            known = name in ("head_dim", "num_key_value_heads")
            if not known and text.values.get(name, _MISSING) != value:
                overrides[index].refuse(name, "only head_dim and num_key_value_heads to differ")
    return overrides


def _kv_sources(text: Fields, types: list[str]) -> list[int]:
    """Returns for every layer the layer whose keys and values it reads.

    The last `num_kv_shared_layers` read those of the last layer of their own type before them.
    """
    num_shared = text.integer("num_kv_shared_layers", 0, low=0, high=_MAX_LAYERS)
    first_shared = len(types) - num_shared
    if first_shared <= 0 < num_shared:
        text.refuse(
            "num_kv_shared_layers",
            f"less than num_hidden_layers, which is {len(types)}: shared layers read others' keys",
        )
    sources = list(range(len(types)))
    for index in range(first_shared, len(types)):
        donors = [i for i in range(first_shared) if types[i] == types[index]]
        if not donors:
            text.refuse(
                "num_kv_shared_layers",
                f"a {types[index]} layer among the first {first_shared}, for layer {index} to read",
            )
        sources[index] = donors[-1]
    return sources


def _rope(text: Fields, layer_type: str, head_dim: int) -> tuple[float, int, float]:
    """Returns (theta, rotating pairs, factor) of a layer type."""
    if text.values.get("rope_parameters") is None:
        if layer_type == "full_attention":
            return 1e6, int(0.25 * head_dim // 2), 1.0
        return 1e4, head_dim // 2, 1.0
    rope = text.section("rope_parameters").section(layer_type)
    rope_type = rope.values.get("rope_type", rope.values.get("type", "default"))
    theta = rope.number("rope_theta", low=0.0, high=1e15)
    fraction = 1.0
    if rope.values.get("partial_rotary_factor") is not None:
        fraction = rope.number("partial_rotary_factor", low=-math.inf, high=math.inf)
        if not 0.0 <= fraction <= 1.0:
            rope.refuse("partial_rotary_factor", "a number from 0 to 1")
    if rope_type == "default":
        return theta, head_dim // 2, 1.0  # transformers ignores a partial factor here.
    if rope_type == "proportional":
        factor = rope.number("factor", 1.0, low=0.0, high=1e9)
        return theta, int(fraction * head_dim // 2), factor
    if rope_type == "linear":
        if fraction != 1.0:
            rope.refuse("partial_rotary_factor", "1.0 for the type 'linear'")
        return theta, head_dim // 2, rope.number("factor", low=0.0, high=1e9)
    key = "rope_type" if "rope_type" in rope.values else "type"
    rope.refuse(key, "'default', 'proportional' or 'linear'")
