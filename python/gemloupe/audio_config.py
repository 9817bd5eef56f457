"""The audio part of a config.json: a conformer over mel bands, or samples read as they are."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gemloupe.config import Fields, ModelConfig
from gemloupe.errors import quoted

_MAX_WIDTH = 1 << 20
_MAX_LAYERS = 1024


@dataclass(frozen=True)
class AudioConfig:
    """Fields have the names of config.json. Without an encoder (12B) there are no layers."""

    text_hidden_size: int
    rms_norm_eps: float
    feature_size: int
    """Mel bands of a frame; without an encoder, samples of a token."""
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    subsampling_conv_channels: tuple[int, ...] = ()
    conv_kernel_size: int = 0
    residual_weight: float = 0.0
    attention_context_left: int = 0
    attention_logit_cap: float = 0.0
    gradient_clipping: float = 0.0
    use_clipped_linears: bool = False
    output_proj_dims: int = 0

    @property
    def tower(self) -> str:
        return "audio"

    @property
    def has_encoder(self) -> bool:
        """Whether mel features go through a conformer (E2B, E4B)."""
        return self.num_hidden_layers > 0

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The letters of hook points' shapes."""
        heads = max(1, self.num_attention_heads)
        return {
            "B": self.feature_size,
            "D": self.hidden_size,
            "F": 4 * self.hidden_size,
            "N": heads,
            "H": self.hidden_size // heads,
            "O": self.output_proj_dims,
            "M": self.text_hidden_size,
        }


def read_audio_config(config: ModelConfig, feature_size: int) -> AudioConfig | None:
    """The audio part of a checkpoint's config; None where it has none.

    `feature_size`: mel bands of its features. ValueError naming field, got and expected.
    """
    if config.raw.get("audio_config") is None:
        return None
    fields = Fields("config.json", config.raw).section("audio_config")
    text_width = config.text.hidden_size
    eps = fields.number("rms_norm_eps", 1e-6, low=0.0, high=1.0)
    if config.model_type.startswith("gemma4_unified"):
        samples = fields.integer("audio_embed_dim", 640, high=_MAX_WIDTH)
        return AudioConfig(text_width, eps, samples)
    if fields.values.get("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", "'silu'")
    channels = fields.values.get("subsampling_conv_channels", [128, 32])
    if not isinstance(channels, list) or [type(n) for n in channels] != [int, int]:
        fields.refuse("subsampling_conv_channels", "a list of two integers")
    left = fields.integer("attention_context_left", 13, low=2, high=4096)
    chunk = fields.integer("attention_chunk_size", 12, high=4096)
    # The distances that attention knows are then those of its window, whatever the chunk.
    if (chunk + left - 1) // 2 != left - 1:
        fields.refuse("attention_chunk_size", f"{left - 1}, attention_context_left less one")
    if fields.integer("attention_context_right", 0, low=0, high=4096):
        fields.refuse("attention_context_right", "0: the encoders of Gemma 4 are causal")
    width = fields.integer("hidden_size", 1024, high=_MAX_WIDTH)
    heads = fields.integer("num_attention_heads", 8, high=width)
    if width % heads:
        fields.refuse("num_attention_heads", f"a divisor of hidden_size, {width}")
    if (feature_size + 3) // 4 != channels[0] // 4:
        raise ValueError(
            f"config.json: audio_config.subsampling_conv_channels is {quoted(channels)}, but the "
            f"features have {feature_size} mel bands; expected as many channels as bands"
        )
    return AudioConfig(
        text_hidden_size=text_width,
        rms_norm_eps=eps,
        feature_size=feature_size,
        hidden_size=width,
        num_hidden_layers=fields.integer("num_hidden_layers", 12, high=_MAX_LAYERS),
        num_attention_heads=heads,
        subsampling_conv_channels=tuple(channels),
        conv_kernel_size=fields.integer("conv_kernel_size", 5, high=1024),
        residual_weight=fields.number("residual_weight", 0.5, low=-1e6, high=1e6),
        attention_context_left=left,
        attention_logit_cap=fields.number("attention_logit_cap", 50.0, low=0.0, high=1e6),
        gradient_clipping=fields.number("gradient_clipping", 1e10, low=0.0, high=3e38),
        use_clipped_linears=fields.boolean("use_clipped_linears", True),
        output_proj_dims=fields.integer("output_proj_dims", 1536, high=_MAX_WIDTH),
    )
