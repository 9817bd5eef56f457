"""Comparison with transformers: equal models, damaged ones, bfloat16, quantised, recorded files."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import gemloupe as gl
from gemloupe import cli
from gemloupe.comparison import transformers_capture
from gemloupe.comparison.bounded import Roundings, exact
from tiny_models import VARIANTS, hf_run, make_tiny, random_ids, save_tiny, text_model

IDS = random_ids(40)
EXPLAINED = {"equal", "noise", "near tie"}


def damaged(tmp_path: Path, variant: str, tensor: str, change: Callable, **arguments) -> Path:
    """Saves the tiny model of `variant` with one tensor of its text decoder changed in place."""
    model = make_tiny(variant, **arguments)
    change(dict(text_model(model).state_dict(keep_vars=True))[tensor].data)
    return save_tiny(model, tmp_path / "damaged")


def one_element(tensor: torch.Tensor) -> None:
    tensor[3, 5] += 0.01


def one_percent(tensor: torch.Tensor) -> None:
    tensor *= 1.01


def exchange_two_and_seven(tensor: torch.Tensor) -> None:
    tensor[[2, 7]] = tensor[[7, 2]]


def in_bfloat16(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    loaded = type(model).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    if hasattr(loaded, "set_experts_implementation"):
        loaded.set_experts_implementation("eager")
    return loaded.eval()


@pytest.mark.parametrize("text_only", [False, True], ids=["multimodal", "text-only"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_models_do_not_diverge(tiny, variant, text_only):
    model, folder = tiny(variant, text_only=text_only)
    report = gl.compare(gl.load(folder, "float32"), model, [IDS, random_ids(9, seed=5)])
    assert report.first_divergence is None
    assert {point.verdict for point in report.points} <= EXPLAINED
    assert [point.name for point in report.points] == list(gl.hook_points(gl.load(folder)))
    assert report.not_compared == ()
    assert report.kl.shape == report.top1_agreement.shape == (49,)
    assert report.kl.max() < 1e-8 and report.top1_agreement.all()
    assert report.positions[40] == (1, 0)


def test_prompts_longer_than_a_chunk_do_not_diverge(tiny):
    model, folder = tiny("31b")
    points = ["layers.0.attn.keys", "layers.0.attn.values", "layers.0.attn.z"]
    report = gl.compare(gl.load(folder, "float32"), model, random_ids(600), points=points)
    assert {point.verdict for point in report.points} <= EXPLAINED and len(report.points) == 3


@pytest.mark.parametrize(
    ("variant", "tensor", "change", "point"),
    [
        ("e2b", "layers.3.mlp.down_proj.weight", one_element, "layers.3.mlp.out"),
        ("e2b", "layers.6.post_attention_layernorm.weight", one_percent, "layers.6.attn.post"),
        ("e2b", "layers.2.self_attn.k_norm.weight", one_percent, "layers.2.attn.k"),
        ("e2b", "layers.8.per_layer_projection.weight", one_element, "layers.8.per_layer.out"),
        ("e4b", "layers.2.layer_scalar", one_percent, "layers.2.resid_post"),
        ("e4b", "layers.5.self_attn.o_proj.weight", one_element, "layers.5.attn.result"),
        ("12b", "norm.weight", one_percent, "final_norm"),
        ("26b", "layers.4.experts.down_proj", exchange_two_and_seven, "layers.4.experts.out"),
        ("26b", "layers.1.router.per_expert_scale", one_percent, "layers.1.router.weights"),
        ("26b", "layers.3.router.proj.weight", one_element, "layers.3.router.logits"),
        ("31b", "layers.5.self_attn.k_proj.weight", one_element, "layers.5.attn.k_proj"),
        ("31b", "embed_tokens.weight", one_percent, "embed"),
    ],
)
def test_a_damaged_tensor_is_located(tiny, tmp_path, variant, tensor, change, point):
    model, _ = tiny(variant)
    folder = damaged(tmp_path, variant, tensor, change)
    report = gl.compare(gl.load(folder, "float32"), model, IDS)
    first = report.first_divergence
    assert first.tensors == (tensor,)
    assert first.side == "reference" and tensor in first.why
    assert first.error > first.bound
    found = [divergence.name for divergence in report.divergences]
    if point == "layers.4.experts.out":
        # With the points inside the experts captured, the first of them that the tensor makes.
        assert first.name in (point, "layers.4.experts.each")
        assert "expert 2 holds the reference's expert 7" in first.why
    else:
        assert first.name == point
    # Everything else agrees with its own operation; these matrices make two points each.
    twice = tensor.endswith(("embed_tokens.weight", "o_proj.weight"))
    assert len(found) == (2 if twice else 1)


def test_a_damaged_table_of_per_layer_embeddings_is_located(tiny, tmp_path):
    model, _ = tiny("e2b")
    name = "embed_tokens_per_layer.weight"
    folder = damaged(tmp_path, "e2b", name, one_percent)
    first = gl.compare(gl.load(folder, "float32"), model, IDS).first_divergence
    assert first.name.startswith("per_layer_inputs")
    assert first.tensors == (name,)


def test_two_damages_are_both_named(tiny, tmp_path):
    model, _ = tiny("31b")
    other = copy.deepcopy(model)
    one_element(text_model(other).layers[1].mlp.up_proj.weight)
    one_percent(text_model(other).layers[4].input_layernorm.weight)
    other.file_dtype = "float32"
    folder = save_tiny(other, tmp_path)
    report = gl.compare(gl.load(folder, "float32"), model, IDS)
    assert [d.name for d in report.divergences] == ["layers.1.mlp.up", "layers.4.attn.norm"]
    assert report["layers.2.resid_post"].verdict == "amplified"


def test_a_reference_that_computes_something_else_is_found(tiny):
    model, folder = tiny("31b")
    mlp = text_model(model).layers[2].mlp
    with torch.no_grad():
        handle = mlp.down_proj.register_forward_hook(lambda _m, _i, output: output * 1.001)
        report = gl.compare(gl.load(folder, "float32"), model, IDS)
        handle.remove()
    first = report.first_divergence
    assert first.name == "layers.2.mlp.out"
    assert first.tensors == ()
    assert "is the same on both sides" in first.why


def test_the_reference_is_as_it_was(tiny):
    model = copy.deepcopy(tiny("26b")[0])
    model.train()
    model.model.language_model.layers[1].mlp.eval()
    model.set_attn_implementation("sdpa")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    model.to(torch.bfloat16)
    transformers_capture.record(model, IDS)
    transformers_capture.record(model, IDS, float32=True, embed_scale="float32")
    assert [module.training for module in model.modules()] == modes
    assert text_model(model).config._attn_implementation == "sdpa"
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(torch.bfloat16)), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_in_the_reference_leaves_it_as_it_was(tiny):
    model = tiny("31b")[0]
    with pytest.raises(IndexError):
        transformers_capture.record(model, [10**6])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_captures_are_those_of_plain_hooks(tiny, variant, attention):
    model = copy.deepcopy(tiny(variant)[0])
    model.set_attn_implementation(attention)
    got = transformers_capture.record(model, IDS)
    model.set_attn_implementation("eager")
    want = hf_run(model, IDS)
    assert set(want) <= set(got)
    for name, array in want.items():
        if name.endswith(("experts.hidden", "experts.each", "scores")):
            np.testing.assert_allclose(got[name].numpy(), array, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name].numpy(), array, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_without_a_tensor_of_their_own_agree_with_what_follows(tiny, variant):
    model = tiny(variant)[0]
    values = {n: t.numpy() for n, t in transformers_capture.record(model, IDS).items()}
    for index, layer in enumerate(text_model(model).layers):
        at = f"layers.{index}."
        scaled = values[at + "resid_unscaled"] * layer.layer_scalar.numpy()
        np.testing.assert_array_equal(scaled, values[at + "resid_post"])
        result = values[at + "attn.result"].sum(axis=1)
        np.testing.assert_allclose(result, values[at + "attn.out"], atol=1e-5)
        if at + "router.weights_norm" in values:
            scale = layer.router.per_expert_scale.numpy()[values[at + "router.experts"]]
            weights = values[at + "router.weights_norm"] * scale
            np.testing.assert_allclose(weights, values[at + "router.weights"], rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bfloat16_reference_is_judged_by_its_own_rounding(tiny, variant):
    model, folder = tiny(variant, dtype="bfloat16")
    reference = in_bfloat16(model, folder)
    report = gl.compare(gl.load(folder), reference, IDS)
    assert report.first_divergence is None
    ratios = [point.ratio for point in report.points if point.ratio is not None]
    assert len(ratios) > 100 and max(ratios) < 1.5
    assert report.own_kl.shape == report.kl.shape
    assert "bfloat16" in report.reference and "bfloat16" in report.model
    assert all(point.own is not None for point in report.points if "experts" not in point.name)


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_float32_computation_of_a_bfloat16_model_is_that_of_the_widened_model(tiny, variant):
    model, folder = tiny(variant, dtype="bfloat16")
    reference = in_bfloat16(model, folder)
    got = transformers_capture.record(reference, IDS, float32=True, embed_scale="float32")
    want = hf_run(model, IDS)
    for name in ("embed", "layers.0.attn.q", "layers.4.resid_post", "logits"):
        np.testing.assert_array_equal(got[name].numpy(), want[name], err_msg=name)


def test_a_damaged_tensor_is_located_against_a_bfloat16_reference(tiny, tmp_path):
    model, folder = tiny("e2b", dtype="bfloat16")
    name = "layers.3.mlp.down_proj.weight"
    bad = damaged(tmp_path, "e2b", name, lambda t: t.mul_(1.1), dtype="bfloat16")
    first = gl.compare(gl.load(bad), in_bfloat16(model, folder), IDS).first_divergence
    assert first.name == "layers.3.mlp.out"
    assert first.tensors == (name,)
    assert "times the reference's own error" in first.why


def test_the_embedding_constant_is_aligned(tiny):
    model, folder = tiny("e2b", dtype="bfloat16")
    for loaded, reference in (
        (gl.load(folder, "float32"), in_bfloat16(model, folder)),
        (gl.load(folder, "float32", embed_scale="bfloat16"), model),
    ):
        report = gl.compare(loaded, reference, IDS)
        assert report.first_divergence is None
        assert "√hidden_size" in report.notes[0] and "embed_scale=" in report.notes[0]


def test_another_embedding_constant_is_named_where_it_cannot_be_aligned(tiny, tmp_path):
    model, folder = tiny("e2b", dtype="bfloat16")
    path = gl.record_reference(model, IDS, tmp_path / "reference.safetensors")
    report = gl.compare(gl.load(folder, "float32", embed_scale="bfloat16"), path)
    assert report.first_divergence.name == "embed"
    assert "6.625" in report.first_divergence.why  # √44 in bfloat16.
    assert 'embed_scale="float32"' in report.notes[0]


def test_rounded_rope_frequencies_of_the_reference_are_noted(tiny):
    model, folder = tiny("12b", dtype="bfloat16")
    report = gl.compare(gl.load(folder), copy.deepcopy(model).to(torch.bfloat16), IDS)
    assert any("RoPE frequencies are rounded to bfloat16" in note for note in report.notes)
    assert report.first_divergence.name.endswith(("rot_q", "rot_k"))


def test_near_ties_of_the_router_are_reported_and_routing_is_replayed(tiny):
    model, folder = tiny("26b", dtype="bfloat16")
    report = gl.compare(gl.load(folder), in_bfloat16(model, folder), IDS)
    assert report.near_ties and all(choice.is_tie for choice in report.near_ties)
    for choice in report.near_ties:
        assert choice.gap <= choice.noise < 0.1
        assert choice.model != choice.reference
    assert any("forced" in note for note in report.notes)
    # With equal experts the last layer is as close as rounding allows.
    assert report["layers.5.resid_post"].ratio < 1.5


def test_choices_that_are_no_ties_are_told_from_those(tiny, tmp_path):
    model, _ = tiny("26b")
    folder = damaged(tmp_path, "26b", "layers.2.router.proj.weight", lambda t: t.mul_(-1))
    report = gl.compare(gl.load(folder, "float32"), model, IDS)
    assert report.first_divergence.name == "layers.2.router.logits"
    wrong = [choice for choice in report.near_ties if not choice.is_tie]
    # Later layers route otherwise too: the weights of layer 2's experts are others.
    assert len(wrong) > 10 and wrong[0].layer == 2


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounded_weights_are_no_divergence_and_are_ranked(tiny, variant, dtype):
    model, folder = tiny(variant)
    loaded = gl.load(folder, dtype)
    report = gl.compare(loaded, model, IDS)
    assert report.first_divergence is None
    names = {c.tensor for c in report.contributions}
    assert {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight"} <= names
    errors = [c.output_error for c in report.contributions]
    assert errors == sorted(errors, reverse=True)
    largest = {"int8": 0.02, "int4": 0.2}[dtype]
    assert 0 < min(errors) and max(errors) < largest
    assert all(0 < c.weight_error < largest for c in report.contributions)


def test_a_damaged_tensor_of_a_quantised_model_is_no_rounding(tiny, tmp_path):
    model, _ = tiny("31b")
    name = "layers.3.mlp.up_proj.weight"
    folder = damaged(tmp_path, "31b", name, lambda t: t[:40].mul_(-1))
    first = gl.compare(gl.load(folder, "int4"), model, IDS).first_divergence
    assert first.name == "layers.3.mlp.up" and first.tensors == (name,)


def test_the_kl_of_one_tensor_alone_is_that_of_a_model_with_it_rounded(tiny):
    model, folder = tiny("e2b")
    report = gl.compare(gl.load(folder, "int4"), model, IDS, measure="kl")
    worst = report.contributions[0]
    kls = [c.kl for c in report.contributions]
    assert kls == sorted(kls, reverse=True)
    alone = gl.load(folder, {"default": "float32", worst.tensor: worst.dtype})
    exact = gl.compare(alone, model, IDS)
    assert exact.kl.mean() == pytest.approx(worst.kl, rel=0.2)  # It rounds activations too.
    plain = gl.compare(gl.load(folder, "float32"), model, IDS)
    assert plain.contributions == [] and plain.kl.mean() < 1e-8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_a_recorded_reference_equals_the_live_one(tiny, tmp_path, variant, dtype):
    model, folder = tiny(variant, dtype=dtype)
    reference = model if dtype == "float32" else in_bfloat16(model, folder)
    path = gl.record_reference(reference, [IDS, IDS[:7]], tmp_path / "reference.safetensors")
    loaded = gl.load(folder, "float32", embed_scale=dtype)
    live, recorded = gl.compare(loaded, reference, [IDS, IDS[:7]]), gl.compare(loaded, path)
    np.testing.assert_array_equal(recorded.kl, live.kl)
    assert recorded.reference.startswith(live.reference)
    assert recorded.first_divergence is None
    if variant == "26b" and dtype == "bfloat16":
        return  # There the live reference is run again with the model's experts.
    assert [p.name for p in recorded.points] == [p.name for p in live.points]
    for ours, theirs in zip(recorded.points, live.points, strict=True):
        assert (ours.error, ours.own) == (theirs.error, theirs.own), ours.name
    np.testing.assert_array_equal(recorded.own_kl, live.own_kl)


def test_a_recording_locates_damage_without_the_references_weights(tiny, tmp_path):
    model, _ = tiny("e4b")
    path = gl.record_reference(model, IDS, tmp_path / "reference.safetensors")
    name = "layers.4.self_attn.q_norm.weight"
    folder = damaged(tmp_path, "e4b", name, one_percent)
    report = gl.compare(gl.load(folder, "float32"), path, IDS)
    assert [d.name for d in report.divergences] == ["layers.4.attn.q"]
    assert report.first_divergence.tensors == (name,)


def test_a_recording_of_some_points_compares_these(tiny, tmp_path):
    model, _ = tiny("e4b")
    path = tmp_path / "reference.safetensors"
    gl.record_reference(model, IDS, path, points=["layers.*.resid_post", "logits"])
    folder = damaged(tmp_path, "e4b", "layers.4.mlp.up_proj.weight", lambda t: t[:9].mul_(2))
    report = gl.compare(gl.load(folder, "float32"), path)
    assert len(report.points) == 10
    assert report.first_divergence.name == "layers.4.resid_post"
    assert "was not captured on both sides" in report.first_divergence.why
    assert "layers.0.attn.z" in report.not_compared


def test_folders_and_gemloupe_models_are_references(tiny):
    _, folder = tiny("26b")
    model = gl.load(folder, "float32")
    from_folder = gl.compare(model, folder, IDS)
    assert from_folder.first_divergence is None and "transformers" in from_folder.reference
    other = gl.compare(model, gl.load(folder, "float32"), IDS)
    assert {point.verdict for point in other.points} == {"equal"}
    assert not other.kl.any()


def test_points_may_be_chosen(tiny):
    model, folder = tiny("31b")
    loaded = gl.load(folder, "float32")
    report = gl.compare(loaded, model, IDS, points="layers.2.mlp.*")
    assert {point.layer for point in report.points} == {2} and len(report.points) == 6
    assert len(report.kl) == len(IDS)
    assert {point.verdict for point in report.points} <= EXPLAINED - {"unchecked"}
    with pytest.raises(KeyError, match="matches no hook point"):
        gl.compare(loaded, model, IDS, points="layers.*.nothing")


def test_large_models_are_compared_a_few_layers_at_a_time(tiny, monkeypatch):
    from gemloupe.comparison import compare as module

    model, folder = tiny("e2b")
    loaded = gl.load(folder, "float32")
    whole = gl.compare(loaded, model, IDS)
    monkeypatch.setattr(sys.modules[module.__module__], "_GROUP_BYTES", 1)
    parts = gl.compare(loaded, model, IDS)
    assert parts.points == whole.points
    np.testing.assert_array_equal(parts.kl, whole.kl)


def test_tables_and_texts_name_dtypes_points_and_traps(tiny):
    model, folder = tiny("26b")
    report = gl.compare(gl.load(folder, "float32"), model, IDS)
    text = repr(report)
    for part in ("float32", "eager", " hook points", "40 positions", "router_logits", "none:"):
        assert part in text, part
    assert "hidden_states[-1] is final_norm" in text
    by_layer = report.table()
    assert len(by_layer) == 6 + 2
    assert [point.name for point in report.table(3)][0] == "layers.3.resid_pre"
    assert "layers.5.attn.z" in repr(report.table("layers.*.attn.z"))
    assert report._repr_html_().count("<table>") == 2
    with pytest.raises(KeyError, match="matches none"):
        report.table("nothing")
    with pytest.raises(KeyError, match="Did you mean"):
        report["layers.3.attn.zz"]


def test_plots_show_every_layer_and_the_first_divergence(tiny, tmp_path):
    import matplotlib

    matplotlib.use("agg")
    from gemloupe.plot import compare as plot

    model, _ = tiny("e2b")
    folder = damaged(tmp_path, "e2b", "layers.3.mlp.down_proj.weight", one_element)
    report = gl.compare(gl.load(folder, "float32"), model, IDS)
    ax = report.plot()
    image = ax.images[0].get_array()
    assert image.shape[0] == 9 + 2
    columns = [label.get_text() for label in ax.get_xticklabels()]
    ring = ax.collections[-1].get_offsets()[0]
    assert (columns[int(ring[0])], int(ring[1])) == ("mlp.out", 1 + 3)
    bars = plot.kl(report).containers[0]
    assert len(bars) == len(IDS)


def test_other_models_and_arguments_are_refused(tiny, tmp_path):
    _, folder = tiny("e2b")
    loaded = gl.load(folder, "float32")
    with pytest.raises(ValueError, match="another model: .*hidden_size is 44 .* 52"):
        gl.compare(loaded, tiny("31b")[0], IDS)
    with pytest.raises(ValueError, match="model_type None; expected a Gemma 4"):
        gl.compare(loaded, torch.nn.Linear(2, 2), IDS)
    with pytest.raises(ValueError, match="which has no logits"):
        gl.compare(loaded, tiny("e2b", text_only=True)[0].model, IDS)
    with pytest.raises(ValueError, match="reference is a int; expected"):
        gl.compare(loaded, 3, IDS)
    with pytest.raises(ValueError, match="inputs is None"):
        gl.compare(loaded, tiny("e2b")[0])
    with pytest.raises(ValueError, match="measure is 'x'; expected 'output' or 'kl'"):
        gl.compare(loaded, tiny("e2b")[0], IDS, measure="x")
    with pytest.raises(ValueError, match="reference_dtype is 'int4'"):
        gl.compare(loaded, folder, IDS, reference_dtype="int4")
    with pytest.raises(ValueError, match="GGUF"):
        gl.compare(loaded, "model.gguf", IDS)
    with pytest.raises(FileNotFoundError):
        gl.compare(loaded, tmp_path / "absent", IDS)
    packed = gl.convert(folder, tmp_path / "packed", "int8")
    with pytest.raises(ValueError, match="packed checkpoint"):
        gl.compare(loaded, packed, IDS)


def test_recording_refuses_what_it_cannot_run(tiny, tmp_path):
    model, _ = tiny("e2b")
    path = tmp_path / "reference.safetensors"
    with pytest.raises(ValueError, match="ids from 2 to 307; expected 0 to 306"):
        gl.record_reference(model, [2, 307], path)
    with pytest.raises(ValueError, match="tokenizer.json"):
        gl.record_reference(model, "text", path)
    with pytest.raises(ValueError, match="expected ids"):
        gl.record_reference(model, [0.5], path)
    with pytest.raises(KeyError, match="match no hook point"):
        gl.record_reference(model, IDS, path, points="nothing")
    assert list(tmp_path.iterdir()) == []


def altered(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Rewrites a recorded file with other tensors and metadata."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        data = json.loads(file.metadata()["gemloupe.reference"])
    tensors = load_file(path)
    change(tensors, data)
    save_file(tensors, path, {"gemloupe.reference": json.dumps(data)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, d: d.update(version=2), "version is 2; expected 1"),
        (lambda t, d: d.update(dtype="int4"), "dtype is 'int4'"),
        (lambda t, d: d.update(label=3), "label is 3"),
        (lambda t, d: d.update(prompts=[]), "prompts is \\[\\]"),
        (lambda t, d: d["prompts"][0].update(ids=[1.5]), "a list of integers"),
        (lambda t, d: d["shape"].pop("vocab_size"), "shape is"),
        (lambda t, d: d["shape"].update(hidden_size=45), "another model: hidden_size is 50"),
        (lambda t, d: t.update({"9/logits": t["0/logits"]}), "a tensor's name is '9/logits'"),
        (lambda t, d: t.update({"0/embed": t["0/embed"].astype(np.int8)}), "the dtype of 0/embed"),
        (lambda t, d: t.update({"0/embed": t["0/embed"].astype(int)}), "integers for experts"),
        (lambda t, d: t.update({"0/embed": t["0/embed"][:, 1:]}), "has shape \\[40, 50\\]"),
        (lambda t, d: t["0/layers.0.router.experts"].fill(99), "experts from 99 to 99"),
    ],
)
def test_hostile_recordings_are_value_errors(tiny, tmp_path, change, message):
    model, folder = tiny("26b")
    path = gl.record_reference(model, IDS, tmp_path / "reference.safetensors")
    altered(path, change)
    with pytest.raises(ValueError, match=message):
        gl.compare(gl.load(folder, "float32"), path)


def test_files_that_are_no_recordings_are_value_errors(tiny, tmp_path):
    _, folder = tiny("26b")
    loaded = gl.load(folder, "float32")
    with pytest.raises(ValueError, match="is no recorded reference"):
        gl.compare(loaded, folder / "model.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="ends inside"):
        gl.compare(loaded, cut)
    path = gl.record_reference(tiny("26b")[0], IDS, tmp_path / "reference.safetensors")
    with pytest.raises(ValueError, match="was not recorded"):
        gl.compare(loaded, path, IDS[:5])


def test_values_that_are_not_finite_diverge(tiny, tmp_path):
    model, folder = tiny("31b")
    path = gl.record_reference(model, IDS, tmp_path / "reference.safetensors")
    altered(path, lambda t, d: t["0/layers.1.mlp.up"].__setitem__((4, 2), np.nan))
    first = gl.compare(gl.load(folder, "float32"), path).first_divergence
    assert (first.name, first.position) == ("layers.1.mlp.up", 4)


def test_without_torch_gemloupe_imports_and_says_what_is_missing(tiny, tmp_path):
    _, folder = tiny("31b")
    script = """
