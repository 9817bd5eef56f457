"""The modules of a text decoder that an adapter can change, under PEFT's names and the engine's."""

from __future__ import annotations

from dataclasses import dataclass

from gemloupe.checkpoint import expected_text_tensors
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


@dataclass(frozen=True)
class Module:
    """A matrix (or an experts' stack of matrices) that adapters can change."""

    path: str
    """Where PEFT finds it, without the text decoder's prefix: "layers.0.self_attn.q_proj"."""
    layer: int
    """-1 outside the layers."""
    name: str
    """The engine's name inside its layer: "attn.q_proj"."""
    weight: str
    """The checkpoint's tensor; of the head that of the embedding, which it is tied to."""
    shape: tuple[int, ...]
    """[out, in], of experts [E, out, in], of embeddings [V, D] as they are stored."""

    @property
    def label(self) -> str:
        """The name that people read: "layers.0.attn.q_proj"."""
        return self.name if self.layer < 0 else f"layers.{self.layer}.{self.name}"

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
