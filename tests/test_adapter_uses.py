"""Adapters in comparisons, in conversions and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gemloupe as gl
from adapter_files import write_adapter
from gemloupe import cli
from tiny_models import random_ids

IDS = random_ids(11)


def logits(model, **arguments) -> np.ndarray:
    return model.run(IDS, logits="all", **arguments).logits


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("26b", text_only=True)[1]


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("made") / "mine", folder, end="v_proj")


# Comparing.


def test_a_model_under_an_adapter_differs_from_itself_where_its_weights_do(folder, adapter):
    model = gl.load(folder, dtype="float32")
    model.load_adapter(adapter)
    report = gl.compare(model, model, IDS, adapter="mine", reference_adapter={})
    assert report.first_divergence.name == "layers.0.attn.v_proj"
    assert "layers.0.self_attn.v_proj.weight differs" in str(report)
    assert report.model.endswith("adapter mine") and "adapter" not in report.reference
    diverging = [point.name for point in report.points if point.verdict == "diverges"]
    assert diverging == [f"layers.{i}.attn.v_proj" for i in range(5)]  # K = V in the last.
    assert report.kl.max() > 0
    assert report.near_ties, "other experts are chosen"


def test_an_adapter_on_both_sides_is_no_difference(folder, adapter):
    model, other = gl.load(folder, dtype="float32"), gl.load(folder, dtype="float32")
    model.load_adapter(adapter, name="a")
    other.load_adapter(adapter, name="b")
    other.set_adapter("b")
    report = gl.compare(model, other, IDS, adapter="a")
    assert report.first_divergence is None
    with pytest.raises(ValueError, match="reference_adapter is for a gemloupe model"):
        gl.compare(model, folder, IDS, reference_adapter="a")


def test_an_adapter_against_peft_is_within_its_bounds(tiny, tmp_path):
    import copy

    import made_adapters

    base, folder = tiny("e2b", text_only=True)
    peft = made_adapters.make(base, target_modules=made_adapters.EVERYTHING, r=3, use_dora=True)
    stored = made_adapters.save(peft, tmp_path / "a")
    merged = copy.deepcopy(base)
    merged.load_state_dict(base.state_dict())
    model = gl.load(folder, dtype="float32")
    model.load_adapter(stored)
    report = gl.compare(model, model, IDS, adapter="a", reference_adapter="a")
    assert report.first_divergence is None
    # The walk's own weights: what it computes in float64 from W + ΔW is what the model gives.
    plain = gl.compare(model, model, IDS, adapter="a", reference_adapter={})
    assert {p.name for p in plain.points if p.verdict == "diverges"} >= {"embed", "logits_raw"}
    assert all("model is off" not in str(p.why) for p in plain.points)


# Converting.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
def test_a_converted_checkpoint_has_the_adapter_in_it(folder, adapter, tmp_path, dtype):
    made = gl.convert(folder, tmp_path / "packed", dtype, adapter={adapter: 0.5})
    model = gl.load(folder, dtype="float32")
    model.load_adapter(adapter, scale=0.5)
    want, plain = logits(model, adapter="mine"), logits(model)
    got = gl.load(made)
    room = {"float32": 1e-5, "bfloat16": 0.1, "int4": 0.8}[dtype] * np.abs(want - plain).max()
    if dtype == "float32":
        np.testing.assert_allclose(logits(got), want, atol=1e-4)
    else:
        rounding = np.abs(logits(gl.load(folder, dtype=dtype)) - plain).max()
        assert np.abs(logits(got) - want).max() < 3 * rounding + room
    assert "mine × 0.5" in got.checkpoint.provenance.adapter
    assert "adapter folded in" in str(got.explain())
    assert sorted(path.name for path in made.iterdir() if "changed" in path.name) == []


def test_what_no_weights_can_hold_is_not_baked_in(tiny, tmp_path):
    import made_adapters

    base, folder = tiny("e2b", text_only=True)
    for name, config, error in (
        ("bias", {"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias adds a bias"),
        ("head", {"target_modules": ["lm_head"]}, "the weights of both are one matrix"),
    ):
        stored = made_adapters.save(made_adapters.make(base, r=2, **config), tmp_path / name)
        with pytest.raises(ValueError, match=error):
            gl.convert(folder, tmp_path / "packed", adapter=stored)
    assert not (tmp_path / "packed").exists()
    tied = made_adapters.make(base, r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    tokens = made_adapters.make(base, r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    for name, peft in (("tied", tied), ("tokens", tokens)):
        stored = made_adapters.save(peft, tmp_path / name)
        made = gl.convert(folder, tmp_path / f"{name}-packed", "float32", adapter=stored)
        want = made_adapters.logits(peft, IDS)
        np.testing.assert_allclose(logits(gl.load(made)), want, atol=1e-4)


# On the command line.


@pytest.fixture(scope="module")
def edge(tmp_path_factory) -> Path:
    folder = gl.load("demo:edge").checkpoint.folder
    return write_adapter(tmp_path_factory.mktemp("made") / "mine", folder)


def test_the_command_line_takes_paths_and_scales(edge, capsys):
    model = gl.load("demo:edge")
    model.load_adapter(edge)
    message = [{"role": "user", "content": "Hi"}]
    for flags, choice in (
        ([], {}),
        ([f"--adapter={edge}"], "mine"),
        ([f"--adapter={edge}:0.25"], {"mine": 0.25}),
    ):
        arguments = ["generate", "Hi", "--temperature=0", "--max-new-tokens=8", "--json", *flags]
        assert cli.main(arguments) == 0
        got = json.loads(capsys.readouterr().out)["ids"]
        want = model.generate(message, adapter=choice, temperature=0, max_new_tokens=8)
        assert got == want.ids.tolist()
    assert cli.main(["generate", "Hi", "--adapter=nowhere"]) == 2
    assert "no such folder; expected a PEFT adapter" in capsys.readouterr().err
    assert cli.main(["generate", "Hi", f"--adapter={edge}", f"--adapter={edge}:2"]) == 2
    assert "--adapter gives one path twice" in capsys.readouterr().err


def test_convert_and_compare_take_an_adapter(edge, tmp_path, capsys):
    made = tmp_path / "packed"
    assert cli.main(["convert", "demo:edge", str(made), "--dtype=auto", f"--adapter={edge}"]) == 0
    assert "mine × 1" in gl.load(made).checkpoint.provenance.adapter
    arguments = ["compare", "demo:edge", "demo:edge", "--gemloupe", "--reference-dtype=auto"]
    arguments += ["--ids=2,15,669", "--points=layers.0.attn.*_proj", f"--adapter={edge}"]
    assert cli.main(arguments) == 1
    assert "layers.0.attn.q_proj" in capsys.readouterr().out
