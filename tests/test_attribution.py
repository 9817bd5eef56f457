"""Direct logit attribution: terms of the residual stream, and what each adds to a logit."""

from __future__ import annotations

import numpy as np
import pytest

import gemloupe as gl
from gemloupe.analysis import contribution_points, contributions
from tiny_models import VARIANTS, random_ids, text_config

DEMO = "When Mary and Paul went to the garden, Paul gave the ring to"


def load_tiny(tiny, variant: str, **arguments):
    hf_model, folder = tiny(variant)
    ids = random_ids(3 * text_config(hf_model).sliding_window + 2)
    return gl.load(folder, dtype="float32", **arguments), ids


def last_name(model) -> str:
    return f"layers.{model.config.text.num_hidden_layers - 1}.resid_post"


def assert_sums_to_stream(model, ids, split=(), extra=()) -> None:
    run = model.run(ids, capture=[*contribution_points(model, split), *extra])
    total = sum(part.vector for part in contributions(run, model=model, split=split))
    want = run[last_name(model)]
    assert np.abs(total - want).max() <= 1e-4 * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_scalars_of_the_tiny_models_are_not_one(tiny, variant):
    model, _ = load_tiny(tiny, variant)
    scalars = [
        model.weights[f"layers.{layer}.layer_scalar"][0]
        for layer in range(model.config.text.num_hidden_layers)
    ]
    assert np.abs(np.array(scalars) - 1).max() > 0.1
    assert len(set(scalars)) == len(scalars)


