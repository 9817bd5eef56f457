"""Adapter folders written by hand, without PEFT: quick, and of any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gemloupe.adapters.modules import modules_of, towers_of
from gemloupe.checkpoint import open_checkpoint


def write_adapter(
    folder: Path,
    source: str | Path,
    *,
    end: str | tuple[str, ...] = "q_proj",
    rank: int = 4,
    seed: int = 0,
) -> Path:
    """Writes a random LoRA adapter of every linear of `source` whose path ends with `end`."""
    generator = np.random.default_rng(seed)
    tensors = {}
    checkpoint = open_checkpoint(source)
    text, towers = modules_of(checkpoint.config.text), towers_of(checkpoint).modules
    for module in (*text.values(), *towers.values()):
        if module.path.endswith(end) and len(module.shape) == 2:
            name = f"base_model.model.model.{module.path}"
            a = generator.standard_normal((rank, module.inputs)) / module.inputs**0.5
            b = generator.standard_normal((module.outputs, rank)) / rank**0.5
            tensors[f"{name}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
