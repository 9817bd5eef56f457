"""The TransformerLens driver without TransformerLens: names, captures, padding, interventions.

The protocol stands here as a record of transformer_lens 4.3's; tests/parity/
transformer_lens_bridge.py runs the package itself.
"""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import gemloupe as gl
from gemloupe.integrations import transformer_lens
from gemloupe.integrations.transformer_lens import Driver

# What transformer_lens.model_bridge.driver_protocol.Driver and validate_driver ask for.
ATTRIBUTES = {
    "architecture": str,
    "supported_hook_points": frozenset,
    "non_fireable_hook_points": frozenset,
    "provides_sequence_logits": bool,
}
FEATURES = {"gradients", "parameters", "state_dict", "weight_access", "intervention_callbacks"}
FORWARD = ("input_ids", "capture", "intervene", "max_new_tokens", "return_logits")


@dataclass(frozen=True)
class ForwardResult:
    """As transformer_lens 4.3 defines it."""

    logits: Any = None
    captured: Any = field(default_factory=dict)
    new_tokens: Any = None
    raw_output: Any = None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    protocol = types.ModuleType("transformer_lens.model_bridge.driver_protocol")
    protocol.ForwardResult = ForwardResult  # type: ignore[attr-defined]
    for name in ("transformer_lens", "transformer_lens.model_bridge"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, protocol.__name__, protocol)
    return Driver(gl.load("demo:edge"))


IDS = [2, 430, 423, 375, 298]


def test_the_driver_has_every_member_of_the_protocol(driver: Driver) -> None:
    for name, kind in ATTRIBUTES.items():
        assert isinstance(getattr(driver, name), kind), name
    assert hasattr(driver, "bridge_config") and hasattr(driver, "tokenizer")
    assert set(FORWARD) <= set(inspect.signature(driver.forward).parameters)
    assert callable(driver.close) and driver._supported_features <= FEATURES
    assert driver.supported_hook_points
    assert not driver.supported_hook_points & driver.non_fireable_hook_points


def test_it_declares_weights_and_callbacks_and_no_gradients(driver: Driver) -> None:
    served = {feature for feature in FEATURES if driver.supports(feature)}
    assert served == {"weight_access", "intervention_callbacks"}
    weight = driver.get_param("layers.0.self_attn.q_proj.weight")
    assert np.array_equal(weight, driver.model.weights["layers.0.self_attn.q_proj.weight"])
    with pytest.raises(KeyError, match="q_proj"):
        driver.get_param("layers.0.self_attn.q_prj.weight")


def test_every_name_of_theirs_is_one_hook_point_of_the_model(driver: Driver) -> None:
    names = driver.names
    points = gl.hook_points(driver.model)
    assert set(names.values()) <= set(points) and len(set(names.values())) == len(names)
    assert names["blocks.3.hook_in"] == "layers.3.resid_pre"
    assert names["blocks.3.attn.o.hook_in"] == "layers.3.attn.z"
    assert names["blocks.3.ln1_post.hook_out"] == "layers.3.attn.post"
    assert names["unembed.hook_out"] == "logits_raw"


def test_keys_of_a_layer_that_has_none_cannot_fire(driver: Driver) -> None:
    layers = driver.model.config.text.layers
    sharing = next(i for i, layer in enumerate(layers) if layer.kv_source != i)
    assert f"blocks.{sharing}.attn.k.hook_out" in driver.non_fireable_hook_points
    assert f"blocks.{layers[sharing].kv_source}.attn.k.hook_out" in driver.supported_hook_points


def test_a_pass_gives_batched_logits_of_all_positions_and_captures(driver: Driver) -> None:
    names = ("blocks.0.hook_out", "blocks.1.attn.o.hook_in", "unembed.hook_out")
    result = driver.forward(np.array([IDS, IDS[::-1]]), capture=names, output_attentions=True)
    run = driver.model.run(IDS, capture=["layers.0.resid_post", "layers.1.attn.z"], logits="all")
    assert result.logits.shape == (2, *run.logits.shape)
    assert np.array_equal(result.logits[0], run.logits)
    assert np.array_equal(result.captured[names[0]][0], run["layers.0.resid_post"])
    assert np.array_equal(result.captured[names[1]][0], run["layers.1.attn.z"])
    assert set(result.captured) == set(names)


def test_without_logits_none_are_given(driver: Driver) -> None:
    result = driver.forward(IDS, return_logits=False, capture=("unembed.hook_out",))
    assert result.logits is None and result.captured["unembed.hook_out"].shape[1] == len(IDS)


def test_padding_on_either_side_changes_no_value(driver: Driver) -> None:
    padded = np.array([[0, 0, *IDS], [*IDS, 0, 0]])
    mask = np.array([[0, 0, *[1] * 5], [*[1] * 5, 0, 0]])
    got = driver.forward(padded, attention_mask=mask, capture=("blocks.2.hook_out",))
    want = driver.forward(IDS, capture=("blocks.2.hook_out",))
    for row, span in ((0, slice(2, 7)), (1, slice(0, 5))):
        assert np.array_equal(got.logits[row, span], want.logits[0])
        value = got.captured["blocks.2.hook_out"][row]
        assert np.array_equal(value[span], want.captured["blocks.2.hook_out"][0])
        assert np.isneginf(np.delete(got.logits[row], np.arange(7)[span], axis=0)).all()
        assert not np.delete(value, np.arange(7)[span], axis=0).any()


