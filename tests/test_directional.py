"""Central differences: equal to torch's gradients, exact where the model is linear."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gemloupe as gl
from tiny_models import VARIANTS, random_ids, text_config, text_model

DEMO = "When Mary and Paul went to the garden, Paul gave the ring to"
POINT = "layers.3.resid_post"


@pytest.fixture(scope="module")
def edge():
    return gl.load("demo:edge", dtype="float32")


def torch_derivative(hf_model, ids, layer: int, v: np.ndarray) -> np.ndarray:
    """d logits[-1] / dh at h = 0 where h v is added to every row of a layer's output, float64."""
    model = hf_model.double()
    direction = torch.from_numpy(v.astype(np.float64))

    def logits(h: torch.Tensor) -> torch.Tensor:
        def add(_module, _inputs, output):
            if isinstance(output, tuple):
                return (output[0] + h * direction, *output[1:])
            return output + h * direction

        handle = text_model(model).layers[layer].register_forward_hook(add)
        try:
            return model(input_ids=torch.tensor([ids])).logits[0, -1]
        finally:
            handle.remove()

    try:
        zero = torch.zeros((), dtype=torch.float64)
        _, derivative = torch.autograd.functional.jvp(logits, zero, torch.ones_like(zero))
        return derivative.numpy()
    finally:
        hf_model.float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives_equal_torchs_within_the_stated_error(tiny, variant):
    hf_model, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    ids = random_ids(text_config(hf_model).sliding_window + 3)
    v = np.random.default_rng(1).standard_normal(model.config.text.hidden_size).astype(np.float32)
    made = gl.directional(ids, POINT, v, model=model)
    want = torch_derivative(hf_model, ids, 3, v)
    largest = np.abs(want).max()
    if variant == "26b":  # Experts change within the step, and the error says so.
        assert made.error.max() > 0.1 * largest
        made = gl.directional(ids, POINT, v, model=model, step=made.step / 8)
    assert np.abs(made.value - want).max() <= 0.001 * largest
    assert made.error.max() <= 0.003 * largest


def test_a_metric_is_differentiated_as_its_logits_are(edge):
    v = np.random.default_rng(0).standard_normal(96)
    mary, paul = (edge.tokenizer.id(name) for name in ("▁Mary", "▁Paul"))
    logits = gl.directional(DEMO, POINT, v, model=edge)
    pair = gl.directional(DEMO, POINT, v, model=edge, metric=(" Mary", " Paul"))
    assert pair.value.shape == () and pair.step == logits.step
    assert float(pair.value) == pytest.approx(logits.value[mary] - logits.value[paul], abs=1e-4)


def test_twice_the_direction_is_twice_the_derivative(edge):
    v = np.random.default_rng(0).standard_normal(96)
    one, two = (gl.directional(DEMO, POINT, scale * v, model=edge) for scale in (1, 2))
    np.testing.assert_allclose(two.value, 2 * one.value, atol=0.01 * np.abs(one.value).max())
    assert two.step == pytest.approx(one.step / 2)


def test_positions_that_cannot_reach_the_last_logits_have_no_derivative(edge):
    v = np.ones(96)
    first = gl.directional(DEMO, "layers.9.resid_post", v, model=edge, positions=[0, 5])
    assert (first.value == 0).all() and (first.error == 0).all()
    last = gl.directional(DEMO, "layers.9.resid_post", v, model=edge, positions=-1)
    assert np.abs(last.value).max() > 0


def test_a_run_stands_for_its_prompt(edge):
    v = np.ones(96)
    by_run = gl.directional(edge.run(DEMO), POINT, v, model=edge)
    by_text = gl.directional(DEMO, POINT, v, model=edge)
    np.testing.assert_array_equal(by_run.value, by_text.value)


def test_a_step_that_is_too_large_shows_in_the_error(edge):
    v = np.random.default_rng(0).standard_normal(96)
    good = gl.directional(DEMO, POINT, v, model=edge)
    coarse = gl.directional(DEMO, POINT, v, model=edge, step=50 * good.step)
    assert coarse.error.max() > 10 * good.error.max()


def test_a_run_that_continued_a_cache_is_refused(edge):
    cache = edge.new_cache()
    edge.run(DEMO, cache=cache)
    continued = edge.run([5, 6, 7], cache=cache)
    with pytest.raises(ValueError, match="begins at position 15, after a cache"):
        gl.directional(continued, POINT, np.ones(96))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"v": np.ones(95)}, r"v has shape \[95\]; expected \[96\]"),
        ({"v": np.zeros(96)}, "v has norm 0; expected a finite one above 0"),
        ({"v": np.full(96, np.nan)}, "v has norm nan"),
        ({"step": 0.0}, "step is 0.0; expected a number above 0"),
        ({"positions": 15}, "position 15 is not there; expected 0 to 14"),
        ({"name": "layers.3.attn.pattern"}, "expected one row for each position"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(edge, arguments, error):
    given = {"name": POINT, "v": np.ones(96), **arguments}
    with pytest.raises(ValueError, match=error):
        gl.directional(DEMO, given.pop("name"), given.pop("v"), model=edge, **given)
