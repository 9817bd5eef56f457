"""Sparse autoencoders from folders: every architecture's arithmetic, and hostile files.

tests/parity/saelens_package.py compares them with sae_lens itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from gemloupe.integrations.saelens import load_sae
from gemloupe.integrations.saelens.sae import ARCHITECTURES

D, F = 6, 10


def tensors(architecture: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    names = {
        "standard": ["b_enc"],
        "jumprelu": ["b_enc", "threshold"],
        "gated": ["b_gate", "b_mag", "r_mag"],
    }.get(architecture, ["b_enc"])
    made = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), **dict.fromkeys(names, (F,))}
    return {name: draw.standard_normal(shape, np.float32) for name, shape in made.items()}


def make(
    folder: Path, architecture: str = "standard", weights: dict | None = None, **config: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    values = {"architecture": architecture, "d_in": D, "d_sae": F}
    values["metadata"] = {"hook_name": "blocks.2.hook_resid_post", "sae_lens_version": "6.0.0"}
    if architecture in ("topk", "abstopk"):
        values["k"] = 3
    (folder / "cfg.json").write_text(json.dumps({**values, **config}))
    save_file(weights or tensors(architecture), folder / "sae_weights.safetensors")
    return folder


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((7, D)).astype(np.float32) * 2 + 0.3


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


def expected(architecture: str, w: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    """Features of z = x − b_dec, one row and one feature after the other."""
    raw = z @ w["W_enc"]
    if architecture == "standard":
        return relu(raw + w["b_enc"])
    if architecture == "jumprelu":
        pre = raw + w["b_enc"]
        return np.where(pre > w["threshold"], relu(pre), 0)
    if architecture == "gated":
        magnitude = z @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"]
        return np.where(raw + w["b_gate"] > 0, relu(magnitude), 0)
    features = np.zeros((len(z), F))
    for row, pre in zip(features, raw + w["b_enc"], strict=True):
        ranks = np.abs(pre) if architecture == "abstopk" else pre
        for index in sorted(range(F), key=lambda i: -ranks[i])[:3]:
            row[index] = pre[index] if architecture == "abstopk" else max(pre[index], 0)
    return features


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_and_decode_follow_the_architecture(
    tmp_path: Path, x: np.ndarray, architecture: str
) -> None:
    sae, w = load_sae(make(tmp_path, architecture)), tensors(architecture)
    features = sae.encode(x)
    np.testing.assert_allclose(features, expected(architecture, w, x - w["b_dec"]), atol=1e-5)
    np.testing.assert_allclose(sae.decode(features), features @ w["W_dec"] + w["b_dec"], atol=1e-5)
    np.testing.assert_allclose(sae.encode(x, [4, 1]), features[:, [4, 1]], atol=1e-6)
    assert sae.architecture == architecture and (sae.d_in, sae.d_sae) == (D, F)
    assert sae.hook_name == "blocks.2.hook_resid_post" and "blocks.2" in repr(sae)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_setting_features_moves_the_reconstruction_and_keeps_its_error(
    tmp_path: Path, x: np.ndarray, architecture: str, normalize: str
) -> None:
    sae = load_sae(make(tmp_path, architecture, normalize_activations=normalize))
    features = sae.encode(x)
    changed = features.copy()
    changed[:, 2], changed[:, 7] = 4.0, 0.0
    want = x + sae.decode(changed, x) - sae.decode(features, x)
    np.testing.assert_allclose(sae.with_features(x, {2: 4.0, 7: 0.0}), want, atol=2e-5)
    assert sae.with_features(x, {}).tolist() == x.tolist()


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_feature_parts_say_the_same_in_affine_terms(
    tmp_path: Path, x: np.ndarray, architecture: str, apply_b_dec: bool
) -> None:
    sae = load_sae(make(tmp_path, architecture, apply_b_dec_to_input=apply_b_dec))
    parts = sae.feature_parts([7, 2])
    assert parts is not None
    pre = x @ parts.encoder.T + parts.bias
    active = np.where(pre > parts.threshold, pre, 0)
    np.testing.assert_allclose(active, sae.encode(x, [7, 2]), atol=1e-5)
    want = x + (np.array([1.5, 0]) - active) @ parts.decoder
    np.testing.assert_allclose(sae.with_features(x, {7: 1.5, 2: 0}), want, atol=1e-5)
    with pytest.raises(IndexError, match="expected 0 to 9"):
        sae.feature_parts([10])


def test_what_is_not_affine_has_no_feature_parts(tmp_path: Path) -> None:
    for architecture in ("gated", "topk", "abstopk"):
        assert load_sae(make(tmp_path, architecture)).feature_parts([1]) is None
    make(tmp_path, "standard", normalize_activations="layer_norm")
    assert load_sae(tmp_path).feature_parts([1]) is None


def test_inputs_are_scaled_by_row_and_scaled_back(tmp_path: Path, x: np.ndarray) -> None:
    w = tensors("standard")
    sae = load_sae(make(tmp_path / "a", normalize_activations="layer_norm"))
    mean, deviation = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    z = (x - mean) / (deviation + 1e-5) - w["b_dec"]
    features = expected("standard", w, z)
    np.testing.assert_allclose(sae.encode(x), features, atol=1e-5)
    want = (features @ w["W_dec"] + w["b_dec"]) * deviation + mean
    np.testing.assert_allclose(sae.decode(sae.encode(x), x), want, atol=1e-4)

    sae = load_sae(make(tmp_path / "b", normalize_activations="constant_norm_rescale"))
    scale = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
    features = expected("standard", w, x / scale - w["b_dec"])
    np.testing.assert_allclose(sae.encode(x), features, atol=1e-5)
    want = (features @ w["W_dec"] + w["b_dec"]) * scale
    np.testing.assert_allclose(sae.decode(sae.encode(x), x), want, atol=1e-4)
    with pytest.raises(ValueError, match="decode needs x"):
        sae.decode(features)
    with pytest.raises(ValueError, match="x has 2 rows; expected 7"):
        sae.decode(features, x[:2])


def test_an_average_norm_is_folded_into_the_weights(tmp_path: Path, x: np.ndarray) -> None:
    make(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match=r"no activation_scaler\.json"):
        load_sae(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 2.5}')
    sae, w = load_sae(tmp_path), tensors("standard")
    np.testing.assert_allclose(sae.encode(x), expected("standard", w, 2.5 * x - w["b_dec"]), 1e-4)
    want = (sae.encode(x) @ w["W_dec"] + w["b_dec"]) / 2.5
    np.testing.assert_allclose(sae.decode(sae.encode(x)), want, atol=1e-5)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0}')
    with pytest.raises(ValueError, match="expected a number above 0"):
        load_sae(tmp_path)


def test_top_k_may_rank_by_the_decoder_norm(tmp_path: Path, x: np.ndarray) -> None:
    sae = load_sae(make(tmp_path, "topk", rescale_acts_by_decoder_norm=True))
    w = tensors("topk")
    norm = np.linalg.norm(w["W_dec"], axis=1)
    scaled = {**w, "W_enc": w["W_enc"] * norm, "b_enc": w["b_enc"] * norm}
    features = expected("topk", scaled, x - w["b_dec"])
    np.testing.assert_allclose(sae.encode(x), features, atol=1e-5)
    want = (features / norm) @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(sae.decode(sae.encode(x)), want, atol=1e-5)


def test_a_finetuned_factor_scales_the_features_in_decode(tmp_path: Path, x: np.ndarray) -> None:
    w = tensors("standard")
    factor = np.linspace(0.5, 2, F, dtype=np.float32)
    weights = {**w, "scaling_factor": factor}
    with pytest.raises(ValueError, match="finetuning_scaling_factor is not true"):
        load_sae(make(tmp_path / "a", weights=weights))
    sae = load_sae(make(tmp_path / "a", weights=weights, finetuning_scaling_factor=True))
    features = sae.encode(x)
    want = (features * factor) @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(sae.decode(features), want, atol=1e-5)
    ones = {**w, "scaling_factor": np.ones(F, np.float32)}
    assert load_sae(make(tmp_path / "b", weights=ones)).scaling_factor is None


def test_older_configs_are_read(tmp_path: Path, x: np.ndarray) -> None:
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "hook_point": "h"}
    sae = load_sae(make(tmp_path / "a", architecture="standard", **old, metadata=None))
    assert (sae.architecture, sae.k, sae.hook_name) == ("topk", 3, "h")
    weights = tensors("jumprelu")
    weights["log_threshold"] = np.log(np.abs(weights.pop("threshold")))
    sae = load_sae(make(tmp_path / "b", "jumprelu", weights))
    np.testing.assert_allclose(sae.vectors["threshold"], np.exp(weights["log_threshold"]), 1e-6)
    sae = load_sae(make(tmp_path / "c", normalize_activations=False, apply_b_dec_to_input=False))
    w = tensors("standard")
    np.testing.assert_allclose(sae.encode(x), expected("standard", w, x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_other_weight_types_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: torch.tensor(w).to(dtype) for name, w in tensors("standard").items()}
    save_torch(weights, make(tmp_path) / "sae_weights.safetensors")
    sae = load_sae(tmp_path)
    assert sae.W_enc.dtype == np.float32 and not sae.W_enc.flags.writeable
    assert np.array_equal(sae.W_enc, weights["W_enc"].float().numpy())


def test_heads_are_flattened_and_given_back(tmp_path: Path, x: np.ndarray) -> None:
    sae = load_sae(make(tmp_path))
    z = x.reshape(7, 2, 3)
    assert np.array_equal(sae.encode(z), sae.encode(x))
    assert np.array_equal(
        sae.with_features(z, {1: 2.0}).reshape(7, D), sae.with_features(x, {1: 2.0})
    )


def test_wrong_arguments_are_refused(tmp_path: Path, x: np.ndarray) -> None:
    sae = load_sae(make(tmp_path))
    with pytest.raises(ValueError, match=r"shape \[7, 5\]; expected \[T, 6\]"):
        sae.encode(x[:, :5])
    with pytest.raises(ValueError, match=r"shape \[6\]; expected \[T, 6\]"):
        sae.encode(x[0])
    with pytest.raises(IndexError, match="expected 0 to 9"):
        sae.with_features(x, {10: 1.0})
    with pytest.raises(IndexError, match="expected 0 to 9"):
        sae.encode(x, [-1])
    with pytest.raises(ValueError, match="expected a list of numbers"):
        sae.with_features(x, {"cat": 1.0})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"features has shape \[7, 6\]; expected \[T, 10\]"):
        sae.decode(x)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"architecture": "transcoder"}, "architecture is 'transcoder'"),
        ({"architecture": ["standard"]}, "expected a string"),
        ({"activation_fn": "tanh-relu"}, "activation_fn"),
        ({"activation_fn_kwargs": [1]}, "activation_fn_kwargs"),
        ({"d_in": 0}, "d_in is 0"),
        ({"d_sae": "10"}, "d_sae is '10'"),
        ({"d_in": 2**40}, "from 1 to"),
        ({"architecture": "topk", "k": None}, "k is None"),
        ({"architecture": "topk", "k": 11}, "1 to d_sae"),
        ({"rescale_acts_by_decoder_norm": True}, "false for this architecture"),
        ({"apply_b_dec_to_input": "yes"}, "true or false"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations"),
        ({"d_in": 7}, r"shape \[6, 10\]; expected \[7, 10\]"),
        ({"architecture": "jumprelu"}, "has no 'threshold'"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(
    tmp_path: Path, config: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        load_sae(make(tmp_path, weights=tensors("standard"), **config))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    weights = tensors("standard")
    with pytest.raises(ValueError, match="has 'W_gate'"):
        load_sae(make(tmp_path, weights={**weights, "W_gate": weights["W_enc"]}))
    with pytest.raises(ValueError, match="dtype I32"):
        load_sae(make(tmp_path, weights={**weights, "b_enc": np.zeros(F, np.int32)}))
    with pytest.raises(ValueError, match="holds nan; expected finite"):
        load_sae(make(tmp_path, weights={**weights, "b_enc": np.full(F, np.nan, np.float32)}))
    with pytest.raises(ValueError, match="which float32 cannot hold"):
        load_sae(make(tmp_path, weights={**weights, "b_enc": np.full(F, 1e300)}))
    dead = {**tensors("jumprelu"), "threshold": np.full(F, np.inf, np.float32)}
    sae = load_sae(make(tmp_path, "jumprelu", dead))
    assert not sae.encode(np.ones((2, D))).any()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-8], whole + b"x", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"sae_weights\.safetensors"):
            load_sae(tmp_path)
    path.write_bytes(whole)
    for text in ("", "[]", '{"d_in": 6, "d_in": 7}', "{" * 100_000, '{"d_in": 1e999}'):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(ValueError, match=r"cfg\.json"):
            load_sae(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        load_sae(tmp_path)
    make(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae_weights\.safetensors"):
        load_sae(tmp_path)
