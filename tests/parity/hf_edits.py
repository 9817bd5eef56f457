"""Runs of transformers in which the value of one hook point is replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified

import gemloupe as gl
from gemloupe.hooks import HookPoint, point_shape
from tiny_models import text_model

Change = Callable[[np.ndarray], np.ndarray]


def hf_logits(
    model: nn.Module, ids: list[int], point: HookPoint, config: Any, change: Change
) -> np.ndarray:
    """Logits [T, V] where `change` replaces the point's value [T, …] (scores, patterns: [N, T, S]).

    The point is that of a module (`point.transformers`), or an array inside eager attention.
    """
    replaced = (
        _in_attention(point, change)
        if point.name.split(".attn.")[-1] in ATTENTION
        else _at_module(model, point, config, change)
    )
    with torch.no_grad(), replaced:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy().copy()


ATTENTION = ("rot_q", "keys", "values", "scores", "pattern")
"""Points that transformers has as arguments or values of eager_attention_forward only."""


@contextlib.contextmanager
def _at_module(model: nn.Module, point: HookPoint, config: Any, change: Change) -> Iterator[None]:
    is_input = point.transformers.endswith(".input")
    path, _, index = point.transformers.removesuffix(".input").partition(".output.")
    module: Any = model if path == "lm_head" else text_model(model)
    for name in path.split("."):
        module = getattr(module, name)
    shape = point_shape(point, config)

    def changed(value: torch.Tensor) -> torch.Tensor:
        rows = value.detach().reshape(-1, *shape).numpy().copy()
        return torch.from_numpy(np.ascontiguousarray(change(rows))).reshape(value.shape)

    def before(_module: nn.Module, inputs: Any) -> Any:
        return (changed(inputs[0]), *inputs[1:])

    def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not index:
            return changed(output)
        number = int(index)
        return (*output[:number], changed(output[number]), *output[number + 1 :])

    handle = (
        module.register_forward_pre_hook(before)
        if is_input
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _in_attention(point: HookPoint, change: Change) -> Iterator[None]:
    name = point.name.rsplit(".", 1)[1]

    def by_row(value: torch.Tensor) -> torch.Tensor:  # [1, N, T, H] <-> [T, N, H]
        rows = value[0].transpose(0, 1).numpy().copy()
        return torch.from_numpy(change(rows)).transpose(0, 1)[None]

    def attention(
        layer: nn.Module, query: Any, key: Any, value: Any, mask: Any, **_arguments: Any
    ) -> Any:
        here = layer.layer_idx == point.layer
        if here and name == "rot_q":
            query = by_row(query)
        if here and name == "keys":
            key = by_row(key)
        if here and name == "values":
            value = by_row(value)
        groups = layer.num_key_value_groups
        scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(mask < 0, -torch.inf)
        if here and name == "scores":
            scores = torch.from_numpy(change(scores[0].numpy().copy()))[None]
        pattern = torch.softmax(scores, dim=-1)
        if here and name == "pattern":
            pattern = torch.from_numpy(change(pattern[0].numpy().copy()))[None]
        z = pattern @ value.repeat_interleave(groups, dim=1)
        return z.transpose(1, 2).contiguous(), pattern

    with contextlib.ExitStack() as stack:
        for module in (modeling_gemma4, modeling_gemma4_unified):
            stack.enter_context(mock.patch.object(module, "eager_attention_forward", attention))
        yield


def comparable_points(model: gl.Model) -> list[HookPoint]:
    """The points whose edit transformers can make at one place, of layers of every kind."""
    config = model.config.text
    layers = {0, config.num_hidden_layers - 1}
    layers |= {max(layer.kv_source for layer in config.layers if layer.window)}
    layers |= {config.num_hidden_layers // 2}
    chosen = []
    for point in gl.hook_points(model).values():
        if point.layer >= 0 and point.layer not in layers:
            continue
        short = point.name.split(".", 2)[-1]
        # Editing these in transformers reaches a norm's input but not the stream beside it, or
        # comes after the choice that our edit redoes; tests of their own follow.
        elsewhere = ("resid_mid", "resid_ffn", "router.probs", "router.experts")
        in_attention = point.name.split(".attn.")[-1] in ATTENTION and ".attn." in point.name
        if short in elsewhere or point.name == "logits":
            continue
        # K = V layers have no v_proj: the raw key serves as both.
        keys_are_values = point.layer >= 0 and config.layers[point.layer].values_are_keys
        if short == "attn.v_proj" and keys_are_values:
            continue
        if point.transformers or in_attention:
            chosen.append(point)
    return chosen
