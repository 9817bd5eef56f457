"""Names of tensors in adapter files: which module a tensor belongs to, and which part of it is."""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = "base_model.model."
"""What PEFT puts before every name."""

_LORA = re.compile(
    r"(?P<path>.+?)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_SAVED = re.compile(r"(?P<path>.+?)\.modules_to_save\.[^.]+\.(?P<rest>.+)")
_TOKENS = re.compile(r"(?P<path>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
_BASE = re.compile(r"(?P<path>.+?)\.base_layer\.(?P<leaf>weight|bias)")
# In front of a text decoder's names: the multimodal class, the text-only one, older spellings.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
_TEXT = re.compile(
    r"layers\.\d+\.|embed_tokens(?:_per_layer)?(?:\.|$)|per_layer_model_projection(?:\.|$)|"
    r"per_layer_projection_norm\.|norm\.|lm_head(?:\.|$)"
)
# Gemma 4 Unified: modules of transformers' class whose tensors have other names in checkpoints.
_UNIFIED = re.compile(
    r"embed_vision\.(?:(?P<inner>multimodal_embedder)\.|(?=(?:patch_|pos_)\w+(?:\.|$)))"
)
_PARTS = {
    "lora_A": "a", "lora_B": "b", "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b", "lora_magnitude_vector": "magnitude",
}  # fmt: skip


class Key(NamedTuple):
    """What a tensor's name says."""

    path: str
    """The module's path in the trained model, without PEFT's prefix."""
    part: str
    """"a", "b", "bias" (of B), "embedding_a", "embedding_b", "magnitude", "tokens", "base" (a copy
    of the base's weight), or "saved" (a parameter that replaces the base's)."""
    adapter: str = ""
    """The adapter's name, where a state dict was saved with it."""
    nested: int = 0
    """How many wrappers of the same module are around this one: target_parameters nests them."""


def parse(name: str) -> Key:
    """Takes a tensor's name apart; every name is at least a "saved" parameter."""
    rest = name.removeprefix(PREFIX)
    if match := _LORA.fullmatch(rest):
        part = _PARTS[match["part"]]
        if match["leaf"] == "bias":
            part = "bias" if part == "b" else "unknown"
        path, nested = _unwrapped(match["path"])
        return Key(path, part, match["adapter"] or "", nested)
    if match := _TOKENS.fullmatch(rest):
        return Key(match["path"], "tokens")
    if match := _SAVED.fullmatch(rest):
        return Key(f"{match['path']}.{match['rest']}", "saved")
    if match := _BASE.fullmatch(rest):
        return Key(
            _unwrapped(match["path"])[0], "base" if match["leaf"] == "weight" else "base_bias"
        )
    return Key(rest, "saved")


def _unwrapped(path: str) -> tuple[str, int]:
    nested = 0
    while path.endswith(".base_layer"):
        path, nested = path.removesuffix(".base_layer"), nested + 1
    return path, nested


def in_towers(path: str) -> str:
    """The path of a tower's module or tensor in checkpoints, without "model."."""
    rest = path.removeprefix("model.")
    match = _UNIFIED.match(rest)
    if match is None:
        return rest
    return ("embed_vision." if match["inner"] else "vision_embedder.") + rest[match.end() :]


def in_text_decoder(path: str) -> str | None:
    """The path inside the text decoder: "layers.0.mlp.up_proj"; None for other parts of a model.

    The multimodal class has "model.language_model." in front, the text-only one "model.".
    """
    for prefix in _PREFIXES:
        rest = path.removeprefix(prefix)
        if path.startswith(prefix) and _TEXT.match(rest):
            return rest
    return None
