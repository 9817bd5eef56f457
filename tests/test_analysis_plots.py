"""Plots of analyses: what is drawn, labelled and hatched, readable on light and dark pages."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import colors, pyplot
from matplotlib.patches import Rectangle

import gemloupe as gl
from gemloupe.analysis import InductionScores, PatchingGrid

DEMO = "When Mary and Paul went to the garden, Paul gave the ring to"


@pytest.fixture(scope="module")
def edge():
    return gl.load("demo:edge", dtype="float32")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def luminance(colour) -> float:
    channels = np.array(colors.to_rgb(colour))
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def assert_readable(ax) -> None:
    """Text and lines have a contrast of 3 against white and against black."""
    assert ax.figure.patch.get_alpha() == 0 and ax.patch.get_alpha() == 0
    texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()]
    legend = ax.get_legend()
    texts += legend.get_texts() if legend is not None else []
    for text in texts:
        for page in ("white", "#111111"):
            assert contrast(text.get_color(), page) >= 3, text.get_text()


def tick_texts(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_lens_writes_each_layers_prediction_into_its_cell(edge):
    lens = gl.logit_lens(DEMO, model=edge)
    ax = lens.plot()
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): t for t in ax.texts}
    assert written[0, 14].get_text() == "·Mary"  # The last layer is on top.
    assert len(written) == 10 * 15
    assert tick_texts(ax.xaxis)[:3] == ["<bos>", "When", "·Mary"]
    assert tick_texts(ax.yaxis) == [str(layer) for layer in range(10)][::-1]
    assert_readable(ax)


@pytest.mark.parametrize("colour", ["probability", "target", "rank", "kl", "entropy"])
def test_cell_texts_stand_out_from_every_colour_of_the_lens(edge, colour):
    ax = gl.plot.lens(gl.logit_lens(DEMO, model=edge, positions=slice(0, 15)), colour)
    image = ax.images[0]
    values = image.get_array()
    for text in ax.texts:
        x, y = (round(place) for place in text.get_position())
        assert contrast(text.get_color(), image.cmap(image.norm(values[y, x]))[:3]) >= 3


def test_an_attribution_of_one_position_has_a_bar_for_each_component(edge):
    made = gl.attribution(DEMO, (" Mary", " Paul"), model=edge)
    ax = made.plot()
    assert len([p for p in ax.patches if isinstance(p, Rectangle)]) == len(made.names) == 31
    assert sorted(bar.get_height() for bar in ax.patches) == pytest.approx(
        sorted(made.values[:, 0].tolist())
    )
    assert "·Mary − ·Paul" in ax.get_title()
    assert_readable(ax)


def test_split_attributions_show_the_largest_components_by_name(edge):
    made = gl.attribution(DEMO, " Mary", model=edge, split="head")
    ax = made.plot()
    names = [name.removeprefix("layers.") for name, _ in made.top(24)]
    assert tick_texts(ax.yaxis) == names[::-1]
    assert_readable(ax)


def test_attributions_of_several_positions_are_a_table_of_layers_by_tokens(edge):
    made = gl.attribution(DEMO, " Mary", model=edge, positions=None)
    ax = made.plot()
    np.testing.assert_allclose(ax.images[0].get_array(), made.by_layer()[::-1])
    assert tick_texts(ax.yaxis)[-1] == "embed"
    assert_readable(ax)


def patching_grid() -> PatchingGrid:
    computed = np.array([[True, True, True], [False, False, True], [False, True, True]])
    values = np.where(computed, 1.5, -1.0).astype(np.float32)
    tokens, corrupted = ["<bos>", "▁Paul", "▁to"], ["<bos>", "▁Mary", "▁to"]
    return PatchingGrid(
        point="resid_post", metric="logit ▁a − ▁b", values=values, computed=computed, clean=2.0,
        corrupted=-1.0, layers=np.array([3, 4, 5]), positions=np.arange(3), tokens=tokens,
        corrupted_tokens=corrupted,
    )  # fmt: skip


def test_cells_that_were_not_computed_are_hatched_and_have_no_colour():
    ax = patching_grid().plot()
    hatched = {
        (round(p.get_y() + 0.5), round(p.get_x() + 0.5) + column)
        for p in ax.patches
        for column in range(round(p.get_width()))
        if p.get_hatch()
    }
    assert hatched == {(0, 0), (1, 0), (1, 1)}  # The last layer is on top.
    assert {tuple(cell) for cell in np.argwhere(np.ma.getmaskarray(ax.images[0].get_array()))} == (
        hatched
    )
    assert tick_texts(ax.xaxis) == ["<bos>", "·Paul/·Mary", "·to"]
    assert tick_texts(ax.yaxis) == ["5", "4", "3"]
    assert_readable(ax)


@pytest.mark.parametrize("show", ["restored", "values"])
def test_the_corrupted_run_has_the_middle_colour_of_a_patching_grid(show):
    grid = patching_grid()
    image = gl.plot.patching(grid, show).images[0]
    middle = 0.0 if show == "restored" else grid.corrupted
    assert image.norm(middle) == pytest.approx(0.5)


def test_heads_that_attend_nowhere_leave_cells_empty():
    tokens = ["<bos>", "▁a", "▁b"]
    pattern = np.array([[[1, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75]]], np.float32)
    ax = gl.plot.attention(FakeRun(tokens, {"layers.2.attn.pattern": pattern}), 2, 0)
    empty = np.ma.getmaskarray(ax.images[0].get_array())
    np.testing.assert_array_equal(empty, pattern[0] == 0)
    assert tick_texts(ax.xaxis) == tick_texts(ax.yaxis) == ["<bos>", "·a", "·b"]
    assert ax.get_title() == "layer 2, head 0"
    assert_readable(ax)


def test_a_head_that_a_layer_lacks_is_refused():
    run = FakeRun(["a"], {"layers.2.attn.pattern": np.ones((4, 1, 1), np.float32)})
    with pytest.raises(ValueError, match="head is 4; expected 0 to 3"):
        gl.plot.attention(run, 2, 4)


class FakeRun:
    """As much of a run as the attention plot reads."""

    cache = None

    def __init__(self, tokens, captured) -> None:
        self.prompt = type("Prompt", (), {"tokens": tokens})
        self.captured = captured

    def __getitem__(self, name):
        return self.captured[name]


def test_induction_scores_stand_beside_their_control():
    values = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    scores = InductionScores(values, values * 0.1, length=8, repeats=2, seed=0)
    left, right = scores.plot()
    np.testing.assert_allclose(left.images[0].get_array(), values[::-1])
    np.testing.assert_allclose(right.images[0].get_array(), 0.1 * values[::-1])
    assert "control" in right.get_title()
    for ax in (left, right):
        assert_readable(ax)


def test_plots_are_drawn_into_axes_that_are_given(edge):
    _, axes = pyplot.subplots(1, 2)
    lens = gl.logit_lens(DEMO, model=edge, positions=-1)
    assert lens.plot(ax=axes[0]) is axes[0]
    assert gl.attribution(DEMO, 5, model=edge).plot(ax=axes[1]) is axes[1]


def test_unknown_colours_and_values_are_refused(edge):
    with pytest.raises(ValueError, match="colour is 'loss'; expected 'probability', 'target'"):
        gl.logit_lens(DEMO, model=edge).plot(colour="loss")
    with pytest.raises(ValueError, match="show is 'delta'; expected 'restored' or 'values'"):
        patching_grid().plot(show="delta")
