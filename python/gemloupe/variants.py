"""The five released models of the family: their configs, compact, in the published spelling.

For figures about models that are not on this machine (`gemloupe doctor`, `estimate`) and for
spelling suggestions; loading always reads the checkpoint's own config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemloupe.config import ModelConfig, parse_config


@dataclass(frozen=True)
class Variant:
    """A released model; `raw` holds the fields of config.json that decide sizes and behaviour."""

    name: str
    hub_ids: tuple[str, ...]
    raw: dict[str, Any] = field(repr=False)

    @property
    def config(self) -> ModelConfig:
        return parse_config(self.raw, f"{self.name} config.json")


_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}
_COMMON_TEXT: dict[str, Any] = {
    "vocab_size": 262_144,
    "head_dim": 256,
    "global_head_dim": 512,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "final_logit_softcapping": 30.0,
    "rope_parameters": _ROPE,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_EDGE_TEXT: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "use_bidirectional_attention": None,
    "max_position_embeddings": 131_072,
}
_LARGE_TEXT: dict[str, Any] = {
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "num_kv_shared_layers": 0,
    "use_bidirectional_attention": "vision",
    "max_position_embeddings": 262_144,
}
_EDGE_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10_240,
    "use_clipped_linears": True,
    "standardize": False,
}
_LARGE_VISION: dict[str, Any] = {
    **_EDGE_VISION,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "use_clipped_linears": False,
    "standardize": True,
}
_EDGE_AUDIO: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "subsampling_conv_channels": [128, 32],
    "conv_kernel_size": 5,
    "use_clipped_linears": True,
    "output_proj_dims": 1536,
}


def _layer_types(sliding: int, repeats: int) -> list[str]:
    return (["sliding_attention"] * sliding + ["full_attention"]) * repeats


def _variant(
    name: str,
    text: dict[str, Any],
    *,
    vision: dict[str, Any],
    audio: dict[str, Any] | None = None,
    unified: bool = False,
) -> Variant:
    model_type = "gemma4_unified" if unified else "gemma4"
    architecture = (
        "Gemma4UnifiedForConditionalGeneration" if unified else ("Gemma4ForConditionalGeneration")
    )
    text = {"model_type": f"{model_type}_text", **_COMMON_TEXT, **text}
    text["num_hidden_layers"] = len(text["layer_types"])
    raw = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "eos_token_id": [1, 106],
        "image_token_id": 258_880,
        "audio_token_id": 258_881,
        "video_token_id": 258_884,
        "boi_token_id": 255_999,
        "eoi_token_id": 258_882,
        "boa_token_id": 256_000,
        "eoa_token_id": 258_883,
        "text_config": text,
        "vision_config": vision,
        "audio_config": audio,
    }
    return Variant(name, (f"google/gemma-4-{name}", f"google/gemma-4-{name}-it"), raw)


_E2B = _variant(
    "E2B",
    {
        **_EDGE_TEXT,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "use_double_wide_mlp": True,
        "layer_types": _layer_types(4, 7),
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
    },
    vision=_EDGE_VISION,
    audio=_EDGE_AUDIO,
)
_E4B = _variant(
    "E4B",
    {
        **_EDGE_TEXT,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "use_double_wide_mlp": False,
        "layer_types": _layer_types(5, 7),
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
    },
    vision=_EDGE_VISION,
    audio=_EDGE_AUDIO,
)
_12B = _variant(
    "12B",
    {
        **_LARGE_TEXT,
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "layer_types": _layer_types(5, 8),
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
    },
    vision={
        "model_type": "gemma4_unified_vision",
        "mm_embed_dim": 3840,
        "mm_posemb_size": 1120,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "output_proj_dims": 3840,
    },
    audio={"model_type": "gemma4_unified_audio", "audio_embed_dim": 640},
    unified=True,
)
_26B = _variant(
    "26B-A4B",
    {
        **_LARGE_TEXT,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "use_double_wide_mlp": False,
        "layer_types": _layer_types(5, 5),
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    vision=_LARGE_VISION,
)
_31B = _variant(
    "31B",
    {
        **_LARGE_TEXT,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "use_double_wide_mlp": False,
        "layer_types": _layer_types(5, 10),
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": False,
        "num_experts": None,
    },
    vision=_LARGE_VISION,
)

VARIANTS: dict[str, Variant] = {v.name: v for v in (_E2B, _E4B, _12B, _26B, _31B)}
