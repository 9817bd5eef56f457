"""Hook points that transformers lacks, held to those that it has by what must be equal.

`CAPTURED` and `EDITED` say which test proves which point (a layer's without "layers.{i}."); the
table on the page about hooks is made of them, and of what equals transformers (tests/parity).
"""

from __future__ import annotations

import numpy as np
import pytest

import gemloupe as gl
from tiny_models import VARIANTS, random_ids

pytestmark = pytest.mark.core  # repeated for every instruction set

# A norm -> the point that it divides. The per-layer context is normed from no point.
NORMED = {
    "attn.norm": "resid_pre", "attn.q": "attn.q_proj", "attn.k": "attn.k_proj",
    "attn.v": "attn.v_proj", "attn.post": "attn.out", "mlp.norm": "resid_mid",
    "mlp.post": "mlp.out",
    "router.norm": "resid_mid", "experts.norm": "resid_mid", "experts.post": "experts.out",
    "ffn.post": "ffn.out", "per_layer.post": "per_layer.out", "final_norm": "resid_post",
    "per_layer_inputs.context": "",
}  # fmt: skip
SCALES = [f"{name}.scale" for name in NORMED]

CAPTURED = {
    **dict.fromkeys(SCALES, "test_scales_are_the_root_mean_squares_that_norms_divide_by"),
    "per_layer_inputs.token": "test_per_layer_inputs_are_made_of_two_parts_and_read_by_layers",
    "per_layer_inputs": "test_per_layer_inputs_are_made_of_two_parts_and_read_by_layers",
    "attn.result": "test_heads_add_up_to_the_output_of_attention",
    "resid_ffn": "test_the_residual_stream_is_the_sum_of_what_is_added",
    "resid_unscaled": "test_the_residual_stream_is_the_sum_of_what_is_added",
    "router.weights_norm": "test_choices_and_weights_follow_from_the_probabilities",
}
EDITED = {
    **dict.fromkeys(SCALES, "test_a_doubled_scale_halves_what_its_norm_gives"),
    "per_layer_inputs": "test_per_layer_inputs_are_made_of_two_parts_and_read_by_layers",
    "per_layer.in": "test_per_layer_inputs_are_made_of_two_parts_and_read_by_layers",
    "attn.rot_k": "test_rotated_keys_are_what_every_layer_that_shares_them_reads",
    "attn.result": "test_a_heads_result_is_its_z_times_its_columns",
    "resid_mid": "test_edits_of_the_middle_of_a_layer_are_those_of_what_is_added_before",
    "resid_ffn": "test_edits_of_the_middle_of_a_layer_are_those_of_what_is_added_before",
    "resid_unscaled": "test_an_unscaled_residual_is_scaled_like_any_other",
    "logits": "test_edited_logits_are_what_a_run_returns_and_generate_samples_from",
    "router.probs": "test_an_expert_without_probability_is_one_without_logit",
    "router.experts": "test_forced_experts_equal_transformers_with_its_router_patched",
    "router.weights_norm": "test_halved_weights_halve_the_experts_outputs",
    "experts.hidden": "test_halved_weights_halve_the_experts_outputs",
    "experts.each": "test_halved_weights_halve_the_experts_outputs",
}


@pytest.fixture
def model(tiny, variant):
    return gl.load(tiny(variant)[1], dtype="float32")


def norms(model: gl.Model) -> list[tuple[str, str]]:
    """(norm, the point that it divides or "")."""
    last = model.config.text.num_hidden_layers - 1
    found = []
    for name in gl.hook_points(model):
        if not name.endswith(".scale"):
            continue
        norm = name.removesuffix(".scale")
        layer = norm.split(".")[1] if norm.startswith("layers.") else str(last)
        divided = NORMED[norm.removeprefix(f"layers.{layer}.")]
        found.append((norm, f"layers.{layer}.{divided}" if divided else ""))
    return found


def close(got: np.ndarray, want: np.ndarray, name: str = "", bound: float = 1e-4) -> None:
    atol = bound * max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, atol=atol, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_are_the_root_mean_squares_that_norms_divide_by(model):
    text = model.config.text
    pairs = norms(model)
    names = {name for norm, divided in pairs for name in (f"{norm}.scale", divided) if name}
    run = model.run(random_ids(11), capture=[*names, "embed"])
    for norm, divided in pairs:
        if divided:
            x = run[divided]
        else:
            weight = model.weights["per_layer_model_projection.weight"]
            x = run["embed"] @ weight.T / np.sqrt(text.hidden_size)
            x = x.reshape(len(x), text.num_hidden_layers, -1)
        want = np.sqrt((x.astype(np.float64) ** 2).mean(-1) + text.rms_norm_eps)
        got = run[f"{norm}.scale"]
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-5, err_msg=norm)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_doubled_scale_halves_what_its_norm_gives(model):
    ids = random_ids(11)
    pairs = norms(model)
    plain = model.run(ids, capture=[norm for norm, _ in pairs], logits="all")
    for norm, _ in pairs:
        edit = {f"{norm}.scale": gl.edits.scale(2.0)}
        got = model.run(ids, capture=norm, edit=edit, logits="all")[norm]
        np.testing.assert_allclose(got, plain[norm] / 2, rtol=1e-6, err_msg=norm)


