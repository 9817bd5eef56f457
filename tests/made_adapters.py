"""Adapters that the installed PEFT makes for tiny models, with random values everywhere."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

ALL_LINEAR = (
    r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj|.*per_layer\w*(gate|projection)|.*router\.proj"
)
EVERYTHING = ALL_LINEAR + r"|.*embed_tokens(_per_layer)?|lm_head"


def make(base: nn.Module, *, seed: int = 3, size: float = 0.5, **config: Any) -> nn.Module:
    """`base` (a copy of it) with a LoRA adapter of random values, as PEFT runs it.

    `size` is about the change's share of a module's output.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in peft.named_parameters():
            if tensor.requires_grad:
                tensor.copy_(_draw(name, tensor, size, generator))
    return peft.eval().requires_grad_(False)


def _draw(name: str, old: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(old.shape, generator=generator)
    if "magnitude" in name:
        return old * (1 + 0.3 * noise.clamp(-2, 2))
    if "lora_A" in name:
        return noise / old.shape[1] ** 0.5
    if "lora_embedding_A" in name:  # As large as the embeddings beside.
        return 0.25 * noise
    if "lora_" in name:  # B, and its bias.
        return size * noise / old.shape[-1] ** 0.5 if old.ndim > 1 else 0.1 * noise
    return old + 0.3 * size * old.std().nan_to_num() * noise


def save(peft: nn.Module, folder: str | Path) -> Path:
    """Saves an adapter as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_pretrained(folder)
    return Path(folder)


def logits(model: nn.Module, ids: Sequence[int]) -> np.ndarray:
    """float32 [T, V] of a transformers model, with or without PEFT around it."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def rewrite(
    folder: Path, target: Path, tensors: Any = None, config: Mapping[str, Any] | None = None
) -> Path:
    """Copies an adapter; `tensors` is a function of {name: tensor}, `config` replaces fields."""
    target.mkdir()
    stored = load_file(folder / WEIGHTS)
    stored = stored if tensors is None else tensors(stored)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in stored.items()}, target / WEIGHTS
    )
    fields = json.loads((folder / CONFIG).read_text()) | dict(config or {})
    (target / CONFIG).write_text(json.dumps(fields))
    return target
