"""Induction scores: equal to reading the patterns by hand, and high where heads were trained."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import gemloupe as gl
from gemloupe.analysis import induction_scores

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts/demo_models"))
import corpus


@pytest.fixture(scope="module")
def edge():
    return gl.load("demo:edge", dtype="float32")


@pytest.mark.parametrize(
    ("demo", "layer", "head"), [("edge", 4, 1), ("moe", 2, 2), ("dense", 1, 2)]
)
def test_the_induction_heads_of_the_demo_models_are_found(demo, layer, head):
    model = gl.load(f"demo:{demo}", dtype="float32")
    words = [model.tokenizer.id("▁" + word) for word in corpus.WORDS]
    scores = induction_scores(model, 24, ids=[word for word in words if word is not None])
    assert scores.top(1)[0][:2] == (layer, head)
    assert scores.values[layer, head] > 0.75
    assert scores.control[layer, head] < 0.05


def test_scores_are_means_of_the_pattern_at_the_token_after_the_previous_copy(edge):
    length, repeats = 6, 3
    scores = induction_scores(edge, length, repeats, seed=4, sequences=1)
    runs = recorded_runs(edge, length, repeats, seed=4)
    (ids,) = runs
    run = edge.run(ids, capture="layers.*.attn.pattern")
    queries = range(1 + length, 1 + length * repeats)
    for layer in range(10):
        pattern = run[f"layers.{layer}.attn.pattern"]
        want = np.mean([pattern[:, t, t - length + 1] for t in queries], axis=0)
        np.testing.assert_allclose(scores.values[layer], want, atol=1e-6)


def recorded_runs(model, *arguments, **named) -> list[list[int]]:
    """The inputs that induction_scores runs."""
    seen: list[list[int]] = []

    class Recorder:
        config, tokenizer = model.config, model.tokenizer

        def run(self, ids, **arguments):
            seen.append([int(i) for i in ids])
            return model.run(ids, **arguments)

    induction_scores(Recorder(), *arguments, sequences=1, **named)
    return seen


def test_inputs_are_bos_then_distinct_words_repeated(edge):
    (ids,) = recorded_runs(edge, 10, 3, seed=1)
    assert ids[0] == edge.config.bos_token_id and len(ids) == 31
    assert ids[1:11] == ids[11:21] == ids[21:31]
    assert len(set(ids[1:11])) == 10
    for piece in edge.tokenizer.tokens(ids[1:]):
        assert piece.startswith("▁") and piece[1:].isalpha()
    assert set(recorded_runs(edge, 3, 2, ids=[70, 71, 72])[0][1:]) == {70, 71, 72}


def test_a_seed_gives_the_same_scores_and_another_seed_others(edge):
    one, same, other = (induction_scores(edge, 8, seed=s, sequences=2) for s in (3, 3, 5))
    np.testing.assert_array_equal(one.values, same.values)
    assert (one.values != other.values).any()


def test_layers_read_one_by_one_give_the_same_scores(edge, monkeypatch):
    whole = induction_scores(edge, 8, sequences=2)
    monkeypatch.setattr(sys.modules["gemloupe.analysis.induction"], "_BLOCK_BYTES", 1)
    np.testing.assert_allclose(
        induction_scores(edge, 8, sequences=2).values, whole.values, atol=1e-6
    )
    captures: list[list[str]] = []
    original = type(edge).run

    def counted(self, x, **arguments):
        captures.append(list(arguments["capture"]))
        return original(self, x, **arguments)

    monkeypatch.setattr(type(edge), "run", counted)
    induction_scores(edge, 8, sequences=1)
    assert captures == [[f"layers.{layer}.attn.pattern"] for layer in range(10)]


def test_a_window_shorter_than_the_repetition_sees_nothing(edge):
    scores = induction_scores(edge, 60, sequences=1)
    sliding = [i for i, spec in enumerate(edge.config.text.layers) if spec.window]
    assert (scores.values[sliding] == 0).all()
    assert scores.values[4].max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"length": 1}, "length is 1; expected a number, 2 or more"),
        ({"repeats": 1}, "repeats is 1; expected a number, 2 or more"),
        ({"sequences": 0}, "sequences is 0; expected a number, 1 or more"),
        ({"length": 900, "repeats": 10}, "makes 9001 tokens; the model takes 8192"),
        ({"length": 1023}, r"length is 1023; expected at most \d+, the tokens to choose"),
        ({"ids": [5, 5000]}, "token id 5000 is not in the vocabulary"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(edge, arguments, error):
    with pytest.raises(ValueError, match=error):
        induction_scores(edge, **arguments)
