"""One prompt with one image under several budgets."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import numpy as np
import pytest

import gemloupe as gl
from gemloupe.analysis.distributions import kl_divergence
from tiny_models import save_tiny_tokenizer

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def model(tiny: Callable) -> gl.Model:
    vision = {"position_embedding_size": 192}
    folder = tiny("e2b", towers="tiny", media_ids=True, vision=vision)[1]
    save_tiny_tokenizer(folder)
    return gl.load(folder, dtype="float32")


def _picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def test_a_sweep_is_a_run_of_each_budget(model: gl.Model) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}]
    sweep = gl.budget_sweep(model, chat, _picture(), budgets=(70, 140, 280), metric=70)
    for index, budget in enumerate(sweep.budgets):
        run = model.run(chat, images=_picture(), max_soft_tokens=budget)
        assert sweep.soft_tokens[index] == len(run.media[0].positions) <= budget
        np.testing.assert_array_equal(sweep.logits[index], run.logits[0])
        best = int(run.logits[0].argmax())
        assert sweep.top[index] == model.tokenizer.tokens([best])[0]
    chances = np.exp(sweep.logits - np.log(np.exp(sweep.logits).sum(-1, keepdims=True)))
    np.testing.assert_allclose(sweep.probabilities, chances.max(-1), rtol=1e-5)
    assert sweep.values is not None
    np.testing.assert_allclose(sweep.values, chances[:, 70], rtol=1e-5)
    expected = kl_divergence(sweep.logits[-1:], sweep.logits[:1])[0]
    assert sweep.kl[-1] == 0 and sweep.kl[0] == pytest.approx(expected) and expected > 0
    table = sweep.table()
    assert table["budget"] == [70, 140, 280] and table[sweep.metric] == sweep.values.tolist()
    assert (sweep.encode_seconds > 0).all() and (sweep.read_seconds > 0).all()
    assert "soft tokens" in repr(sweep) and "<table>" in sweep._repr_html_()


def test_a_sweep_is_drawn_with_its_costs(model: gl.Model) -> None:
    sweep = gl.budget_sweep(model, "<|image|> red?", _picture(), budgets=(70, 140))
    ax = sweep.plot()
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), sweep.kl)
    assert ax.get_ylabel() == "KL from the largest budget, nats"
    bars = ax.figure.axes[-1].patches
    assert [bar.get_height() for bar in bars[2:4]] == sweep.read_seconds.tolist()
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == [f"{b}\n({n})" for b, n in zip((70, 140), sweep.soft_tokens, strict=True)]


@pytest.mark.parametrize(
    ("x", "budgets", "expected"),
    [
        ("<|image|>", (70, 71), "budgets: max_soft_tokens is 71; expected one of 70, 140"),
        ("<|image|>", (140, 70), r"budgets are \[140, 70\]; expected at least one, ascending"),
        ("<|image|>", (), "expected at least one"),
        ("words", (70,), "the prompt has 0 image placeholders"),
        ("<|image|><|image|>", (70,), "2 image placeholders .*, but images= has 1"),
    ],
)
def test_wrong_sweeps_are_refused_in_words(
    model: gl.Model, x: str, budgets: tuple[int, ...], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        gl.budget_sweep(model, x, _picture(), budgets=budgets)