@pytest.mark.parametrize("variant", ["e2b", "e4b"])
def test_per_layer_inputs_are_made_of_two_parts_and_read_by_layers(model):
    ids = random_ids(11)
    parts = ["per_layer_inputs.token", "per_layer_inputs.context", "per_layer_inputs"]
    run = model.run(ids, capture=[*parts, "layers.*.per_layer.in"])
    close(run[parts[2]], (run[parts[0]] + run[parts[1]]) / np.sqrt(2))
    for layer in range(model.config.text.num_hidden_layers):
        np.testing.assert_array_equal(run[f"layers.{layer}.per_layer.in"], run[parts[2]][:, layer])

        # Not a factor: the norm behind the branch would take it out again.
        def move(x, layer=layer):
            x[:, layer] += 0.5

        at_all = model.run(ids, edit={parts[2]: move}).logits
        at_one = model.run(ids, edit={f"layers.{layer}.per_layer.in": gl.edits.add(0.5)}).logits
        close(at_all, at_one)
        assert np.abs(at_one - run.logits).max() > 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_residual_stream_is_the_sum_of_what_is_added(model):
    run = model.run(random_ids(11), capture=["layers.*.resid_*", "layers.*.*.post"])
    for layer in range(model.config.text.num_hidden_layers):
        at = {name.split(".", 2)[2]: run[name] for name in run.captured if f".{layer}." in name}
        close(at["resid_mid"], at["resid_pre"] + at["attn.post"])
        close(at["resid_ffn"], at["resid_mid"] + at["ffn.post"])
        close(at["resid_unscaled"], at["resid_ffn"] + at.get("per_layer.post", 0))
        scalar = model.weights[f"layers.{layer}.layer_scalar"]
        close(at["resid_post"], at["resid_unscaled"] * scalar)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unscaled_residual_is_scaled_like_any_other(model):
    ids = random_ids(11)
    for layer in (0, model.config.text.num_hidden_layers - 1):
        scalar = float(model.weights[f"layers.{layer}.layer_scalar"][0])
        edit = {f"layers.{layer}.resid_unscaled": gl.edits.add(1.0)}
        want = {f"layers.{layer}.resid_post": gl.edits.add(scalar)}
        close(model.run(ids, edit=edit).logits, model.run(ids, edit=want).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotated_keys_are_what_every_layer_that_shares_them_reads(model):
    ids = random_ids(11)
    layers = model.config.text.layers
    plain = model.run(ids).logits
    for owner in sorted({layer.kv_source for layer in layers}):
        readers = [i for i, layer in enumerate(layers) if layer.kv_source == owner]
        got = model.run(ids, edit={f"layers.{owner}.attn.rot_k": gl.edits.scale(1.5)}).logits
        edit = {f"layers.{reader}.attn.keys": gl.edits.scale(1.5) for reader in readers}
        close(got, model.run(ids, edit=edit).logits, f"layer {owner}")
        assert np.abs(got - plain).max() > 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_heads_result_is_its_z_times_its_columns(model):
    ids = random_ids(11)
    for layer in (0, model.config.text.num_hidden_layers - 1):
        half = gl.edits.scale(0.5, heads=1)
        at_result = model.run(ids, edit={f"layers.{layer}.attn.result": half}).logits
        at_z = model.run(ids, edit={f"layers.{layer}.attn.z": half}).logits
        close(at_result, at_z)
        assert np.abs(at_z - model.run(ids).logits).max() > 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_edited_logits_are_what_a_run_returns_and_generate_samples_from(model):
    ids = random_ids(11)
    plain = model.run(ids, logits="all").logits
    run = model.run(ids, logits="all", capture="logits", edit={"logits": gl.edits.scale(2.0)})
    np.testing.assert_array_equal(run.logits, 2 * plain)
    np.testing.assert_array_equal(run["logits"], run.logits)
    token = int(plain[-1].argmin())

    def prefer(x):
        x[:, token] = 1e3

    out = model.generate(ids, max_new_tokens=3, temperature=0, stop=(), edit={"logits": prefer})
    assert set(out.ids.tolist()) == {token}


def test_an_expert_without_probability_is_one_without_logit(tiny):
    model = gl.load(tiny("26b")[1], dtype="float32")
    ids = random_ids(21)

    def never(x):
        x[:, [2, 5]] = 0

    got = model.run(ids, logits="all", edit={"layers.1.router.probs": never})
    want = model.run(
        ids, logits="all", edit={"layers.1.router.logits": gl.edits.ablate_experts([2, 5])}
    )
    np.testing.assert_array_equal(got.routing.experts[1], want.routing.experts[1])
    close(got.logits, want.logits)


def test_halved_weights_halve_the_experts_outputs(tiny):
    model = gl.load(tiny("26b")[1], dtype="float32")
    ids = random_ids(21)
    half = gl.edits.scale(0.5)
    want = model.run(ids, logits="all", edit={"layers.1.experts.out": half}).logits
    for name in ("router.weights_norm", "router.weights", "experts.hidden", "experts.each"):
        close(model.run(ids, logits="all", edit={f"layers.1.{name}": half}).logits, want, name)
    # The norm after the sum would hide a factor that all have: one choice alone, too.

    def halve_first(x):
        x[:, 0] /= 2

    each = model.run(ids, logits="all", edit={"layers.1.experts.each": halve_first}).logits
    for name in ("router.weights_norm", "router.weights", "experts.hidden"):
        got = model.run(ids, logits="all", edit={f"layers.1.{name}": halve_first}).logits
        close(got, each, name)
    assert np.abs(each - want).max() > 1e-6
