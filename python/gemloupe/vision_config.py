"""Reads vision_config of config.json: how a model turns images into soft tokens.

Fields, defaults and meaning are those of transformers 5.23 (`models/gemma4*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemloupe.config import Fields

_MAX = 1 << 20


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder, or the encoder-free embedder of Gemma 4 Unified (no layers).

    The fields of the other kind are 0.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    """Pixels of a patch's side."""
    pooling_kernel_size: int
    """Patches of a soft token's side."""
    position_embedding_size: int
    rms_norm_eps: float
    rope_theta: float
    use_clipped_linears: bool
    standardize: bool
    mm_embed_dim: int
    mm_posemb_size: int
    text_hidden_size: int

    @property
    def has_encoder(self) -> bool:
        """Whether there are layers; without, a soft token is one projected patch."""
        return self.num_hidden_layers > 0

    @property
    def cell(self) -> int:
        """Pixels of a soft token's side."""
        return self.patch_size * self.pooling_kernel_size


def read_vision_config(
    raw: Mapping[str, Any], text_hidden_size: int, where: str
) -> VisionConfig | None:
    """Returns the vision part of a parsed config.json, None where the model reads no images.

    ValueError naming the field, got and expected for what can't be.
    """
    if not isinstance(raw.get("vision_config"), Mapping):
        return None
    fields = Fields(where, raw, "").section("vision_config")
    unified = str(raw.get("model_type", "")).startswith("gemma4_unified")
    patch = fields.integer("patch_size", 16, high=1024)
    pooling = fields.integer("pooling_kernel_size", 3, high=64)
    eps = fields.number("rms_norm_eps", 1e-6, low=0.0, high=1.0)
    if unified:
        return VisionConfig(
            **dict.fromkeys(_ENCODER_FIELDS, 0),
            patch_size=patch,
            pooling_kernel_size=pooling,
            rms_norm_eps=eps,
            rope_theta=0.0,
            use_clipped_linears=False,
            standardize=False,
            mm_embed_dim=fields.integer("mm_embed_dim", 3840, high=_MAX),
            mm_posemb_size=fields.integer("mm_posemb_size", 1120, high=_MAX),
            text_hidden_size=text_hidden_size,
        )
    if fields.values.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        fields.refuse("hidden_activation", "'gelu_pytorch_tanh'")
    sizes = {name: fields.integer(name, size, high=_MAX) for name, size in _ENCODER_FIELDS.items()}
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        fields.refuse("num_key_value_heads", "a divisor of num_attention_heads")
    if sizes["head_dim"] % 4:
        fields.refuse("head_dim", "a multiple of 4")
    rope = fields.values.get("rope_parameters") or {}
    theta = Fields(where, rope, f"{fields.path}rope_parameters.").number(
        "rope_theta", 100.0, low=0.0, high=1e12
    )
    return VisionConfig(
        **sizes,
        patch_size=patch,
        pooling_kernel_size=pooling,
        rms_norm_eps=eps,
        rope_theta=theta,
        use_clipped_linears=fields.boolean("use_clipped_linears", False),
        standardize=fields.boolean("standardize", False),
        mm_embed_dim=0,
        mm_posemb_size=0,
        text_hidden_size=text_hidden_size,
    )


_ENCODER_FIELDS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "position_embedding_size": 10_240,
}
