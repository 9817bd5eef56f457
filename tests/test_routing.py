"""Router traces against plain NumPy and transformers' routers; their files, figures and errors."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import gemloupe as gl
from gemloupe import plot, routing
from gemloupe.routing import RouterTrace, RoutingStats
from gemloupe.routing_drift import js_divergence
from gemloupe.table import Table
from gemloupe.token_classes import CLASSES, classify
from tiny_models import hf_run, random_ids, text_model

matplotlib.use("Agg")

ARRAYS = ("experts", "weights", "weights_norm", "logits", "probs", "output_norms")
ARRAYS += ("ids", "positions", "layers")
TOKENS = ["<bos>", "▁The", "4", "2", "▁", "▁is", ",", "<|tool_call>", "a1"]


def random_trace(
    seed: int = 0, *, level: str = "full", layers: tuple[int, ...] = (0, 2, 5), top: int = 3
) -> RouterTrace:
    """A consistent trace of 9 tokens, 11 experts and 7 outputs, made in NumPy."""
    rng = np.random.default_rng(seed)
    size = (len(layers), len(TOKENS), 11)
    logits = rng.normal(size=size).astype(np.float32)
    probs = softmax(logits)
    experts = np.argsort(-probs, -1, kind="stable")[..., :top].astype(np.int32)
    chosen = np.take_along_axis(probs, experts, -1)
    weights_norm = chosen / chosen.sum(-1, keepdims=True)
    full = level == "full"
    return RouterTrace(
        experts=experts,
        weights=weights_norm * rng.uniform(0.5, 2, 11).astype(np.float32)[experts],
        weights_norm=weights_norm,
        ids=np.arange(2, 2 + len(TOKENS), dtype=np.int32),
        positions=np.arange(10, 10 + len(TOKENS)),
        layers=np.array(layers),
        num_experts=11,
        logits=logits if full else None,
        probs=probs if full else None,
        output_norms=rng.random(experts.shape, np.float32) if full else None,
        token_source=lambda: TOKENS,
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def traced(model: gl.Model, ids: list[int], level: str = "full") -> RouterTrace:
    return model.run(ids, routing=level).routing


def assert_same_bits(a: RouterTrace, b: RouterTrace) -> None:
    assert list(a.mean_outputs or ()) == list(b.mean_outputs or ())
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in ARRAYS}
    for layer, means in (a.mean_outputs or {}).items():
        pairs[f"mean_outputs of {layer}"] = means, b.mean_outputs[layer]
    for name, (left, right) in pairs.items():
        assert (left is None) == (right is None), name
        if left is not None:
            assert (left.dtype, left.shape) == (right.dtype, right.shape), name
            assert left.tobytes() == right.tobytes(), name
    assert a.num_experts == b.num_experts
    assert a.token_strings == b.token_strings


# --- from a run to a trace ---


def test_levels_name_the_points_to_capture() -> None:
    config = gl.load("demo:moe").config.text
    full, experts = routing.hook_points("full", config), routing.hook_points("experts", config)
    assert full["layers.5.experts.each"] == "norm"
    assert full["layers.5.router.probs"] is None
    assert set(experts) < set(full)
    assert {name.split(".", 2)[2] for name in experts} == {
        "router.experts",
        "router.weights",
        "router.weights_norm",
    }
    assert routing.hook_points(None, config) == {}
    assert routing.hook_points("full", gl.load("demo:dense").config.text) == {}


def test_an_unknown_level_says_which_there_are() -> None:
    assert [routing.check_level(x) for x in ("full", "experts", False)] == ["full", "experts", None]
    for wrong in ("all", True, 3):
        with pytest.raises(ValueError, match="routing is .*expected 'full' or 'experts', or False"):
            routing.check_level(wrong)


def test_a_model_without_experts_has_no_trace() -> None:
    config = gl.load("demo:dense").config.text
    assert routing.make_trace("full", {}, np.array([2]), np.array([0]), list, config) is None


def test_a_trace_equals_what_transformers_routes(tiny: Callable) -> None:
    reference, folder = tiny("26b")
    ids = random_ids(40)
    trace = traced(gl.load(folder, dtype="float32"), ids)
    expected = hf_run(reference, ids)
    compared = 0
    for index, layer in enumerate(trace.layers.tolist()):
        prefix = f"layers.{layer}.router."
        probs = expected[prefix + "probs"]
        ranked = -np.sort(-probs, -1)
        clear = np.all(ranked[:, :3] - ranked[:, 1:4] >= 1e-5, -1)
        compared += clear.sum()
        logits = expected[prefix + "logits"]
        bound = 1e-4 * max(1, np.abs(logits).max())
        assert np.abs(trace.logits[index] - logits).max() <= bound
        assert np.abs(trace.probs[index] - probs).max() <= 1e-4
        assert np.array_equal(trace.experts[index][clear], expected[prefix + "experts"][clear])
        error = np.abs(trace.weights[index] - expected[prefix + "weights"])[clear]
        assert error.max() <= 1e-4
    assert compared >= 0.9 * trace.experts[..., 0].size


def test_choices_and_weights_follow_from_the_probabilities(tiny: Callable) -> None:
    reference, folder = tiny("26b")
    trace = traced(gl.load(folder), random_ids(33))
    assert trace.experts.shape == (6, 33, 3)
    for index, layer in enumerate(text_model(reference).layers):
        probs = trace.probs[index]
        order = np.argsort(-probs, -1, kind="stable")[:, :3]
        chosen = np.take_along_axis(probs, order, -1)
        share = chosen / chosen.sum(-1, keepdims=True)
        scale = layer.router.per_expert_scale.numpy()
        assert np.array_equal(trace.experts[index], order)
        assert np.allclose(probs, softmax(trace.logits[index]), atol=1e-6)
        assert np.allclose(trace.weights_norm[index], share, atol=1e-6)
        assert np.allclose(trace.weights[index], share * scale[order], atol=1e-6)


def test_output_norms_are_those_of_the_chosen_experts(tiny: Callable) -> None:
    reference, folder = tiny("26b")
    ids = random_ids(30)
    trace, expected = traced(gl.load(folder, dtype="float32"), ids), hf_run(reference, ids)
    for index in range(6):
        norms = np.linalg.norm(expected[f"layers.{index}.experts.each"], axis=-1)
        same = trace.experts[index] == expected[f"layers.{index}.router.experts"]
        assert same.mean() > 0.9
        error = np.abs(trace.output_norms[index] - norms)[same]
        assert error.max() <= 1e-4 * max(1, norms.max())


def test_mean_outputs_are_of_the_tokens_that_chose_an_expert(tiny: Callable) -> None:
    model = gl.load(tiny("26b")[1])
    runs = [model.run(random_ids(30, seed=s), capture="layers.[14].experts.each") for s in (1, 2)]
    traces = [run.routing.with_outputs(run.captured) for run in runs]
    total = sum(traces)
    assert list(total.mean_outputs) == [1, 4]
    for layer, expert in itertools.product((1, 4), range(11)):
        each = np.concatenate([run[f"layers.{layer}.experts.each"] for run in runs])
        rows = each[total.experts[layer] == expert]
        expected = rows.mean(0) if len(rows) else np.full(each.shape[-1], np.nan)
        got = total.mean_outputs[layer][expert]
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert sum([*traces, random_trace(layers=tuple(range(6)))]).mean_outputs is None
    with pytest.raises(ValueError, match="no experts.each was captured"):
        traces[0].with_outputs({})
    with pytest.raises(ValueError, match=r"is \[30, 3\]; expected \[30, 3, D\]"):
        traces[0].with_outputs({"layers.1.experts.each": np.zeros((30, 3))})


def test_the_level_experts_has_no_probabilities_and_says_so() -> None:
    full, experts = (traced(gl.load("demo:moe"), random_ids(20), x) for x in routing.LEVELS)
    assert (experts.level, experts.logits, experts.probs) == ("experts", None, None)
    assert np.array_equal(full.experts, experts.experts)
    assert np.array_equal(full.weights, experts.weights)
    with pytest.raises(ValueError, match='entropy\\(\\) needs .*routing="full"'):
        experts.entropy()


def test_a_missing_point_and_wrong_shapes_are_named() -> None:
    config = gl.load("demo:moe").config.text
    with pytest.raises(KeyError, match="layers.0.router.experts"):
        routing.make_trace("experts", {}, np.array([2]), np.array([0]), list, config)
    trace = random_trace()
    with pytest.raises(ValueError, match=r"weights is \[3, 9, 2\]; expected \[3, 9, 3\]"):
        dataclasses.replace(trace, weights=trace.weights[:, :, :2])
    with pytest.raises(ValueError, match="experts hold 1 … 11; expected 0 … 10"):
        dataclasses.replace(trace, experts=np.clip(trace.experts + 1, 1, 11))


def test_arrays_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        random_trace().experts[0, 0, 0] = 1


# --- figures ---


def test_load_is_the_share_of_choices() -> None:
    trace = random_trace()
    expected = np.zeros((3, 11))
    for layer, token, choice in itertools.product(range(3), range(9), range(3)):
        expected[layer, trace.experts[layer, token, choice]] += 1 / 27
    assert np.allclose(trace.load(), expected)


def test_entropy_is_that_of_the_probabilities() -> None:
    trace = random_trace()
    p = trace.probs.astype(np.float64)
    assert np.allclose(trace.entropy(), -(p * np.log(p)).sum(-1))
    uniform = dataclasses.replace(trace, probs=np.full(p.shape, 1 / 11, np.float32))
    assert np.allclose(uniform.entropy(), math.log(11))
    certain = np.zeros(p.shape, np.float32)
    certain[..., 4] = 1
    assert np.all(dataclasses.replace(trace, probs=certain).entropy() == 0)


def test_coactivation_counts_pairs() -> None:
    trace = random_trace()
    expected = np.zeros((11, 11), int)
    for chosen in trace.experts[1]:
        for a, b in itertools.product(chosen, chosen):
            expected[a, b] += 1
    assert np.array_equal(trace.coactivation(2), expected)


def test_tokens_of_an_expert_are_the_rows_that_chose_it() -> None:
    trace = random_trace()
    for index, layer in enumerate((0, 2, 5)):
        found = [token for expert in range(11) for token in trace.tokens(layer, expert)]
        assert len(found) == 27
        for expert in range(11):
            for token in trace.tokens(layer, expert):
                assert trace.experts[index, token.row, token.choice] == expert
                assert token.weight == trace.weights[index, token.row, token.choice]
                assert (token.position, token.id) == (token.row + 10, token.row + 2)
                assert token.token == TOKENS[token.row]


def test_unknown_layers_and_experts_are_errors() -> None:
    trace = random_trace()
    for call in (lambda: trace.coactivation(1), lambda: trace.tokens(1, 0), lambda: trace.plot(1)):
        with pytest.raises(ValueError, match=r"layer is 1; expected .*\[0, 2, 5\]"):
            call()
    with pytest.raises(ValueError, match="expert is 11; expected 0 … 10"):
        trace.tokens(0, 11)


def test_a_checkpoint_without_a_tokenizer_shows_ids(tiny: Callable) -> None:
    _, folder = tiny("26b")
    trace = traced(gl.load(folder), [2, 10, 300])
    assert trace.token_strings == ["<id 2>", "<id 10>", "<id 300>"]
    assert set(trace.token_classes) == {"other"}


def test_token_strings_are_asked_for_once_and_late() -> None:
    asked = []
    trace = dataclasses.replace(random_trace(), token_source=lambda: asked.append(1) or TOKENS)
    trace.load()
    assert not asked
    assert trace.token_strings == TOKENS == trace.token_strings
    assert asked == [1]


# --- classes and tables ---


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("7", "digits"),
        ("▁2024", "digits"),
        ("▁the", "words"),
        ("don't", "words"),
        ("été", "words"),
        ("नमस्ते", "words"),
        ("東京", "words"),
        (",", "punctuation"),
        ("▁+", "punctuation"),
        ("</", "punctuation"),
        ("'", "punctuation"),
        ("▁▁▁", "whitespace"),
        ("\n\n", "whitespace"),
        ("<0x0A>", "whitespace"),
        ("<0xC3>", "other"),
        ("<bos>", "special"),
        ("<|turn>", "special"),
        ("<channel|>", "special"),
        ("<|image|>", "special"),
        ("<unused12>", "special"),
        ("<|tool_call>", "tool syntax"),
        ("<tool|>", "tool syntax"),
        ('<|"|>', "tool syntax"),
        ("a1", "other"),
        ("😀", "other"),
        ("<id 5>", "other"),
        ("<h1>", "other"),
        ("", "other"),
    ],
)
def test_tokens_have_classes(token: str, expected: str) -> None:
    assert classify([token]).tolist() == [expected]


def test_the_class_table_gives_shares_and_lifts() -> None:
    trace = random_trace()
    assert trace.token_classes.tolist() == [
        *("special", "words", "digits", "digits", "whitespace", "words", "punctuation"),
        *("tool syntax", "other"),
    ]
    table = trace.table("class", top=11)
    for row in table:
        index = [0, 2, 5].index(row["layer"])
        chosen = trace.experts[index, trace.token_classes == row["class"]]
        load = (trace.experts[index] == row["expert"]).mean()
        assert row["tokens"] == len(chosen)
        assert row["share"] == pytest.approx((chosen == row["expert"]).mean())
        assert row["load"] == pytest.approx(load)
        assert row["lift"] == pytest.approx(row["share"] / load)
    for layer, name in itertools.product((0, 2, 5), CLASSES):
        shares = [r["share"] for r in table if (r["layer"], r["class"]) == (layer, name)]
        assert sum(shares) == pytest.approx(1)
        assert shares == sorted(shares, reverse=True)


def test_tables_take_labels_of_ones_own() -> None:
    trace = random_trace()
    table = trace.table(["even", "odd"] * 4 + ["even"], top=1)
    assert table["class"] == ["even", "odd"] * 3
    assert table["tokens"] == [5, 4] * 3
    with pytest.raises(ValueError, match="one label for each of the 9 tokens"):
        trace.table(["a", "b"])
    with pytest.raises(ValueError, match="by is 'expert'"):
        trace.table("expert")


def test_the_layer_table_sums_the_trace_up() -> None:
    trace = random_trace()
    table, load = trace.table(), trace.load()
    assert table["layer"] == [0, 2, 5]
    assert table["top expert"] == load.argmax(-1).tolist()
    assert table["experts used"] == [len(np.unique(chosen)) for chosen in trace.experts]
    assert table["router entropy"] == pytest.approx(trace.entropy().mean(-1))
    assert np.allclose(np.exp(table["load entropy"]), table["effective experts"])
    assert "router entropy" not in random_trace(level="experts").table().columns


def test_tables_show_text_html_and_columns() -> None:
    table = Table({"name": ["a<b", "c"], "value": [0.5, None]})
    assert str(table).splitlines() == ["name  value", "a<b     0.5", "c"]
    assert "<td>a&lt;b</td><td>0.5</td>" in table._repr_html_()
    assert list(table) == [{"name": "a<b", "value": 0.5}, {"name": "c", "value": None}]
    with pytest.raises(KeyError, match="Did you mean 'value'"):
        table["valu"]
    with pytest.raises(ValueError, match="equal lengths"):
        Table({"a": [1], "b": []})
    assert str(Table({"n": range(100)})).endswith("… 40 more rows")


def test_traces_show_themselves() -> None:
    trace = random_trace()
    assert "3 of 11 a token" in repr(trace)
    assert "<table>" in trace._repr_html_()
    assert "RouterDrift" in repr(trace.drift(trace))
    assert "<table>" in trace.drift(trace)._repr_html_()


# --- several traces ---


def test_traces_add_along_tokens() -> None:
    a, b, c = (random_trace(seed) for seed in (1, 2, 3))
    total = sum([a, b, c])
    assert len(total) == 27
    assert np.array_equal(total.probs, np.concatenate([a.probs, b.probs, c.probs], 1))
    assert np.array_equal(total.ids, np.concatenate([a.ids, b.ids, c.ids]))
    assert total.token_strings == TOKENS * 3
    assert np.allclose(total.load(), (a.load() + b.load() + c.load()) / 3)
    assert_same_bits(total, RouterTrace.concatenate([a, b, c]))
    assert_same_bits(total.select(slice(9, 18)), b)


def test_a_sum_has_the_level_that_all_have() -> None:
    total = random_trace(1) + random_trace(2, level="experts")
    assert total.level == "experts"
    assert total.output_norms is None
    assert len(total) == 18


def test_traces_of_different_models_do_not_add() -> None:
    with pytest.raises(ValueError, match="expected traces of one architecture"):
        random_trace() + random_trace(layers=(0, 2, 4))
    with pytest.raises(ValueError, match="3 and 2 experts a token"):
        random_trace() + random_trace(top=2)
    with pytest.raises(ValueError, match="expected at least one"):
        RouterTrace.concatenate([])
    with pytest.raises(TypeError):
        random_trace() + 1


def test_selecting_takes_slices_indices_and_masks() -> None:
    trace = random_trace()
    mask = trace.token_classes == "digits"
    for rows in (mask, [2, 3], slice(2, 4)):
        part = trace.select(rows)
        assert part.token_strings == ["4", "2"]
        assert np.array_equal(part.logits, trace.logits[:, 2:4])
        assert part.positions.tolist() == [12, 13]
    assert np.all(trace.select([]).load() == 0)


def test_traces_can_be_pickled() -> None:
    trace = dataclasses.replace(random_trace(), token_source=lambda: TOKENS)
    assert_same_bits(pickle.loads(pickle.dumps(trace)), trace)


# --- drift ---


def test_a_trace_does_not_drift_from_itself() -> None:
    trace = random_trace()
    drift = trace.drift(trace)
    assert np.all(drift.jaccard == 1)
    assert np.all(drift.js == 0)
    assert np.all(drift.load_change == 0)


def test_drift_is_symmetric_and_bounded() -> None:
    a, b = random_trace(1), random_trace(2)
    there, back = a.drift(b), b.drift(a)
    assert np.array_equal(there.jaccard, back.jaccard)
    assert np.allclose(there.js, back.js, atol=1e-15)
    assert np.allclose(there.load_change, -back.load_change)
    assert np.all((there.js > 0) & (there.js < math.log(2)))
    for layer, token in itertools.product(range(3), range(9)):
        left, right = set(a.experts[layer, token]), set(b.experts[layer, token])
        assert there.jaccard[layer, token] == len(left & right) / len(left | right)
    assert np.allclose(there.load_change.sum(-1), 0)
    assert there.table()["jaccard"] == pytest.approx(there.jaccard.mean(-1))


def test_divergence_of_disjoint_distributions_is_ln_2() -> None:
    p, q = np.array([[0.25, 0.75, 0, 0]]), np.array([[0, 0, 0.5, 0.5]])
    assert js_divergence(p, q) == pytest.approx(math.log(2))


def test_divergence_is_the_mean_of_two_relative_entropies() -> None:
    p, q = random_trace(1).probs, random_trace(2).probs
    middle = (p.astype(float) + q) / 2
    expected = ((p * np.log(p / middle)).sum(-1) + (q * np.log(q / middle)).sum(-1)) / 2
    assert np.allclose(js_divergence(p, q), expected)


def test_drift_needs_the_same_ids() -> None:
    trace = random_trace()
    other = dataclasses.replace(trace, ids=np.where(trace.ids == 5, 7, trace.ids))
    with pytest.raises(ValueError, match="differ in 1 of 9 ids, first in row 3: 5 and 7"):
        trace.drift(other)
    with pytest.raises(ValueError, match="9 and 4 tokens"):
        trace.drift(trace.select(slice(4)))


def test_drift_of_expert_sets_needs_no_probabilities() -> None:
    drift = random_trace(1).drift(random_trace(2, level="experts"))
    assert drift.js is None
    assert "JS mean" not in drift.table().columns


def test_noise_in_the_router_drifts_more_the_stronger_it_is(tiny: Callable) -> None:
    reference, folder = tiny("26b")
    trace = traced(gl.load(folder), random_ids(40))
    means = []
    for strength in (0.01, 0.1, 1.0):
        noise = np.random.default_rng(0).normal(size=trace.logits.shape).astype(np.float32)
        probs = softmax(trace.logits + strength * noise)
        experts = np.argsort(-probs, -1, kind="stable")[..., :3].astype(np.int32)
        drift = trace.drift(dataclasses.replace(trace, probs=probs, experts=experts))
        means.append((drift.js.mean(), -drift.jaccard.mean()))
    assert means == sorted(means)
    assert means[0] < means[2]


# --- replay ---


@pytest.fixture
def recorded_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the built-in edits: `set` returns what it was called with."""
    monkeypatch.setattr(gl.edits, "set", lambda values, positions: (values, positions))