import sys
sys.modules["torch"] = None
import gemloupe as gl
model = gl.load(sys.argv[1], "float32")
assert gl.compare(model, model, [2, 5, 6]).first_divergence is None
try:
    gl.compare(model, sys.argv[1], [2, 5, 6])
except ImportError as error:
    assert 'pip install "gemloupe[compare]"' in str(error), error
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_bounds_hold_for_float32_and_are_not_far_above_its_errors():
    draw = np.random.default_rng(0)
    x, w = draw.normal(size=(8, 700)), draw.normal(size=(90, 700))
    x, w = (np.float32(a).astype(np.float64) for a in (x, w))
    float32 = Roundings("float32")
    narrow, narrow_w = x.astype(np.float32), w.astype(np.float32)
    exponentials = np.exp(narrow - narrow.max(axis=1, keepdims=True))
    divisor = np.sqrt(np.mean(narrow**2, axis=1, keepdims=True) + np.float32(1e-6))
    cases = [
        (float32.linear(exact(x), lambda: iter([(0, 90, w)])), narrow @ narrow_w.T),
        (float32.softmax(exact(x)), exponentials / exponentials.sum(axis=1, keepdims=True)),
        (float32.rms_norm(exact(x), w[0], 1e-6), narrow / divisor * narrow_w[0]),
        (float32.add(exact(x), exact(x[::-1])), narrow + narrow[::-1]),
        (float32.softcap(exact(x), 30.0), np.float32(30) * np.tanh(narrow / np.float32(30))),
    ]
    for wide, got in cases:
        off = np.abs(got - wide.value)
        assert off.max() > 0
        assert (off <= wide.error).all()
        assert np.broadcast_to(wide.error, off.shape).max() < 2000 * off.max()


