"""The logit lens: every layer's prediction equals what unembedding it by hand gives."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import gemloupe as gl
from gemloupe.analysis import distributions
from tiny_models import VARIANTS, random_ids, text_config

DEMO = "When Mary and Paul went to the garden, Paul gave the ring to"


def unembed(model, x: np.ndarray) -> np.ndarray:
    """The head in float64: norm, tied unembedding, soft-cap."""
    x = x.astype(np.float64)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + model.config.text.rms_norm_eps)
    logits = (x * model.weights["norm.weight"]) @ model.weights["embed_tokens.weight"].T
    cap = model.config.text.final_logit_softcapping
    return cap * np.tanh(logits / cap)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def edge():
    return gl.load("demo:edge", dtype="float32")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_figure_equals_the_one_computed_by_hand(tiny, variant):
    hf_model, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    ids = random_ids(2 * text_config(hf_model).sliding_window + 3)
    run = model.run(ids, capture=["embed", "layers.*.resid_post"], logits="all")
    lens = gl.logit_lens(run, model=model, top=7)
    names = ["embed", *(f"layers.{i}.resid_post" for i in lens.layers[1:])]
    logits = np.stack([unembed(model, run[name]) for name in names])
    log_probs = log_softmax(logits)
    targets = logits[-1].argmax(axis=-1)
    picked = np.broadcast_to(targets[:, None], (len(names), len(ids), 1))

    assert lens.layers.tolist() == list(range(-1, model.config.text.num_hidden_layers))
    np.testing.assert_array_equal(lens.target_ids, targets)
    own = np.take_along_axis(logits, picked, axis=2)
    np.testing.assert_allclose(lens.logits, own[..., 0], atol=1e-4)
    own_log_probs = np.take_along_axis(log_probs, picked, axis=2)[..., 0]
    np.testing.assert_allclose(lens.probs, np.exp(own_log_probs), atol=1e-4)
    kl = (np.exp(log_probs[-1]) * (log_probs[-1] - log_probs)).sum(axis=-1)
    np.testing.assert_allclose(lens.kl, kl, atol=1e-4)
    np.testing.assert_allclose(
        lens.entropy, -(np.exp(log_probs) * log_probs).sum(axis=-1), atol=1e-4
    )
    # Ranks may differ only among logits that are equal up to rounding.
    low, high = (logits > own + 1e-4).sum(axis=-1), (logits > own - 1e-4).sum(axis=-1)
    assert ((low <= lens.ranks) & (lens.ranks <= high)).all()
    best = np.sort(np.exp(log_probs), axis=-1)[..., ::-1][..., :7]
    np.testing.assert_allclose(lens.top_probs, best, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_layer_is_the_models_own_prediction(tiny, variant):
    hf_model, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    ids = random_ids(text_config(hf_model).sliding_window + 3)
    run = model.run(ids, capture="layers.*.resid_post", logits="all")
    lens = gl.logit_lens(run, model=model, top=1)
    np.testing.assert_array_equal(lens.top_ids[-1, :, 0], run.logits.argmax(axis=1))
    np.testing.assert_allclose(lens.logits[-1], run.logits.max(axis=1), atol=1e-5)
    assert (lens.kl[-1] == 0).all() and (lens.ranks[-1] == 0).all()


def test_blocks_of_any_size_give_the_same_figures(edge, monkeypatch):
    whole = gl.logit_lens(DEMO, model=edge)
    monkeypatch.setattr(logit_lens_module(), "_BLOCK_LOGITS", 1)
    blocks = gl.logit_lens(DEMO, model=edge)
    np.testing.assert_array_equal(blocks.top_ids, whole.top_ids)
    for name in ("logits", "probs", "kl", "entropy"):
        np.testing.assert_allclose(getattr(blocks, name), getattr(whole, name), atol=1e-5)


def logit_lens_module():
    return sys.modules["gemloupe.analysis.logit_lens"]  # The package's name is the function.


def test_no_array_of_layers_by_positions_by_vocabulary_is_held(edge, monkeypatch):
    monkeypatch.setattr(logit_lens_module(), "_BLOCK_LOGITS", 1 << 14)
    rows: list[int] = []
    original = type(edge).unembed

    def counted(self, x, **arguments):
        rows.append(len(x))
        return original(self, x, **arguments)

    monkeypatch.setattr(type(edge), "unembed", counted)
    lens = gl.logit_lens(DEMO, model=edge)
    assert sum(rows) == (len(lens.layers) + 1) * len(lens.positions)
    assert max(rows) * edge.config.text.vocab_size <= 1 << 14


def test_positions_and_layers_choose_cells_of_the_whole_lens(edge):
    run = edge.run(DEMO, capture="layers.*.resid_post")
    whole = gl.logit_lens(run, model=edge)
    part = gl.logit_lens(run, model=edge, positions=[3, -1], layers=[2, -1])
    assert part.layers.tolist() == [2, 9] and part.positions.tolist() == [3, len(run.prompt) - 1]
    np.testing.assert_array_equal(part.top_ids, whole.top_ids[[2, 9]][:, part.positions])
    np.testing.assert_allclose(part.kl, whole.kl[[2, 9]][:, part.positions], atol=1e-5)


def test_positions_that_were_captured_alone_give_the_same_cells(edge):
    whole = gl.logit_lens(DEMO, model=edge, positions=[3, 9])
    run = edge.run(DEMO, capture={"layers.*.resid_post": gl.at([3, 9])})
    alone = gl.logit_lens(run)
    assert alone.positions.tolist() == [3, 9] and alone.tokens == whole.tokens
    np.testing.assert_array_equal(alone.top_ids, whole.top_ids)
    np.testing.assert_allclose(alone.kl, whole.kl, atol=1e-5)


def test_next_follows_the_tokens_of_the_prompt(edge):
    lens = gl.logit_lens(DEMO, model=edge, targets="next")
    ids = edge.prepare(DEMO).ids
    assert lens.target_ids.tolist() == [*ids[1:].tolist(), -1]
    assert np.isnan(lens.probs[:, -1]).all() and (lens.ranks[:, -1] == -1).all()
    assert lens.target_tokens[-1] == "" and lens.target_tokens[0] == "When"


def test_a_token_is_followed_by_text_by_id_or_by_position(edge):
    mary = edge.tokenizer.id("▁Mary")
    by_text = gl.logit_lens(DEMO, model=edge, targets=" Mary")
    by_id = gl.logit_lens(DEMO, model=edge, targets=mary)
    by_position = gl.logit_lens(DEMO, model=edge, targets=[mary] * len(by_id.positions))
    for lens in (by_id, by_position):
        np.testing.assert_array_equal(lens.probs, by_text.probs)
    assert by_text.probs[-1, -1] > 0.3


def test_a_mapping_of_activations_is_enough(edge):
    run = edge.run(DEMO, capture="layers.*.resid_post")
    by_run = gl.logit_lens(run, model=edge)
    by_mapping = gl.logit_lens(dict(run.captured), model=edge)
    np.testing.assert_array_equal(by_mapping.top_ids, by_run.top_ids)


def test_without_the_soft_cap_the_logits_are_the_raw_ones(edge):
    run = edge.run(DEMO, capture="layers.*.resid_post", logits="all", softcap=None)
    lens = gl.logit_lens(run, model=edge, softcap=False)
    np.testing.assert_allclose(lens.logits[-1], run.logits.max(axis=1), atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("size", [7, 512, 5000, 5120])
def test_top_ids_are_those_of_a_full_sort(size, k):
    rng = np.random.default_rng(size + k)
    logits = rng.integers(0, 40 * size, (6, size)).astype(np.float32)
    want = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(distributions.top_ids(logits, k), want)


def test_equal_logits_come_in_order_of_their_ids():
    np.testing.assert_array_equal(distributions.top_ids(np.zeros((2, 5000)), 3), [[0, 1, 2]] * 2)


def test_missing_layers_are_named_with_what_to_capture(edge):
    run = edge.run(DEMO, capture="layers.2.resid_post")
    with pytest.raises(KeyError, match=r"layers\.9\.resid_post.*capture="):
        gl.logit_lens(run, model=edge)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"positions": []}, r"position \[\] .*|positions \[\] choose none"),
        ({"positions": [True]}, "positions is a boolean array of shape"),
        ({"layers": 10}, "layer 10 is outside; expected 0 to 9"),
        ({"targets": [1, 2]}, r"targets has shape \[2\]; expected \[15\]"),
        ({"targets": 5000}, "token id 5000 is not in the vocabulary"),
        ({"top": 0}, "top is 0; expected 1 or more"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(edge, arguments, error):
    with pytest.raises(ValueError, match=error):
        gl.logit_lens(DEMO, model=edge, **arguments)


def test_activations_of_a_wrong_width_are_refused(edge):
    with pytest.raises(ValueError, match=r"has shape \[4, 95\]; expected \[T, 96\]"):
        gl.logit_lens({"layers.9.resid_post": np.zeros((4, 95))}, model=edge)


def test_positions_of_a_mapping_are_refused(edge):
    with pytest.raises(ValueError, match="a mapping of arrays does not say which it holds"):
        gl.logit_lens({"layers.9.resid_post": np.zeros((4, 96))}, model=edge, positions=2)


def test_a_mapping_without_a_model_says_what_to_pass():
    with pytest.raises(ValueError, match="logit_lens has no model: got dict and model=None"):
        gl.logit_lens({})