def test_replay_sets_experts_and_weights_at_their_positions(recorded_edits: None) -> None:
    trace = random_trace()
    edits = trace.replay()
    assert list(edits) == [
        f"layers.{layer}.router.{name}" for layer in (0, 2, 5) for name in ("experts", "weights")
    ]
    values, positions = edits["layers.2.router.weights"]
    assert np.array_equal(values, trace.weights[1])
    assert positions == list(range(10, 19))


@pytest.mark.parametrize(
    "positions", [[12, 18], [-7, -1], np.array([12, 18]), np.isin(np.arange(9), [2, 8])]
)
def test_replay_takes_some_positions(recorded_edits: None, positions: object) -> None:
    values, where = random_trace().replay(positions)["layers.5.router.experts"]
    assert where == [12, 18]
    assert np.array_equal(values, random_trace().experts[2, [2, 8]])


def test_replay_takes_a_slice_or_one_position(recorded_edits: None) -> None:
    trace = random_trace()
    assert trace.replay(slice(15, None))["layers.0.router.experts"][1] == [15, 16, 17, 18]
    assert trace.replay(11)["layers.0.router.experts"][1] == [11]


def test_replay_refuses_what_the_trace_lacks(recorded_edits: None) -> None:
    trace = random_trace()
    with pytest.raises(ValueError, match=r"positions \[9, 30\] are not in the trace.*10 … 18"):
        trace.replay([9, 12, 30])
    with pytest.raises(ValueError, match="expected whole numbers"):
        trace.replay([0.5])
    with pytest.raises(ValueError, match="several sequences"):
        (trace + trace).replay()


