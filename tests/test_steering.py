"""Steering vectors: differences of means, their files, and what adding them does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from safetensors.numpy import save_file

import gemloupe as gl
from gemloupe.analysis import SteeringVector

POINT = "layers.5.resid_post"
POSITIVE = [
    f"When {a} and {b} went to the road,"
    for a, b in itertools.permutations(("Mary", "Paul", "Tom"), 2)
]
NEGATIVE = [
    f"When {a} and {b} went to the sea,"
    for a, b in itertools.permutations(("Mary", "Paul", "Tom"), 2)
]


@pytest.fixture(scope="module")
def edge():
    return gl.load("demo:edge", dtype="float32")


def activations(model, prompts, name: str) -> list[np.ndarray]:
    return [model.run(prompt, capture=name)[name] for prompt in prompts]


def test_the_vector_is_the_difference_of_the_means_at_the_position(edge):
    vector = gl.steering_vector(edge, POSITIVE, NEGATIVE, POINT, -2)
    a, b = (
        np.mean([x[-2] for x in activations(edge, p, POINT)], axis=0) for p in (POSITIVE, NEGATIVE)
    )
    np.testing.assert_allclose(vector[POINT], a - b, atol=1e-5)
    assert (vector.positives, vector.negatives) == (6, 6)


def test_the_mean_over_positions_is_taken_for_each_prompt(edge):
    vector = gl.steering_vector(edge, POSITIVE[:2], ["Tom", "Mary and Paul"], POINT, None)
    a, b = (
        np.mean([x.mean(axis=0) for x in activations(edge, p, POINT)], axis=0)
        for p in (POSITIVE[:2], ["Tom", "Mary and Paul"])
    )
    np.testing.assert_allclose(vector[POINT], a - b, atol=1e-5)


def test_a_pattern_gives_a_vector_for_every_layer(edge):
    vector = gl.steering_vector(edge, POSITIVE, NEGATIVE)
    assert list(vector.vectors) == [f"layers.{i}.resid_post" for i in range(10)]
    alone = gl.steering_vector(edge, POSITIVE, NEGATIVE, POINT)
    np.testing.assert_allclose(vector[POINT], alone[POINT], atol=1e-5)


def test_a_norm_that_is_asked_for_is_given(edge):
    vector = gl.steering_vector(edge, POSITIVE, NEGATIVE, POINT, norm=2.5)
    assert np.linalg.norm(vector[POINT]) == pytest.approx(2.5, rel=1e-5)
    with pytest.raises(ValueError, match="is the same in both sets"):
        gl.steering_vector(edge, POSITIVE, POSITIVE, POINT, norm=1.0)


def test_separation_is_the_standardised_difference_of_projections(edge):
    vector = gl.steering_vector(edge, POSITIVE, NEGATIVE, POINT)
    a, b = (
        np.array([x[-1] @ vector[POINT] for x in activations(edge, p, POINT)])
        for p in (POSITIVE, NEGATIVE)
    )
    pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    assert vector.separation[POINT] == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-3)
    assert np.isnan(gl.steering_vector(edge, POSITIVE[:1], NEGATIVE[:1], POINT).separation[POINT])


def test_adding_the_vector_moves_the_stream_by_it(edge):
    vector = gl.steering_vector(edge, POSITIVE, NEGATIVE, POINT)
    plain = edge.run(POSITIVE[0], capture=POINT)
    steered = edge.run(POSITIVE[0], capture=POINT, edit=vector.edit(3.0))
    np.testing.assert_allclose(steered[POINT], plain[POINT] + 3 * vector[POINT], atol=1e-4)
    assert np.abs(steered.logits - plain.logits).max() > 0.01


def test_steering_moves_the_last_position_of_one_set_to_the_other(edge):
    """At the last layer the vector carries the mean difference of the predictions exactly."""
    last = "layers.9.resid_post"
    a, b = POSITIVE[:1], NEGATIVE[:1]
    vector = gl.steering_vector(edge, a, b, last)
    steered = edge.run(b[0], edit=vector.edit(1.0, positions=-1))
    np.testing.assert_allclose(steered.logits, edge.run(a[0]).logits, atol=1e-4)


def test_steering_acts_on_generated_tokens(edge):
    vector = gl.steering_vector(edge, POSITIVE, NEGATIVE, POINT)
    arguments = {"max_new_tokens": 6, "temperature": 0, "capture": POINT}
    plain = edge.generate(POSITIVE[0], **arguments)
    still = edge.generate(POSITIVE[0], edit=vector.edit(0.0), **arguments)
    assert still.ids.tolist() == plain.ids.tolist()
    moved = edge.generate(POSITIVE[0], edit=vector.edit(50.0), **arguments)
    assert moved.ids.tolist() != plain.ids.tolist()


def test_the_control_has_the_same_norms_and_another_direction(edge):
    vector = gl.steering_vector(edge, POSITIVE, NEGATIVE)
    control = vector.random(seed=1)
    for name, direction in vector.vectors.items():
        norm = np.linalg.norm(direction)
        assert np.linalg.norm(control[name]) == pytest.approx(norm, rel=1e-5)
        assert abs(control[name] @ direction) < 0.5 * norm**2
    assert (vector.random(1)[POINT] == control[POINT]).all()
    assert (vector.random(2)[POINT] != control[POINT]).any()


def test_a_saved_vector_is_read_back_bit_for_bit(edge, tmp_path):
    vector = gl.steering_vector(edge, POSITIVE, NEGATIVE)
    vector.save(tmp_path / "v.safetensors")
    read = SteeringVector.load(tmp_path / "v.safetensors")
    assert list(read.vectors) == list(vector.vectors)
    for name in vector.vectors:
        np.testing.assert_array_equal(read[name], vector[name])
    assert read.separation == vector.separation
    assert (read.positives, read.negatives) == (6, 6)
    assert (tmp_path / "v.safetensors").stat().st_size < 4 * 10 * 96 + 2000


def test_files_that_are_no_steering_vector_are_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(FileNotFoundError):
        SteeringVector.load(path)
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"v\.safetensors: .*expected a file that SteeringVector"):
        SteeringVector.load(path)
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="format is None; expected 'gemloupe steering vector 1'"):
        SteeringVector.load(path)
    about = {"format": "gemloupe steering vector 1", "separation": "[1]", "positives": "1"}
    save_file({"a": np.zeros(3, np.float32)}, path, about)
    with pytest.raises(ValueError, match=r"v\.safetensors: "):
        SteeringVector.load(path)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"positive": []}, r"positive is \[\]; expected a list of one prompt or more"),
        ({"negative": "Tom"}, "negative is 'Tom'; expected a list"),
        ({"position": 99}, "position 99 is outside a prompt of 10 tokens"),
        ({"position": "first"}, "positions is 'first'; expected one of"),
        ({"point": "layers.2.attn.pattern"}, "expected one row for each position"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(edge, arguments, error):
    given = {"positive": POSITIVE, "negative": NEGATIVE, "point": POINT, **arguments}
    with pytest.raises(ValueError, match=error):
        gl.steering_vector(edge, **given)


def test_points_without_a_vector_are_a_key_error(edge):
    vector = gl.steering_vector(edge, POSITIVE, NEGATIVE, POINT)
    with pytest.raises(KeyError, match=r"layers\.4\.resid_post.*has no vector"):
        vector.edit(1.0, "layers.4.resid_post")
