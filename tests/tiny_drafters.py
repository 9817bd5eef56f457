"""Random tiny drafters of the tiny models, made with transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from tiny_models import randomise, text_config_values

_S, _F = "sliding_attention", "full_attention"


def make_drafter(variant: str, *, seed: int = 5, clusters: int = 0, chosen: int = 2) -> nn.Module:
    """Makes a random drafter of `make_tiny(variant)`; `clusters` > 0: with ordered embeddings."""
    target = text_config_values(variant)
    text: dict[str, Any] = {
        key: target[key]
        for key in (
            "vocab_size",
            "max_position_embeddings",
            "num_key_value_heads",
            "head_dim",
            "global_head_dim",
            "sliding_window",
        )
    }
    for key in ("num_global_key_value_heads", "attention_k_eq_v"):
        if key in target:
            text[key] = target[key]
    text |= {"hidden_size": 34, "intermediate_size": 43, "layer_types": [_S, _S, _S, _F]}
    text |= {"num_attention_heads": 2 * target["num_key_value_heads"], "num_hidden_layers": 4}
    text |= {"num_kv_shared_layers": 4, "hidden_size_per_layer_input": 0}
    text |= {"final_logit_softcapping": None}
    unified = variant == "12b"
    if not unified:
        text["vocab_size_per_layer_input"] = 0
    text_class = transformers.Gemma4UnifiedTextConfig if unified else transformers.Gemma4TextConfig
    config_class = (
        transformers.Gemma4UnifiedAssistantConfig if unified else transformers.Gemma4AssistantConfig
    )
    model_class = (
        transformers.Gemma4UnifiedAssistantForCausalLM
        if unified
        else transformers.Gemma4AssistantForCausalLM
    )
    # A released drafter can't be made with these classes as they are: every layer shares, and the
    # class looks for the one that it shares with.
    modes = mock.PropertyMock(return_value=["reuse"] * 4)
    with mock.patch.object(text_class, "kv_sharing_modes", modes, create=True):
        config = config_class(
            text_config=text_class(**text),
            backbone_hidden_size=target["hidden_size"],
            use_ordered_embeddings=clusters > 0,
            num_centroids=max(clusters, 1),
            centroid_intermediate_top_k=chosen,
        )
        model = model_class._from_config(config, attn_implementation="eager")
    randomise(model, seed)
    if clusters:
        order = torch.randperm(text["vocab_size"], generator=torch.Generator().manual_seed(seed))
        model.masked_embedding.token_ordering.copy_(order)
    return model.eval().requires_grad_(False)


def save_drafter(model: nn.Module, folder: Path) -> Path:
    """Writes it as the released files are: tied, without keys and values of its own."""
    folder.mkdir(parents=True)
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict()
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def reference_drafts(
    drafter: nn.Module,
    embed: nn.Module,
    token: int,
    hidden: torch.Tensor,
    keys_and_values: dict[str, tuple[torch.Tensor, torch.Tensor]],
    count: int,
) -> tuple[list[int], list[torch.Tensor]]:
    """What transformers' candidate generator drafts, and the logits."""
    length = keys_and_values["full_attention"][0].shape[2]
    position = torch.tensor([[length]])
    ids, logits = [], []
    last = torch.tensor([[token]])
    state = hidden[None, None]
    for _ in range(count):
        out = drafter(
            inputs_embeds=torch.cat([embed(last), state], dim=-1),
            attention_mask=None,
            position_ids=position,
            shared_kv_states=keys_and_values,
            use_cache=False,
        )
        last = out.logits.argmax(dim=-1)
        state = out.last_hidden_state
        ids.append(int(last))
        logits.append(out.logits[0, 0])
    return ids, logits
