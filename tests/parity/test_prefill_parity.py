"""One prefill equals transformers: logits, every layer's output, every hook point."""

from __future__ import annotations

import pytest
from parity_checks import (
    assert_experts_equal_or_tied,
    assert_layers_close,
    assert_logits_close,
    assert_tensor_close,
)

import gemloupe as gl
from tiny_models import VARIANTS, hf_run, random_ids, text_config

pytestmark = pytest.mark.core  # repeated for every instruction set


def eight_windows(model) -> list[int]:
    return random_ids(8 * text_config(model).sliding_window + 3)


def compare_prefill(model, folder) -> None:
    ids = eight_windows(model)
    want = hf_run(model, ids)
    run = gl.load(folder, dtype="float32").run(ids, logits="all", capture=["layers.*.resid_post"])
    assert_layers_close(run.captured, want)
    assert_logits_close(run.logits, want["logits"])


@pytest.mark.parametrize("style", ["transformers", "released"])
@pytest.mark.parametrize("text_only", [False, True], ids=["multimodal", "text-only"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_layers_equal_transformers(tiny, variant, text_only, style):
    compare_prefill(*tiny(variant, text_only=text_only, style=style))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_files_in_shards_equal_transformers(tiny, variant, dtype):
    compare_prefill(*tiny(variant, dtype=dtype, style="released", shards=3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tower_weights_in_the_file_change_nothing(tiny, variant):
    compare_prefill(*tiny(variant, towers="tiny", dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_random_models_equal_transformers(tiny, variant, seed, dtype):
    compare_prefill(*tiny(variant, text_only=True, seed=seed, dtype=dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_hook_point_equals_transformers(tiny, variant):
    model, folder = tiny(variant)
    ids = eight_windows(model)
    want = hf_run(model, ids)
    names = list(want)
    run = gl.load(folder, dtype="float32").run(ids, logits="all", capture=names)
    assert set(names) <= set(run.captured)
    for name in names:
        if name.endswith("router.experts"):
            probs = want[name.replace("experts", "probs")]
            assert_experts_equal_or_tied(run[name], probs, name)
        else:
            assert_tensor_close(run[name], want[name], name)


def test_bidirectional_attention_equals_transformers(tiny):
    compare_prefill(*tiny("31b", text_only=True, use_bidirectional_attention="all"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_last_logits_are_the_last_row_of_all_logits(tiny, variant):
    model, folder = tiny(variant)
    ids = eight_windows(model)
    last = gl.load(folder, dtype="float32").run(ids).logits
    assert last.shape == (1, text_config(model).vocab_size)
    assert_logits_close(last, hf_run(model, ids)["logits"][-1:])


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_very_short_prompts_equal_transformers(tiny, variant, length):
    model, folder = tiny(variant)
    ids = random_ids(length)
    run = gl.load(folder, dtype="float32").run(ids, logits="all")
    assert_logits_close(run.logits, hf_run(model, ids)["logits"])
