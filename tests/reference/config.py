"""What config.json says about each layer, in both spellings that exist on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLIDING = "sliding_attention"
FULL = "full_attention"

# The class default of `global_head_dim`, used where a released file leaves it out.
DEFAULT_GLOBAL_HEAD_DIM = 512
DEFAULT_FULL_LAYER_PERIOD = 6


@dataclass(frozen=True)
class Rope:
    """How one layer type rotates: `theta` ** (-2i / head_dim), the first `partial` of it."""

    theta: float
    partial: float
    factor: float


@dataclass(frozen=True)
class Layer:
    """Everything that differs between layers."""

    index: int
    kind: str
    head_dim: int
    kv_heads: int
    window: int | None  # Positions a query sees, itself included; None is all.
    rope: Rope
    values_are_keys: bool
    kv_source: int  # The layer whose keys and values are read; itself unless sharing.
    intermediate_size: int

    @property
    def shares(self) -> bool:
        return self.kv_source != self.index


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    heads: int
    eps: float
    softcap: float | None
    bidirectional: bool
    per_layer_size: int
    top_k_experts: int  # 0 without experts.
    moe_intermediate_size: int
    layers: tuple[Layer, ...]


def read_config(folder: Path) -> Config:
    """Reads the text part of `folder`/config.json."""
    root = json.loads((folder / "config.json").read_text())
    return parse_config(root.get("text_config", root))


def parse_config(text: dict[str, Any]) -> Config:
    if text.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation: got {text['hidden_activation']!r}")
    has_experts = bool(text.get("enable_moe_block"))
    return Config(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        heads=text["num_attention_heads"],
        eps=text["rms_norm_eps"],
        softcap=text.get("final_logit_softcapping"),
        bidirectional=text.get("use_bidirectional_attention") == "all",
        per_layer_size=text.get("hidden_size_per_layer_input") or 0,
        top_k_experts=text["top_k_experts"] if has_experts else 0,
        moe_intermediate_size=text["moe_intermediate_size"] if has_experts else 0,
        layers=tuple(_layers(text)),
    )


def _layers(text: dict[str, Any]) -> list[Layer]:
    count = text["num_hidden_layers"]
    kinds = text.get("layer_types") or [
        SLIDING if (index + 1) % DEFAULT_FULL_LAYER_PERIOD else FULL for index in range(count)
    ]
    kinds = [*kinds[:-1], FULL]  # The config class forces the last layer to be full.
    first_sharing = count - text.get("num_kv_shared_layers", 0)
    return [
        Layer(
            index=index,
            kind=kind,
            head_dim=_override(text, index, kind, "head_dim"),
            kv_heads=_override(text, index, kind, "num_key_value_heads"),
            window=_window(text) if kind == SLIDING else None,
            rope=_rope(text, kind),
            values_are_keys=bool(text.get("attention_k_eq_v")) and kind == FULL,
            # Sharing layers read the last layer of their own kind that has keys of its own.
            kv_source=index
            if index < first_sharing
            else max(i for i in range(first_sharing) if kinds[i] == kind),
            intermediate_size=text["intermediate_size"]
            * (2 if text.get("use_double_wide_mlp") and index >= first_sharing else 1),
        )
        for index, kind in enumerate(kinds)
    ]


def _override(text: dict[str, Any], index: int, kind: str, name: str) -> int:
    if "per_layer_config" in text:  # transformers 5.23; keys are zero-padded layer indices.
        by_layer = {int(key): value for key, value in text["per_layer_config"].items()}
        return by_layer.get(index, {}).get(name, text[name])
    if kind == FULL and name == "head_dim":
        return text.get("global_head_dim", DEFAULT_GLOBAL_HEAD_DIM)
    if kind == FULL and text.get("attention_k_eq_v"):  # The released spelling.
        return text.get("num_global_key_value_heads") or text[name]
    return text[name]


def _window(text: dict[str, Any]) -> int:
    """Returns W; for bidirectional attention the reach on each side, floor(W / 2) + 1."""
    window = text["sliding_window"]
    return window // 2 + 1 if text.get("use_bidirectional_attention") == "all" else window


def _rope(text: dict[str, Any], kind: str) -> Rope:
    defaults = {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    }
    values = (text.get("rope_parameters") or defaults)[kind]
    if values["rope_type"] == "default":
        return Rope(values["rope_theta"], 1.0, 1.0)
    if values["rope_type"] != "proportional":
        raise ValueError(f"rope_type of {kind}: got {values['rope_type']!r}")
    partial = values.get("partial_rotary_factor", 1.0)
    return Rope(values["rope_theta"], partial, values.get("factor", 1.0))
