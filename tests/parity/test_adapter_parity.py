"""Adapters of the installed PEFT, random in all they hold, give the logits that PEFT gives."""

from __future__ import annotations

import numpy as np
import pytest
from parity_checks import assert_logits_close

import gemloupe as gl
import made_adapters
from made_adapters import ALL_LINEAR, EVERYTHING
from tiny_models import VARIANTS, random_ids, text_config

PATTERNS = {
    "rank_pattern": {"q_proj": 2, r".*\.mlp\.up_proj": 5, "layers.1.self_attn.o_proj": 1},
    "alpha_pattern": {"self_attn.q_proj": 3, "down_proj": 9},
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def check(tiny, tmp_path, variant, *, text_only=True, **config) -> None:
    """One adapter's logits in prefill, and after a cache, equal PEFT's; and it does something."""
    base, folder = tiny(variant, text_only=text_only)
    ids = random_ids(2 * text_config(base).sliding_window + 3)
    peft = made_adapters.make(base, **config)
    want = made_adapters.logits(peft, ids)
    model = gl.load(folder, dtype="float32")
    plain = model.run(ids, logits="all").logits
    adapter = model.load_adapter(made_adapters.save(peft, tmp_path / "a"))
    run = model.run(ids, logits="all", adapter="a")
    assert_logits_close(run.logits, want)
    assert np.abs(want - plain).max() > 0.05
    assert not adapter.report().ignored
    cache = model.new_cache()
    model.run(ids[:-1], cache=cache, adapter=adapter)
    assert_logits_close(model.run(ids[-1:], cache=cache, adapter=adapter).logits, want[-1:])
    assert np.array_equal(model.run(ids, logits="all").logits, plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_with_patterns_and_rslora_equals_peft(tiny, tmp_path, variant):
    scales = {"r": 4, "lora_alpha": 6, "use_rslora": True, **PATTERNS}
    check(tiny, tmp_path, variant, target_modules=ALL_LINEAR, **scales)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dora_of_everything_equals_peft(tiny, tmp_path, variant):
    check(tiny, tmp_path, variant, target_modules=EVERYTHING, r=3, lora_alpha=4, use_dora=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_and_the_head_equal_peft(tiny, tmp_path, variant):
    check(tiny, tmp_path, variant, target_modules=r".*embed_tokens(_per_layer)?|lm_head", r=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_matrices_and_trainable_tokens_equal_peft(tiny, tmp_path, variant):
    saved = ["layers.0.self_attn.q_proj", "down_proj"]
    parts = {"modules_to_save": saved, "trainable_token_indices": [2, 9, 6, 200]}
    check(tiny, tmp_path, variant, target_modules=["o_proj"], r=2, lora_bias=True, **parts)


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids="+".join)
def test_experts_as_target_parameters_equal_peft(tiny, tmp_path, targets):
    modules = ["router.proj", "q_proj"]
    check(tiny, tmp_path, "26b", target_modules=modules, target_parameters=targets, r=3)


def test_matrices_as_target_parameters_equal_peft(tiny, tmp_path):
    weights = ["q_proj", "embed_tokens", "mlp.up_proj", "embed_tokens_per_layer"]
    targets = [f"{name}.weight" for name in weights]
    scales = {"r": 3, "alpha_pattern": {"q_proj.weight": 20}}
    check(tiny, tmp_path, "e2b", target_modules=[], target_parameters=targets, **scales)


TIES = {
    "embed_tokens, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "embed_tokens saved": {"modules_to_save": ["embed_tokens"]},
    "lm_head saved": {"modules_to_save": ["lm_head"]},
    "both saved, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "other tokens": {"trainable_token_indices": {"embed_tokens": [2, 9], "lm_head": [7]}},
    "per-layer tokens": {"trainable_token_indices": {"embed_tokens_per_layer": [9, 2]}},
    "per-layer table saved": {"modules_to_save": ["embed_tokens_per_layer"]},
}


@pytest.mark.parametrize("config", TIES.values(), ids=TIES)
def test_embeddings_tied_and_not_equal_peft(tiny, tmp_path, config):
    check(tiny, tmp_path, "e4b", **{"r": 3, "target_modules": ["q_proj"], **config})


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_the_multimodal_class_equals_peft(tiny, tmp_path, variant):
    targets = r".*language_model.*_proj"
    check(tiny, tmp_path, variant, text_only=False, target_modules=targets, r=3)