@pytest.mark.parametrize("variant", VARIANTS)
def test_embedding_and_contributions_sum_to_the_last_residual_stream(tiny, variant):
    assert_sums_to_stream(*load_tiny(tiny, variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_sum_to_the_last_residual_stream(tiny, variant):
    assert_sums_to_stream(*load_tiny(tiny, variant), split="head")


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_of_heads_that_were_captured_are_used(tiny, variant):
    model, ids = load_tiny(tiny, variant)
    points = contribution_points(model, "head")
    with_results = model.run(ids, capture=[*points, "layers.*.attn.result"])
    from_z = model.run(ids, capture=points)
    parts = zip(
        contributions(with_results, split="head"), contributions(from_z, split="head"), strict=True
    )
    for one, other in parts:
        assert one.name == other.name
        np.testing.assert_allclose(one.vector, other.vector, atol=1e-4)


def test_experts_and_the_dense_block_sum_to_the_last_residual_stream(tiny):
    assert_sums_to_stream(*load_tiny(tiny, "26b"), split="expert")
    assert_sums_to_stream(*load_tiny(tiny, "26b"), split=("head", "expert"))


def test_an_expert_contributes_only_where_it_was_chosen(tiny):
    model, ids = load_tiny(tiny, "26b")
    run = model.run(ids, capture=contribution_points(model, "expert"))
    parts = [p for p in contributions(run, split="expert") if p.kind == "expert"]
    for part in parts:
        chosen = (run[f"layers.{part.layer}.router.experts"] == part.index).any(axis=1)
        assert chosen.any()
        np.testing.assert_array_equal(np.abs(part.vector).max(axis=1) > 0, chosen)


@pytest.mark.parametrize("variant", VARIANTS)
def test_positions_that_were_captured_alone_give_the_same_values(tiny, variant):
    model, ids = load_tiny(tiny, variant)
    run = model.run(ids, capture=contribution_points(model))
    whole = gl.attribution(run, 7, positions=[2, -1])
    alone = gl.attribution(ids, 7, model=model, positions=[2, -1])
    assert whole.positions.tolist() == alone.positions.tolist() == [2, len(ids) - 1]
    np.testing.assert_allclose(alone.values, whole.values, atol=1e-4)


def test_an_edited_stream_shows_as_unexplained():
    model = gl.load("demo:edge", dtype="float32")
    plain = gl.attribution(DEMO, " Mary", model=model)
    edit = {"layers.5.resid_post": gl.edits.add(np.ones(96, np.float32))}
    run = model.run(DEMO, capture=contribution_points(model), edit=edit)
    edited = gl.attribution(run, " Mary")
    assert abs(plain.unexplained[0]) < 1e-4 < 0.01 < abs(edited.unexplained[0])


def test_positions_count_from_the_start_of_a_cache_that_was_continued():
    model = gl.load("demo:dense", dtype="float32")
    ids = model.prepare(DEMO).ids
    whole = gl.attribution(DEMO, " Mary", model=model, positions=[9, 14])
    cache = model.new_cache()
    model.run(ids[:8], cache=cache)
    rest = model.run(ids[8:], cache=cache, capture=contribution_points(model))
    made = gl.attribution(rest, " Mary", positions=[9, 14])
    assert made.tokens == whole.tokens and made.positions.tolist() == [9, 14]
    np.testing.assert_allclose(made.values, whole.values, atol=1e-4)
    with pytest.raises(ValueError, match="position 3 is not there; expected 8 to 14"):
        gl.attribution(rest, " Mary", positions=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_sum_to_the_logit_before_the_soft_cap(tiny, variant):
    model, ids = load_tiny(tiny, variant)
    run = model.run(
        ids, capture=[*contribution_points(model), "logits_raw"], logits="all", softcap=None
    )
    token = int(run.logits[-1].argmax())
    made = gl.attribution(run, token, model=model, positions=None)
    want = run.logits[:, token]
    scale = max(1.0, np.abs(want).max())
    assert np.abs(made.values.sum(axis=0) - want).max() <= 1e-4 * scale
    assert np.abs(made.logit - want).max() <= 1e-4 * scale
    assert np.abs(made.unexplained).max() <= 1e-4 * scale


def test_a_pair_of_tokens_is_the_difference_of_their_attributions():
    model = gl.load("demo:edge", dtype="float32")
    run = model.run(DEMO, capture=contribution_points(model))
    a, b = (gl.attribution(run, token, model=model) for token in (" Mary", " Paul"))
    pair = gl.attribution(run, (" Mary", " Paul"), model=model)
    assert pair.target == "▁Mary − ▁Paul"
    np.testing.assert_allclose(pair.values, a.values - b.values, atol=1e-5)


def test_a_direction_is_read_as_a_row_of_the_unembedding():
    model = gl.load("demo:dense", dtype="float32")
    run = model.run(DEMO, capture=contribution_points(model))
    token = model.tokenizer.id("▁Mary")
    row = model.weights.rows("embed_tokens.weight", [token])[0]
    by_row = gl.attribution(run, row, model=model)
    by_token = gl.attribution(run, token, model=model)
    np.testing.assert_array_equal(by_row.values, by_token.values)
    assert by_row.target == "direction"


def test_an_input_is_run_and_gives_what_its_run_gives():
    model = gl.load("demo:edge", dtype="float32")
    run = model.run(DEMO, capture=contribution_points(model, "head"))
    by_run = gl.attribution(run, " Mary", model=model, split="head")
    by_text = gl.attribution(DEMO, " Mary", model=model, split="head")
    assert by_run.names == by_text.names
    np.testing.assert_allclose(by_run.values, by_text.values, atol=1e-5)


def test_heads_of_a_layer_sum_to_its_attention():
    model = gl.load("demo:moe", dtype="float32")
    run = model.run(DEMO, capture=contribution_points(model, "head"))
    whole = gl.attribution(run, " Mary", model=model)
    heads = gl.attribution(run, " Mary", model=model, split="head")
    np.testing.assert_allclose(heads.by_layer("head")[1:], whole.by_layer("attn")[1:], atol=1e-4)
    assert np.unique(heads.indices[np.array(heads.kinds) == "head"]).tolist() == [0, 1, 2, 3]


def test_sums_by_layer_add_up_and_top_is_ordered_by_size():
    model = gl.load("demo:edge", dtype="float32")
    made = gl.attribution(DEMO, " Mary", model=model)
    np.testing.assert_allclose(made.by_layer().sum(axis=0), made.values.sum(axis=0), rtol=1e-5)
    sizes = [abs(value) for _, value in made.top(8)]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 8
    assert "Mary" in repr(made)


def test_what_is_missing_is_named_with_what_to_capture():
    model = gl.load("demo:edge", dtype="float32")
    run = model.run(DEMO, capture=["embed", last_name(model)])
    with pytest.raises(KeyError, match=r"layers\.0\.attn\.post.*capture=.*layers\.\*\.ffn\.post"):
        gl.attribution(run, " Mary", model=model)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (1024, "token id 1024 is not in the vocabulary; expected 0 to 1023"),
        (" Mary Paul", "is 2 tokens"),
        ((1, 2, 3), "target has 3 tokens; expected one, or a pair"),
        (np.zeros(95), r"target has shape \[95\]; expected \[96\]"),
        (1.5, "token is 1.5; expected an id or a text"),
    ],
)
def test_a_target_that_is_none_is_refused(target, error):
    model = gl.load("demo:edge", dtype="float32")
    with pytest.raises(ValueError, match=error):
        gl.attribution(DEMO, target, model=model)


def test_splits_that_do_not_exist_are_refused():
    model = gl.load("demo:edge", dtype="float32")
    with pytest.raises(ValueError, match="split is 'neuron'; expected 'head' or 'expert'"):
        gl.attribution(DEMO, " Mary", model=model, split="neuron")
    with pytest.raises(ValueError, match="this model has no experts"):
        gl.attribution(DEMO, " Mary", model=model, split="expert")
