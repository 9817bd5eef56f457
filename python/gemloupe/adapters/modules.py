"""The modules of a model that an adapter can change, under PEFT's names and the engine's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gemloupe import towers as _towers
from gemloupe.checkpoint import Checkpoint, expected_text_tensors
from gemloupe.config import TextConfig

# Path inside a layer -> the engine's name. The weight is the path and ".weight".
_IN_LAYER = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "per_layer_input_gate": "per_layer.gate",
    "per_layer_projection": "per_layer.projection",
    "router.proj": "router.proj",
    "experts.gate_up_proj": "experts.gate_up_proj",
    "experts.down_proj": "experts.down_proj",
}
_OUTSIDE = ("embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection")
EMBEDDINGS = ("embed_tokens", "embed_tokens_per_layer")
HEAD = "lm_head"

# The same of the towers, where PEFT finds the linear inside the clipping.
_VISION_LAYER = "vision_tower.encoder.layers.{}."
_AUDIO_LAYER = "audio_tower.layers.{}."
_IN_TOWERS = {
    "vision_tower.patch_embedder.input_proj": "vision.input_proj",
    "vision_embedder.patch_dense": "vision.patch_dense",
    **{
        f"{_VISION_LAYER}{path}.linear": f"vision.{_IN_LAYER[path]}"
        for path in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    },
    "embed_vision.embedding_projection": "vision.projection",
    "audio_tower.subsample_conv_projection.input_proj_linear": "audio.input_proj",
    f"{_AUDIO_LAYER}feed_forward1.ffw_layer_1.linear": "audio.ffn1.up_proj",
    f"{_AUDIO_LAYER}feed_forward1.ffw_layer_2.linear": "audio.ffn1.down_proj",
    f"{_AUDIO_LAYER}self_attn.q_proj.linear": "audio.attn.q_proj",
    f"{_AUDIO_LAYER}self_attn.k_proj.linear": "audio.attn.k_proj",
    f"{_AUDIO_LAYER}self_attn.v_proj.linear": "audio.attn.v_proj",
    f"{_AUDIO_LAYER}self_attn.relative_k_proj": "audio.attn.relative_k_proj",
    f"{_AUDIO_LAYER}self_attn.post.linear": "audio.attn.post",
    f"{_AUDIO_LAYER}lconv1d.linear_start.linear": "audio.conv.linear_start",
    f"{_AUDIO_LAYER}lconv1d.linear_end.linear": "audio.conv.linear_end",
    f"{_AUDIO_LAYER}feed_forward2.ffw_layer_1.linear": "audio.ffn2.up_proj",
    f"{_AUDIO_LAYER}feed_forward2.ffw_layer_2.linear": "audio.ffn2.down_proj",
    "audio_tower.output_proj": "audio.output_proj",
    "embed_audio.embedding_projection": "audio.projection",
}  # fmt: skip
_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Module:
    """A matrix (or an experts' stack of matrices) that adapters can change."""

    path: str
    """Where PEFT finds it, without the text decoder's prefix: "layers.0.self_attn.q_proj"; of
    towers without "model."."""
    layer: int
    """-1 outside the layers."""
    name: str
    """The engine's name inside its layer: "attn.q_proj", "vision.attn.q_proj"."""
    weight: str
    """The checkpoint's tensor; of the head that of the embedding, which it is tied to."""
    shape: tuple[int, ...]
    """[out, in], of experts [E, out, in], of embeddings [V, D] as they are stored."""

    @property
    def label(self) -> str:
        """The name that people read: "layers.0.attn.q_proj", "vision.layers.0.attn.q_proj"."""
        if self.layer < 0:
            return self.name
        inner = self.name.removeprefix(f"{self.tower}.")
        return f"{self.tower}.layers.{self.layer}.{inner}".removeprefix(".")

    @property
    def tower(self) -> str:
        """ "vision", "audio", or "" for the text decoder."""
        first = self.name.split(".", 1)[0]
        return first if first in ("vision", "audio") else ""

    @property
    def is_embedding(self) -> bool:
        return self.name in EMBEDDINGS

    @property
    def is_experts(self) -> bool:
        return len(self.shape) == 3

    @property
    def inputs(self) -> int:
        return self.shape[-1]

    @property
    def outputs(self) -> int:
        return self.shape[-2]


def modules_of(config: TextConfig) -> dict[str, Module]:
    """Every module of the text decoder that adapters can change, by path, in model order."""
    shapes = expected_text_tensors(config)
    found: dict[str, Module] = {}

    def add(path: str, layer: int, name: str, weight: str) -> None:
        found[path] = Module(path, layer, name, weight, shapes[weight])

    for name in _OUTSIDE:
        if f"{name}.weight" in shapes:
            add(name, -1, name, f"{name}.weight")
    for layer in range(config.num_hidden_layers):
        for inner, name in _IN_LAYER.items():
            path = f"layers.{layer}.{inner}"
            weight = path if ".experts." in path else f"{path}.weight"
            if weight in shapes:
                add(path, layer, name, weight)
    add(HEAD, -1, HEAD, "embed_tokens.weight")
    return found


@dataclass(frozen=True)
class Towers:
    """The vision and audio parts that a model runs, as adapters find them."""

    parts: frozenset[str] = frozenset()
    """The checkpoint's modules: "vision_tower", "embed_vision", …"""
    modules: Mapping[str, Module] = field(default_factory=dict)
    """Those that adapters can change, by path, in model order."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of every tensor, by its name without "model."."""


def towers_of(checkpoint: Checkpoint) -> Towers:
    """What adapters find of the vision and audio parts of a checkpoint."""
    parts: set[str] = set()
    if _towers.has_vision(checkpoint):
        parts.update(_towers.VISION)
    if _towers.has_audio(checkpoint):
        parts.update(_towers.AUDIO)
    parts &= set(checkpoint.towers)
    shapes = {
        name.removeprefix("model."): tuple(checkpoint.tensors[name].info.shape)
        for part in parts
        for name in checkpoint.towers[part]
    }
    return Towers(frozenset(parts), tower_modules(shapes), shapes)


def tower_modules(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Module]:
    """Every module of towers that adapters can change, by path, in model order.

    `shapes`: those of the towers' tensors, by their names without "model.".
    """
    numbers = {path: number for number, path in enumerate(_IN_TOWERS)}
    found = []
    for weight, shape in shapes.items():
        path = weight.removesuffix(".weight")
        layer = _LAYER_NUMBER.search(path)
        general = _LAYER_NUMBER.sub("{}", path, count=1)
        if path == weight or len(shape) != 2 or general not in _IN_TOWERS:
            continue
        index = int(layer[0]) if layer else -1
        module = Module(path, index, _IN_TOWERS[general], weight, shape)
        # In the table's order, but layer by layer.
        section = general[: general.find("{}")] if layer else general
        first = next(n for known, n in numbers.items() if known.startswith(section))
        found.append((first, index, numbers[general], module))
    ordered = [module for *_, module in sorted(found, key=lambda entry: entry[:3])]
    return {module.path: module for module in ordered}