def test_replaying_ones_own_choices_changes_no_bit() -> None:
    model = gl.load("demo:moe")
    run = model.run(random_ids(40), logits="all")
    again = model.run(random_ids(40), logits="all", edit=run.routing.replay())
    assert np.array_equal(again.logits, run.logits)
    assert_same_bits(again.routing, run.routing)


def test_replay_brings_back_what_an_ablation_chose() -> None:
    model = gl.load("demo:moe")
    ids = random_ids(40)
    ablate = {"layers.*.router.logits": gl.edits.ablate_experts([1, 3, 7])}
    ablated = model.run(ids, logits="all", edit=ablate)
    replayed = model.run(ids, logits="all", edit=ablated.routing.replay())
    assert np.array_equal(replayed.logits, ablated.logits)
    assert np.array_equal(replayed.routing.experts, ablated.routing.experts)
    assert ablated.routing.load()[:, [1, 3, 7]].max() == 0
    assert np.array_equal(ablated.routing.entropy() > 0, np.ones((6, 40), bool))
    part = model.run(ids, edit=ablated.routing.replay([5, -1])).routing
    first = part.select([5, 39])
    assert np.array_equal(first.experts, ablated.routing.select([5, 39]).experts)
    plain = model.run(ids).routing
    assert np.array_equal(part.experts[:, :5], plain.experts[:, :5])


