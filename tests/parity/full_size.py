"""Checkpoints of one or two full-size layers, with heavy tails and outlier channels.

Hidden size, heads, head sizes, feed-forward widths and expert sizes are the released ones; only
the vocabulary, the window and the number of layers are small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

_S, _F = "sliding_attention", "full_attention"
WINDOW = 9
VOCAB_SIZE = 307

# A sharing layer needs a layer of its own kind before it to read from.
FULL_SIZE: dict[str, dict[str, Any]] = {
    "e2b": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "use_double_wide_mlp": True,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "layer_types": [_S, _F, _S, _F],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 256,
    },
    "e4b": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "layer_types": [_S, _F, _S, _F],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 256,
    },
    "12b": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "layer_types": [_S, _F],
    },
    "26b": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "layer_types": [_S, _F],
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        # 128 experts of both layers would be 6 GB in float32: an eighth of them here, with their
        # real size and top 8; all 128 in the one-layer case below.
        "num_experts": 16,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "26b-128-experts": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "layer_types": [_F],
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "31b": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "layer_types": [_S, _F],
        "hidden_size_per_layer_input": 0,
    },
}


def write_full_size(name: str, folder: Path) -> None:
    """Writes the bfloat16 checkpoint `name` (text-only class) into `folder`."""
    text = dict(FULL_SIZE[name], vocab_size=VOCAB_SIZE, head_dim=256, global_head_dim=512)
    text |= {"sliding_window": WINDOW, "final_logit_softcapping": 30.0}
    text["num_hidden_layers"] = len(text["layer_types"])
    if name == "12b":
        config = transformers.Gemma4UnifiedTextConfig(**text)
        model_class = transformers.Gemma4UnifiedForCausalLM
    else:
        config = transformers.Gemma4TextConfig(**text, vocab_size_per_layer_input=VOCAB_SIZE)
        model_class = transformers.Gemma4ForCausalLM
    with torch.device("meta"):
        state = model_class._from_config(config).state_dict()
    del state["lm_head.weight"]
    pool = _HeavyTails(seed=len(name) + text["hidden_size"])
    tensors = {key: pool.draw(key, tensor.shape) for key, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.architectures = [model_class.__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)


class _HeavyTails:
    """Draws tensors as slices of one pool of Student's t values with 4 degrees of freedom.

    Drawing every value anew would take minutes for 10^9 of them, and arithmetic does not notice.
    """

    _SIZE = (1 << 22) + 1  # Odd, so that rows of a matrix do not repeat.

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(5, self._SIZE, generator=self._generator)
        heavy = normal[0] / (normal[1:] ** 2).mean(dim=0).sqrt()
        self._pool = (heavy / heavy.std()).bfloat16()

    def _values(self, count: int) -> torch.Tensor:
        start = int(torch.randint(self._SIZE, (1,), generator=self._generator))
        repeats = -(-count // self._SIZE)
        return self._pool.roll(start).repeat(repeats)[:count]

    def draw(self, name: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            mean = 0.2 if name.endswith("q_norm.weight") else 1.0
            weight = mean * (0.6 + 0.8 * torch.rand(shape, generator=self._generator))
            if "layernorm" in name:  # A few channels far above the others, as in trained models.
                weight[torch.randint(shape[0], (4,), generator=self._generator)] *= 20
            return weight.bfloat16()
        values = self._values(shape.numel()).reshape(shape)
        if name.endswith("embed_tokens.weight"):
            values = values * 0.03
            values[:, :3] *= 30  # Outlier channels of the residual stream.
        elif name.endswith("router.proj.weight"):
            values = values * 1.5
        elif not name.endswith("embed_tokens_per_layer.weight"):
            values = values * shape[-1] ** -0.5
        return values.bfloat16().contiguous()


def load_full_size(folder: Path) -> torch.nn.Module:
    """Loads the checkpoint into transformers: float32, eager."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if getattr(model.config, "enable_moe_block", False):
        model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)
