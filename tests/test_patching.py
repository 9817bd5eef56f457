"""Activation patching: single cells against transformers, and what must hold for whole grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gemloupe as gl
from tiny_models import VARIANTS, random_ids, text_config, text_model

CLEAN = "When Mary and Paul went to the garden, Paul gave the ring to"
CORRUPTED = "When Mary and Paul went to the garden, Mary gave the ring to"
POINTS = ("resid_pre", "attn.norm", "attn.z", "attn.out", "resid_mid", "ffn.post", "resid_post")


def pair_of_inputs(hf_model, differ_at: int) -> tuple[list[int], list[int]]:
    clean = random_ids(text_config(hf_model).sliding_window + 4)
    corrupted = list(clean)
    corrupted[differ_at] = (clean[differ_at] + 1) % text_config(hf_model).vocab_size
    return clean, corrupted


def hf_patched(hf_model, ids, layer: int, row: int, value: np.ndarray) -> np.ndarray:
    """transformers' last logits with one row of a decoder layer's output replaced."""

    def replace(_module, _inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, row] = torch.from_numpy(value.copy())
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = text_model(hf_model).layers[layer].register_forward_hook(replace)
    try:
        return hf_model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def edge():
    return gl.load("demo:edge", dtype="float32")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cell_equals_transformers_with_a_hook(tiny, variant):
    hf_model, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    clean, corrupted = pair_of_inputs(hf_model, 2)
    run = model.run(clean, capture="layers.*.resid_post")
    rows, layers = [0, 2, len(clean) - 1], [0, 3, model.config.text.num_hidden_layers - 1]
    grid = gl.patching_grid(model, clean, corrupted, (5, 9), layers=layers, positions=rows)
    for i, layer in enumerate(layers):
        for j, row in enumerate(rows):
            value = run[f"layers.{layer}.resid_post"][row]
            logits = hf_patched(hf_model, corrupted, layer, row, value)
            assert abs(grid.values[i, j] - (logits[5] - logits[9])) <= 2e-4, (layer, row)


@pytest.mark.parametrize("variant", VARIANTS)
def test_skipped_cells_computed_by_force_equal_the_corrupted_run(tiny, variant):
    hf_model, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    clean, corrupted = pair_of_inputs(hf_model, 1)
    skipped_any = []
    for point in POINTS:
        skipped = gl.patching_grid(model, clean, corrupted, (5, 9), point)
        forced = gl.patching_grid(model, clean, corrupted, (5, 9), point, skip_dead=False)
        assert forced.computed.all()
        dead = ~skipped.computed
        assert np.abs(forced.values[dead] - forced.corrupted).max(initial=0.0) <= 1e-5
        assert (skipped.values[dead] == np.float32(skipped.corrupted)).all()
        np.testing.assert_allclose(
            skipped.values[skipped.computed], forced.values[skipped.computed], atol=1e-5
        )
        skipped_any.append(dead.any())
    assert all(skipped_any) == (model.config.text.layers[-1].kv_source != len(forced.layers) - 1)
    assert skipped_any[-1]  # The last layer's output reaches no keys in any variant.


@pytest.mark.parametrize("variant", ["e2b", "e4b"])
def test_layers_that_share_keys_are_skipped_but_for_the_last_position(tiny, variant):
    hf_model, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    first_sharing = min(i for i, spec in enumerate(model.config.text.layers) if spec.kv_source != i)
    clean, corrupted = pair_of_inputs(hf_model, 1)
    before = gl.patching_grid(model, clean, corrupted, 5, "resid_pre").computed
    after = gl.patching_grid(model, clean, corrupted, 5, "resid_post").computed
    assert before[:first_sharing].all() and not before[first_sharing:, :-1].any()
    assert after[: first_sharing - 1].all() and not after[first_sharing - 1 :, :-1].any()
    assert before[:, -1].all() and after[:, -1].all()


@pytest.mark.parametrize("variant", ["12b", "26b", "31b"])
def test_the_stream_where_the_inputs_differ_restores_the_clean_run(tiny, variant):
    hf_model, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    clean, corrupted = pair_of_inputs(hf_model, 4)
    grid = gl.patching_grid(model, clean, corrupted, (5, 9), "resid_pre", layers=0)
    np.testing.assert_allclose(grid.restored[0, 4], 1.0, atol=1e-3)
    np.testing.assert_allclose(np.delete(grid.restored[0], 4), 0.0, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_layer_at_the_last_position_is_the_clean_prediction(tiny, variant):
    hf_model, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    clean, corrupted = pair_of_inputs(hf_model, 3)
    grid = gl.patching_grid(model, clean, corrupted, "kl", layers=-1, positions=-1)
    assert grid.corrupted > 1e-3 and grid.clean == 0.0
    assert abs(grid.values[0, 0]) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_clean_embedding_at_all_positions_gives_the_clean_logits(tiny, variant):
    hf_model, folder = tiny(variant)
    model = gl.load(folder, dtype="float32")
    clean, corrupted = pair_of_inputs(hf_model, 2)
    names = ["embed"]
    if model.config.text.hidden_size_per_layer_input:
        names.append("per_layer_inputs")
    run = model.run(clean, capture=names)
    patched = model.run(corrupted, edit={name: gl.edits.patch(run) for name in names})
    np.testing.assert_allclose(patched.logits, run.logits, atol=1e-5)


def test_patching_a_run_into_itself_changes_nothing(edge):
    grid = gl.patching_grid(edge, CLEAN, CLEAN, (" Mary", " Paul"))
    np.testing.assert_allclose(grid.values, grid.clean, atol=1e-4)
    assert np.isnan(grid.restored).all()


def test_metrics_are_taken_of_the_same_runs(edge):
    layers, positions = [2, 7], [4, -1]
    mary, paul = (edge.tokenizer.id(name) for name in ("▁Mary", "▁Paul"))

    def difference(logits: np.ndarray) -> float:
        assert logits.shape == (edge.config.text.vocab_size,)
        return logits[mary] - logits[paul]

    def probability(logits: np.ndarray) -> float:
        shifted = np.exp(logits - logits.max())
        return shifted[mary] / shifted.sum()

    def grid(metric):
        made = gl.patching_grid(edge, CLEAN, CORRUPTED, metric, layers=layers, positions=positions)
        return made.values

    np.testing.assert_allclose(grid((" Mary", " Paul")), grid(difference), atol=1e-6)
    np.testing.assert_allclose(grid(mary), grid(probability), atol=1e-6)
    assert (grid("kl") >= 0).all()


def test_several_points_give_a_grid_each(edge):
    grids = gl.patching_grid(
        edge, CLEAN, CORRUPTED, (" Mary", " Paul"), ["resid_post", "attn.out"], layers=[3, 6]
    )
    assert [grid.point for grid in grids] == ["resid_post", "attn.out"]
    alone = gl.patching_grid(edge, CLEAN, CORRUPTED, (" Mary", " Paul"), "attn.out", layers=[3, 6])
    np.testing.assert_allclose(grids[1].values, alone.values, atol=1e-6)
    assert "attn.out" in repr(alone) and alone.tokens[1] == "When"


def test_an_interrupted_grid_leaves_the_model_as_it_was(edge):
    before = edge.run(CLEAN).logits
    calls = []

    def stop(logits: np.ndarray) -> float:
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return float(logits[0])

    with pytest.raises(KeyboardInterrupt):
        gl.patching_grid(edge, CLEAN, CORRUPTED, stop)
    np.testing.assert_array_equal(edge.run(CLEAN).logits, before)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"corrupted": "When Mary"}, "clean has 15 tokens and corrupted 3; expected the same"),
        ({"clean": [CLEAN, CLEAN]}, "got a batch of 2; expected one input"),
        ({"metric": (1, 2, 3)}, "metric has 3 tokens; expected two"),
        ({"metric": " Mary Paul"}, "is 2 tokens"),
        ({"metric": None}, "metric is None; expected a pair of tokens"),
        ({"metric": lambda logits: logits}, r"metric returned shape \[1024\]"),
        ({"positions": 15}, "position 15 is not there; expected 0 to 14"),
        ({"layers": [-11]}, "layer -11 is outside; expected 0 to 9"),
        ({"points": "attn.pattern"}, r"has shape \[N, T, S\]; expected one row"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(edge, arguments, error):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": 1, **arguments}
    with pytest.raises(ValueError, match=error):
        gl.patching_grid(edge, **given)


def test_a_point_that_does_not_exist_is_a_key_error_with_close_matches(edge):
    with pytest.raises(KeyError, match=r"layers\.0\.resid_pots.*layers\.0\.resid_post"):
        gl.patching_grid(edge, CLEAN, CORRUPTED, 1, "resid_pots")
    with pytest.raises(KeyError, match=r"layers\.5\.attn\.k"):
        gl.patching_grid(edge, CLEAN, CORRUPTED, 1, "attn.k")