def test_generated_tokens_are_traced_and_replayed() -> None:
    model = gl.load("demo:moe")
    out = model.generate(random_ids(12), max_new_tokens=8, temperature=0, stop=(), seed=0)
    trace = out.routing
    assert trace.level == "experts"
    assert len(trace) == 12 + len(out.ids) - 1
    assert trace.positions.tolist() == list(range(len(trace)))
    whole = model.run([*out.prompt.ids.tolist(), *out.ids.tolist()[:-1]], routing="experts").routing
    assert np.array_equal(whole.ids, trace.ids)
    assert trace.drift(whole).jaccard.mean() > 0.95


# --- statistics of many calls ---


def test_statistics_equal_those_of_all_traces_together() -> None:
    traces = [random_trace(seed) for seed in range(5)]
    stats, total = RoutingStats(coactivation=True), sum(traces)
    for trace in traces:
        stats.add(trace)
    assert stats.tokens == 45
    assert np.allclose(stats.load(), total.load())
    assert np.array_equal(stats.counts.sum(-1), [135] * 3)
    assert np.array_equal(stats.coactivation(5), total.coactivation(5))
    for index, expert in itertools.product(range(3), range(11)):
        chosen = total.weights[index][total.experts[index] == expert]
        assert stats.mean_weights()[index, expert] == pytest.approx(chosen.mean())
    load = total.load()
    expected = [-sum(p * math.log(p) for p in row if p) for row in load.tolist()]
    assert stats.entropy_of_load() == pytest.approx(expected)
    assert stats.table()["load entropy"] == pytest.approx(expected)