def test_results_below_float32s_normal_numbers_may_be_zero():
    pattern = Roundings("float32").softmax(exact(np.array([[0.0, -87.5, -np.inf]])))
    assert 0 < pattern.value[0, 1] < pattern.error[0, 1]
    assert pattern.value[0, 2] == 0 and pattern.error[0, 2] < 1e-37


def test_the_command_line_prints_the_report_and_tells_divergence_by_its_code(
    tiny, tmp_path, capsys
):
    _, good = tiny("e4b")
    bad = damaged(tmp_path, "e4b", "layers.2.layer_scalar", one_percent)
    ids, f32 = ",".join(map(str, IDS)), ["--dtype", "float32"]
    assert cli.main(["compare", str(good), str(good), "--ids", ids, *f32]) == 0
    assert "none: float noise" in capsys.readouterr().out
    assert cli.main(["compare", str(bad), str(good), "--ids", ids, "--layer", "2", *f32]) == 1
    out = capsys.readouterr().out
    assert "layers.2.resid_post at position" in out and "layers.2.attn.z" in out
    arguments = ["compare", str(good), str(good), "--gemloupe", "--ids", ids, "--dtype", "int4"]
    assert cli.main([*arguments, "--reference-dtype", "float32"]) == 0
    assert "output error" in capsys.readouterr().out
    assert cli.main(["compare", str(good), str(good)]) == 2
    assert "inputs is None" in capsys.readouterr().err
