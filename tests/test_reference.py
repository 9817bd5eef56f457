"""The NumPy reference equals transformers 5.23 (float32, eager) on every variant of the family."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

import reference
from hf_process import hf_logits_far
from reference.config import Rope, parse_config
from reference.rope import inverse_frequencies
from tiny_models import VARIANTS, hf_run, make_tiny, random_ids, text_config

# What float32 rounding may do over a dozen layers; a wrong formula is off by more than 0.01.
LOGIT_TOLERANCE = 1e-4


def assert_close(got: np.ndarray, want: np.ndarray, name: str) -> None:
    """Compares with |got - want| <= 1e-4 * max(1, max|want|); masked scores must match exactly."""
    assert got.shape == want.shape, name
    hidden = np.isneginf(want)
    assert np.array_equal(np.isneginf(got), hidden), f"{name}: other positions are masked"
    bound = LOGIT_TOLERANCE * max(1.0, np.abs(want[~hidden]).max())
    worst = np.abs(got[~hidden] - want[~hidden]).max()
    assert worst <= bound, f"{name}: off by {worst:.2e}, allowed {bound:.2e}"


def ids_of_eight_windows(model: torch.nn.Module) -> list[int]:
    return random_ids(8 * text_config(model).sliding_window + 3)


@pytest.mark.parametrize("style", ["transformers", "released"])
@pytest.mark.parametrize("text_only", [False, True], ids=["multimodal", "text-only"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_every_hook_point_equal_transformers(tiny, variant, text_only, style):
    model, folder = tiny(variant, text_only=text_only, style=style)
    ids = ids_of_eight_windows(model)
    want = hf_run(model, ids)
    got = reference.load(folder).run(ids)
    assert {"logits", "embed", "layers.0.resid_post", "layers.0.attn.scores"} <= want.keys()
    for name in want:
        assert_close(got[name], want[name], name)
    assert np.abs(got["logits"] - want["logits"]).max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_files_in_shards_are_read_exactly(tiny, variant, dtype):
    model, folder = tiny(variant, dtype=dtype, style="released", shards=3)
    ids = ids_of_eight_windows(model)
    assert_close(reference.load(folder).run(ids)["logits"], hf_run(model, ids)["logits"], "logits")


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_the_saved_files_as_the_same_model(tiny, variant):
    model, folder = tiny(variant, dtype="bfloat16", style="released", shards=3)
    loaded = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if variant == "26b":
        loaded.set_experts_implementation("eager")
    ids = random_ids(20)
    assert np.array_equal(hf_run(loaded, ids)["logits"], hf_run(model, ids)["logits"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_seeds_give_the_same_model_and_other_seeds_another(variant):
    ids = random_ids(9)
    first, again, other = (hf_run(make_tiny(variant, seed=s), ids)["logits"] for s in (3, 3, 4))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_models_reach_every_nonlinearity(tiny, variant):
    model, _folder = tiny(variant)
    values = hf_run(model, ids_of_eight_windows(model))
    assert np.abs(values["logits"] - values["logits_raw"]).max() > 0.05
    assert np.abs(values["logits"]).max() < 0.995 * text_config(model).final_logit_softcapping
    for name in (n for n in values if n.endswith("attn.pattern")):
        largest = values[name][:, -1].max(axis=-1).mean()
        width = np.count_nonzero(values[name][0, -1])
        assert 1.5 / width < largest < 0.98, f"{name}: uniform or one-hot"
    for name in (n for n in values if n.endswith("router.probs")):
        assert len(np.unique(values[name.replace("probs", "experts")])) == values[name].shape[-1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_constant_initialised_parameters_are_random(variant):
    model = make_tiny(variant)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1 and tensor.numel() > 1:
            assert tensor.std() > 0.05, name
        if name.endswith("layer_scalar"):
            assert abs(float(tensor) - 1) > 1e-4, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_stored_tensor_matters(variant):
    model = make_tiny(variant, text_only=True)
    ids = random_ids(30)
    logits = hf_run(model, ids)["logits"]
    # Of each kind the first layer's: the final norm cancels the last layer's layer_scalar.
    kinds: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        kinds.setdefault(re.sub(r"\d+", "N", name), tensor)
    for kind, tensor in kinds.items():
        kept = tensor.clone()
        tensor.fill_(1) if tensor.dim() == 1 else tensor.copy_(tensor.roll(1, dims=-1))
        assert np.abs(hf_run(model, ids)["logits"] - logits).max() > 1e-2, kind
        tensor.copy_(kept)


def test_bidirectional_attention_sees_both_sides(tiny):
    model, folder = tiny("31b", text_only=True, use_bidirectional_attention="all")
    ids = ids_of_eight_windows(model)
    want, got = hf_run(model, ids), reference.load(folder).run(ids)
    for name in want:
        assert_close(got[name], want[name], name)


def test_a_config_without_layer_types_has_every_sixth_layer_full(tiny):
    _model, folder = tiny("31b")
    config = json.loads((folder / "config.json").read_text())["text_config"]
    kinds = [layer.kind for layer in reference.load(folder).config.layers]
    del config["layer_types"]
    assert [layer.kind for layer in parse_config(config).layers] == kinds


FAR_STARTS = (4_000, 131_000, 262_000)


@pytest.fixture(scope="module")
def far_logits(tiny, tmp_path_factory):
    """Returns {(variant, start): logits} of transformers, 100 tokens from each far position."""
    keys = [(variant, start) for variant in VARIANTS for start in FAR_STARTS]
    jobs = [(tiny(variant, text_only=True)[1], random_ids(100), start) for variant, start in keys]
    return dict(zip(keys, hf_logits_far(jobs, tmp_path_factory.mktemp("far")), strict=True))


@pytest.mark.parametrize("start", FAR_STARTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_far_positions_equal_transformers(tiny, far_logits, variant, start):
    folder = tiny(variant, text_only=True)[1]
    got = reference.load(folder).run(random_ids(100), range(start, start + 100))
    assert_close(got["logits"], far_logits[variant, start], "logits")


def test_published_frequencies_are_reproduced():
    frequencies = inverse_frequencies(Rope(1e6, 0.25, 1.0), 512)
    assert np.count_nonzero(frequencies) == 64
    assert frequencies[1] == pytest.approx(0.947464, abs=1e-6)
    assert frequencies[63] == pytest.approx(0.0333763, abs=1e-7)