@pytest.mark.parametrize("rows", [[0], slice(None)])
def test_few_and_many_tokens_count_pairs_alike(rows: object) -> None:
    trace = sum(random_trace(seed) for seed in range(8)).select(rows)
    stats = RoutingStats(coactivation=True)
    stats.add(trace)
    for layer in (0, 2, 5):
        assert np.array_equal(stats.coactivation(layer), trace.coactivation(layer))


def test_statistics_reset_and_add_up() -> None:
    a, b = RoutingStats(), RoutingStats()
    a.add(random_trace(1))
    b.add(random_trace(2))
    both = sum([a, b, RoutingStats()])
    assert both.tokens == 18
    assert np.array_equal(both.counts, a.counts + b.counts)
    assert np.array_equal(pickle.loads(pickle.dumps(both)).load(), both.load())
    a.reset()
    assert (a.tokens, a.num_experts, b.tokens) == (0, 0, 9)
    a.add(random_trace(layers=(1, 3)))
    assert a.layers.tolist() == [1, 3]
    with pytest.raises(ValueError, match="expected statistics of one model"):
        a + b


def test_statistics_are_of_one_model_and_say_what_they_lack() -> None:
    stats = RoutingStats()
    assert "tokens  0" in repr(stats)
    stats.add(random_trace())
    with pytest.raises(ValueError, match="Use one RoutingStats a model"):
        stats.add(random_trace(layers=(0, 2, 4)))
    assert stats.tokens == 9
    with pytest.raises(ValueError, match=r"RoutingStats\(coactivation=True\)"):
        stats.coactivation(2)
    assert "<table>" in stats._repr_html_()


