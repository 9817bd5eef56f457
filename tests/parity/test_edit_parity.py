"""An edit at a hook point equals the same edit in transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_edits import comparable_points, hf_logits
from parity_checks import assert_logits_close

import gemloupe as gl
from tiny_models import VARIANTS, random_ids, text_config, text_model

pytestmark = pytest.mark.core  # repeated for every instruction set


def a_change(x: np.ndarray) -> np.ndarray:
    """Turns values by a bit, each column differently; masked entries stay masked."""
    factor = 1.0 + 0.3 * np.sin(np.arange(x.shape[-1], dtype=np.float32))
    return (x * factor.astype(np.float32)).astype(np.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_edits_at_every_point_equal_transformers(tiny, variant):
    hf, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    ids = random_ids(3 * text_config(hf).sliding_window + 2)
    plain = model.run(ids, logits="all").logits
    points = comparable_points(model)
    assert len(points) > 60
    for point in points:
        got = model.run(ids, logits="all", edit={point.name: a_change}).logits
        want = hf_logits(hf, ids, point, model.config.text, a_change)
        assert_logits_close(got, want, point.name)
        # router.norm and the like may scale into a softmax: still, something must have happened.
        assert np.abs(got - plain).max() > 1e-6, f"{point.name}: the edit changed nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_edits_of_a_few_positions_equal_transformers(tiny, variant):
    hf, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    ids = random_ids(2 * text_config(hf).sliding_window + 3)
    layer = text_config(hf).num_hidden_layers // 2
    point = gl.hook_points(model)[f"layers.{layer}.resid_post"]
    positions = [1, len(ids) // 2, len(ids) - 1]
    vector = np.random.default_rng(5).normal(size=text_config(hf).hidden_size).astype(np.float32)

    def add(x: np.ndarray) -> np.ndarray:
        x[positions] += vector
        return x

    edit = {point.name: gl.edits.add(vector, positions=[1, len(ids) // 2, -1])}
    got = model.run(ids, logits="all", edit=edit).logits
    assert_logits_close(got, hf_logits(hf, ids, point, model.config.text, add))


def test_forced_experts_equal_transformers_with_its_router_patched(tiny):
    hf, folder = tiny("26b")
    model = gl.load(folder, dtype="float32")
    ids = random_ids(21)
    forced = [7, 0, 4]
    router = text_model(hf).layers[2].router

    def choose(module, _inputs, output):
        probs, _weights, experts = output
        chosen = torch.tensor(forced).expand_as(experts)
        top = probs.gather(1, chosen)
        weights = top / top.sum(-1, keepdim=True) * module.per_expert_scale[chosen]
        return probs, weights, chosen

    handle = router.register_forward_hook(choose)
    with torch.no_grad():
        want = hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    handle.remove()
    run = model.run(
        ids, logits="all", edit={"layers.2.router.experts": gl.edits.force_experts(forced)}
    )
    assert_logits_close(run.logits, want)
    assert run.routing is not None
    assert (run.routing.experts[2] == forced).all()


def test_ablated_experts_equal_transformers_with_masked_logits(tiny):
    hf, folder = tiny("26b")
    model = gl.load(folder, dtype="float32")
    ids = random_ids(21)
    point = gl.hook_points(model)["layers.1.router.logits"]

    def mask(x: np.ndarray) -> np.ndarray:
        x[:, [2, 5]] = -np.inf
        return x

    want = hf_logits(hf, ids, point, model.config.text, mask)
    run = model.run(ids, logits="all", edit={point.name: gl.edits.ablate_experts([2, 5])})
    assert_logits_close(run.logits, want)
    assert run.routing is not None
    assert not np.isin(run.routing.experts[1], [2, 5]).any()


@pytest.mark.parametrize("variant", ["12b", "26b", "31b"])
def test_where_values_are_keys_an_edited_value_leaves_the_keys(tiny, variant):
    hf, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    ids = random_ids(19)
    layer = next(i for i, spec in enumerate(model.config.text.layers) if spec.values_are_keys)
    point = gl.hook_points(model)[f"layers.{layer}.attn.v"]
    plain = model.run(ids)
    run = model.run(ids, logits="all", edit={point.name: a_change})
    assert plain.cache is not None and run.cache is not None
    assert plain.cache.layers[layer].storage == "derived"
    assert run.cache.layers[layer].storage == "separate"
    np.testing.assert_array_equal(run.cache.layers[layer].keys, plain.cache.layers[layer].keys)
    assert_logits_close(run.logits, hf_logits(hf, ids, point, model.config.text, a_change))