def test_interventions_act_during_the_pass(driver: Driver) -> None:
    wanted = {"op": "add", "value": 2.0, "pos": [1, 3]}
    got = driver.forward([IDS], intervene={"blocks.2.hook_out": wanted})
    add = gl.edits.add(2.0, positions=[1, 3])
    want = driver.model.run(IDS, edit={"layers.2.resid_post": add}, logits="all").logits
    assert np.array_equal(got.logits[0], want)
    plain = driver.forward([IDS]).logits
    assert not np.array_equal(got.logits, plain)

    def halve(z: np.ndarray) -> np.ndarray:
        assert z.shape[:2] == (1, len(IDS))
        return z * 0.5

    got = driver.forward([IDS], intervene={"blocks.1.attn.o.hook_in": halve})
    half = gl.edits.scale(0.5)
    want = driver.model.run(IDS, edit={"layers.1.attn.z": half}, logits="all").logits
    assert np.array_equal(got.logits[0], want)
    assert np.array_equal(driver.forward([IDS]).logits, plain)


def test_positions_of_interventions_count_in_the_padded_row(driver: Driver) -> None:
    wanted = {"blocks.2.hook_out": {"op": "set", "value": 0.5, "pos": 4}}
    padded = driver.forward(
        [[0, 0, *IDS]], attention_mask=[[0, 0, 1, 1, 1, 1, 1]], intervene=wanted
    )
    wanted["blocks.2.hook_out"]["pos"] = 2
    assert np.array_equal(padded.logits[0, 2:], driver.forward(IDS, intervene=wanted).logits[0])


def test_a_function_of_the_wrong_shape_is_refused_with_both(driver: Driver) -> None:
    with pytest.raises(ValueError, match=r"layers\.2\.resid_post has shape"):
        driver.forward(IDS, intervene={"blocks.2.hook_out": lambda x: x[:, :2]})


def test_square_activations_are_padded_on_both_axes() -> None:
    square = np.ones((3, 2, 2), np.float32)
    padded = transformer_lens._padded([square], [(1, 3)], 4, 0.0)
    assert padded.shape == (1, 3, 4, 4)
    assert padded[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ValueError, "input_ids is None"),
        ({"input_ids": [[1.5]]}, ValueError, r"shape \[1, 1\] and dtype float64"),
        ({"input_ids": [[[1]]]}, ValueError, "expected integers"),
        ({"input_ids": [IDS], "max_new_tokens": 3}, NotImplementedError, "model.generate"),
        ({"input_ids": [IDS], "past_key_values": 1}, TypeError, "past_key_values"),
        ({"input_ids": [IDS], "capture": ("blocks.0.hook_ut",)}, KeyError, "blocks.0.hook_out"),
        ({"input_ids": [IDS], "attention_mask": [[1]]}, ValueError, r"expected \[1, 5\]"),
        ({"input_ids": [IDS], "attention_mask": [[1, 0, 1, 1, 1]]}, ValueError, "one run of ones"),
        ({"input_ids": [IDS], "attention_mask": [[0] * 5]}, ValueError, "one run of ones"),
        ({"input_ids": [IDS] * 2, "intervene": {"x": abs}}, NotImplementedError, "2 rows"),
        ({"input_ids": [IDS], "intervene": {"x": abs}}, KeyError, "no hook point"),
        ({"input_ids": [IDS], "intervene": {"embed.hook_out": {}}}, ValueError, "suppress"),
        ({"input_ids": [IDS], "intervene": {"embed.hook_out": 3}}, ValueError, "a function"),
    ],
)
def test_what_does_not_fit_is_refused(
    driver: Driver, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        driver.forward(**arguments)


@pytest.mark.parametrize(
    "wanted",
    [
        {"op": "scale"},
        {"op": "add", "factor": 2},
        {"op": "set", "value": 1, "position": 0},
        {"op": "set", "value": 1, "pos": 9},
        {"op": "set", "value": 1, "pos": -1},
        {"op": "set", "value": 1, "pos": "last"},
    ],
)
def test_a_specification_with_a_wrong_key_or_position_is_refused(
    driver: Driver, wanted: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"embed\.hook_out"):
        driver.forward([IDS], intervene={"embed.hook_out": wanted})


def specified(wanted: dict[str, Any], x: np.ndarray, begin: int = 0) -> list[Any]:
    edit = transformer_lens._specified_edit("h", wanted, begin, begin + len(x))
    return edit(x.copy(), None).tolist()


def test_specifications_do_what_transformer_lens_says() -> None:
    x = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    assert specified({"op": "suppress"}, x) == [[0, 0]] * 3
    assert specified({"op": "scale", "factor": 2}, x) == (2 * x).tolist()
    assert specified({"op": "add", "value": [1, -1], "pos": 1}, x) == [[1, 2], [4, 3], [5, 6]]
    assert specified({"op": "set", "value": 7, "pos": [0, 2]}, x) == [[7, 7], [3, 4], [7, 7]]
    assert specified({"op": "set", "value": 7, "pos": 4}, x, begin=4) == [[7, 7], [3, 4], [5, 6]]
    heads = np.ones((2, 2, 3), np.float32)
    flat = specified({"op": "set", "value": np.arange(6)}, heads)
    assert flat == [[[0, 1, 2], [3, 4, 5]]] * 2
    with pytest.raises(ValueError, match=r"shape \[3\]; expected one number or \[2\]"):
        specified({"op": "add", "value": [1, 2, 3]}, x)


def test_without_transformer_lens_the_bridge_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    name = "gemloupe.integrations._transformer_lens_bridge"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r'pip install "transformer_lens>=4\.3"'):
        transformer_lens.bridge(gl.load("demo:edge"))