# --- files ---


def awkward_trace(level: str) -> RouterTrace:
    """With values that text or compression could lose: NaNs with payloads, −0, −inf, tiny ones."""
    trace = random_trace(level=level)
    weights = trace.weights.copy()
    weights.view(np.uint32)[0, 0] = [0x7FC12345, 0x80000000, 0x00000001]
    weights.view(np.uint32)[0, 1] = [0xFFC00001, 0x00000000, 0x7F800000]
    logits = None
    if trace.logits is not None:
        logits = trace.logits.copy()
        logits[1, 3, 4] = -np.inf
    strings = ["<bos>", "", "\n", "▁é", "東京", "😀", '"', "\x00", "a,b"]
    return dataclasses.replace(trace, weights=weights, logits=logits, token_source=lambda: strings)


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
@pytest.mark.parametrize("level", routing.LEVELS)
def test_files_keep_every_bit(tmp_path: Path, suffix: str, level: str) -> None:
    trace = awkward_trace(level)
    path = tmp_path / f"trace.{suffix}"
    trace.save(path)
    assert_same_bits(RouterTrace.load(path), trace)
    (trace + trace).save(str(path))  # An old file is replaced.
    assert_same_bits(RouterTrace.load(str(path)), trace + trace)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_real_traces_survive_files(tmp_path: Path) -> None:
    trace = traced(gl.load("demo:moe"), random_ids(50))
    for suffix in ("parquet", "safetensors"):
        trace.save(tmp_path / f"trace.{suffix}")
        assert_same_bits(RouterTrace.load(tmp_path / f"trace.{suffix}"), trace)


def test_parquet_is_one_row_for_each_layer_token_and_choice(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    trace = random_trace()
    trace.save(tmp_path / "trace.parquet")
    rows = pq.read_table(tmp_path / "trace.parquet").to_pylist()
    assert len(rows) == 3 * 9 * 3
    for number, row in enumerate(rows):
        index, token, choice = number // 27, number // 3 % 9, number % 3
        assert (row["layer"], row["row"], row["choice"]) == ([0, 2, 5][index], token, choice)
        assert (row["position"], row["id"], row["token"]) == (token + 10, token + 2, TOKENS[token])
        assert row["expert"] == trace.experts[index, token, choice]
        assert row["weight"] == trace.weights[index, token, choice]
        assert row["weight_norm"] == trace.weights_norm[index, token, choice]
        assert row["output_norm"] == trace.output_norms[index, token, choice]
        for name in ("logits", "probs"):
            expected = getattr(trace, name)[index, token].tolist() if choice == 0 else None
            assert row[name] == expected


def test_mean_outputs_are_kept_in_safetensors_only(tmp_path: Path) -> None:
    means = np.full((11, 4), np.nan, np.float32)
    means[1] = 2.5
    trace = dataclasses.replace(random_trace(), mean_outputs={2: means, 5: means + 1})
    trace.save(tmp_path / "trace.safetensors")
    assert_same_bits(RouterTrace.load(tmp_path / "trace.safetensors"), trace)
    with pytest.raises(ValueError, match="mean_outputs, which a Parquet file has no place for"):
        trace.save(tmp_path / "trace.parquet")
    assert not (tmp_path / "trace.parquet").exists()


def test_names_of_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected '.parquet' or '.safetensors'"):
        random_trace().save(tmp_path / "trace.csv")
    with pytest.raises(ValueError, match="suffix is '.npz'"):
        RouterTrace.load(tmp_path / "trace.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        RouterTrace.load(tmp_path / "trace.parquet")
    with pytest.raises(ValueError, match="no tokens"):
        random_trace().select([]).save(tmp_path / "trace.parquet")


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_damaged_files_are_value_errors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace.{suffix}"
    random_trace().save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(300):
        damaged = bytearray(whole)
        if number % 2:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            for place in rng.integers(len(whole), size=3):
                damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            RouterTrace.load(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused >= 150  # All that were cut; flips in values may pass.


def test_a_flipped_bit_in_parquet_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    trace = random_trace()
    trace.save(path)
    data = bytearray(path.read_bytes())
    place = data.index(trace.probs[1].tobytes()[:64])
    data[place + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a Parquet file that can be read"):
        RouterTrace.load(path)


def test_foreign_files_are_not_traces(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "other.parquet")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    for name in ("other.parquet", "other.safetensors"):
        with pytest.raises(ValueError, match="this is not a router trace"):
            RouterTrace.load(tmp_path / name)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="not a Parquet file"):
        RouterTrace.load(tmp_path / "text.parquet")


def rewritten(path: Path, change: Callable) -> None:
    """Writes the rows of a Parquet file again, one row group a layer, changed by `change`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(index) for index in range(file.num_row_groups)]
    groups = change(groups)
    with pq.ParquetWriter(path, groups[0].schema) as file:
        for group in groups:
            file.write_table(pa.Table.from_batches(group.to_batches()), len(group))


def replaced(table: object, name: str, values: np.ndarray) -> object:
    import pyarrow as pa

    at = table.schema.get_field_index(name)
    field = table.schema.field(name)
    return table.set_column(at, field, pa.array(values, field.type)).replace_schema_metadata(
        table.schema.metadata
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups[::-1], "rows of layer 0 are out of order"),
        (lambda groups: groups[:2], "row groups have"),
        (lambda groups: [g.slice(3) for g in groups], "row groups have"),
        (lambda groups: [g.drop_columns(["weight"]) for g in groups], "the columns are"),
        (
            lambda groups: [replaced(g, "expert", np.full(27, 11)) for g in groups],
            "experts hold 11 … 11; expected 0 … 10",
        ),
        (
            lambda groups: [groups[0], replaced(groups[1], "id", np.zeros(27)), groups[2]],
            "rows of layer 2 are out of order",
        ),
        (
            lambda groups: [replaced(g, "weight", [None] + [1.0] * 26) for g in groups],
            "column weight has 1 nulls",
        ),
        (
            lambda groups: [replaced(g, "probs", [[1.0] * 11] * 27) for g in groups],
            "column probs has other lists",
        ),
        (
            lambda groups: [replaced(g, "logits", [[1.0] * 10, None, None] * 9) for g in groups],
            "column logits has other lists",
        ),
    ],
)
def test_inconsistent_parquet_is_refused(tmp_path: Path, change: Callable, message: str) -> None:
    path = tmp_path / "trace.parquet"
    random_trace().save(path)
    rewritten(path, lambda groups: groups)
    assert_same_bits(RouterTrace.load(path), random_trace())
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        RouterTrace.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "its version is 2; expected 1"),
        ({"layers": [2, 0, 5]}, "expected ascending layer numbers"),
        ({"layers": []}, "expected ascending layer numbers"),
        ({"tokens": 10**12}, "expected a number from 1 to"),
        ({"tokens": 10}, r"ids is I32 \[9\]|experts is I32"),
        ({"chosen": 12}, "12 are chosen of 11 experts"),
        ({"full": 1}, "full is 1; expected true or false"),
        ({"full": False}, "it holds"),
        ({"extra": 1}, "gemloupe.routing has"),
    ],
)
def test_inconsistent_safetensors_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    import json

    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "trace.safetensors"
    random_trace().save(path)
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = json.loads(file.metadata()["gemloupe.routing"])
    save_file(arrays, path, {"gemloupe.routing": json.dumps(metadata | change)})
    with pytest.raises(ValueError, match=message):
        RouterTrace.load(path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("tokens.ends", np.arange(9)[::-1].copy(), "do not cut up"),
        ("tokens.ends", np.full(9, -1), "do not cut up"),
        ("tokens.utf8", np.full(5, 0xFF, np.uint8), "do not cut up|not UTF-8"),
        ("experts", np.full((3, 9, 3), 99, np.int32), "experts hold 99"),
        ("experts", np.zeros((3, 9, 3), np.int64), r"experts is I64 .* expected I32 \[3, 9, 3\]"),
        ("mean_outputs.2", np.zeros((3, 4), np.float32), r"mean_outputs.2 is F32 \[3, 4\]"),
        ("mean_outputs.3", np.zeros((11, 4), np.float32), "it holds"),
    ],
)
def test_wrong_tensors_are_refused(
    tmp_path: Path, name: str, array: np.ndarray, message: str
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "trace.safetensors"
    random_trace().save(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {name: array}, path, metadata)
    with pytest.raises(ValueError, match=message):
        RouterTrace.load(path)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    import json

    import pyarrow.parquet as pq

    path = tmp_path / "trace.parquet"
    random_trace(level="experts", layers=(0,)).save(path)
    with pq.ParquetFile(path) as file:
        table = file.read()
    rows = table.take(np.zeros(3_000_000, np.int64))
    sizes = json.loads(table.schema.metadata[b"gemloupe.routing"]) | {"tokens": 1_000_000}
    rows = rows.replace_schema_metadata({"gemloupe.routing": json.dumps(sizes)})
    pq.write_table(rows, path, row_group_size=len(rows), compression="zstd")
    with pytest.raises(ValueError, match="no more than it has room for"):
        RouterTrace.load(path)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install "gemloupe\[parquet\]"'):
        random_trace().save(tmp_path / "trace.parquet")
    assert list(tmp_path.iterdir()) == []


# --- plots ---


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def shown(ax: object) -> np.ndarray:
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def test_the_load_plot_shows_layers_and_experts() -> None:
    trace = random_trace()
    stats = RoutingStats()
    stats.add(trace)
    for ax in (trace.plot(), plot.routing(stats), stats.plot()):
        assert np.allclose(shown(ax), trace.load() * 11)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2", "5"]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("expert", "layer")


def test_the_plot_of_a_layer_shows_tokens() -> None:
    trace = random_trace()
    ax = trace.plot(layer=2)
    assert np.array_equal(shown(ax), trace.probs[1])
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["<bos>", "·The"]
    assert len(ax.collections[0].get_offsets()) == 27
    ax = random_trace(level="experts").plot(layer=2)
    chosen = np.take_along_axis(shown(ax), trace.experts[1], -1)
    assert np.array_equal(chosen, trace.weights_norm[1])
    assert np.count_nonzero(shown(ax)) == 27
    with pytest.raises(ValueError, match="RoutingStats keep no tokens"):
        plot.routing(RoutingStats(), layer=2)


def test_the_plot_of_classes_shows_lifts() -> None:
    trace = random_trace()
    ax = plot.token_classes(trace, 5)
    table = trace.table("class", top=11)
    names = [label.get_text().split(" (")[0] for label in ax.get_yticklabels()]
    for row in (row for row in table if row["layer"] == 5):
        value = shown(ax)[names.index(row["class"]), row["expert"]]
        assert value == pytest.approx(math.log2(row["lift"]), abs=1e-6)


def test_the_plot_of_coactivation_shows_shares() -> None:
    trace = random_trace()
    values, counts = shown(plot.coactivation(trace, 0)), trace.coactivation(0)
    for a, b in itertools.product(range(11), range(11)):
        if a == b or not counts[a, a]:
            assert np.isnan(values[a, b])
        else:
            assert values[a, b] == pytest.approx(counts[a, b] / counts[a, a])


def test_drift_is_plotted_by_layer_and_by_token() -> None:
    drift = random_trace(1).drift(random_trace(2))
    ax = drift.plot()
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["1 − Jaccard index", "JS divergence / ln 2", "load moved"]
    assert np.allclose(ax.lines[0].get_ydata(), 1 - drift.jaccard.mean(-1))
    assert np.array_equal(shown(plot.routing_drift(drift, by="token")), drift.js)
    without = random_trace(1).drift(random_trace(2, level="experts"))
    assert len(without.plot().lines) == 2
    assert np.array_equal(shown(without.plot(by="token")), 1 - without.jaccard)
    with pytest.raises(ValueError, match='expected "layer" or "token"'):
        drift.plot(by="head")


def test_plots_draw_into_given_axes() -> None:
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    assert random_trace().plot(ax=ax) is ax
    ax.figure.canvas.draw()
