"""Layers of the released sizes equal transformers, operation by operation.

Tolerances come from the operands. A float32 dot product of K terms rounds K partial sums; these
are about as large as the norm of the terms, |w x|, and their errors are independent, so they add
like a random walk: sqrt(K) * u * |w x|, u = 2^-24, whatever the order. Two implementations whose
inputs already differ are compared with that bound plus the exact effect of the inputs' difference;
so every operation is held to its own rounding.
"""

from __future__ import annotations

import gc
import shutil

import numpy as np
import pytest
import torch
from full_size import FULL_SIZE, WINDOW, load_full_size, write_full_size
from parity_checks import TIE, assert_experts_equal_or_tied, attention_and_bound
from safetensors import safe_open

import gemloupe as gl
from tiny_models import hf_run, random_ids

UNIT_ROUNDOFF = 2.0**-24
# Standard deviations of the random walk that 10^7 outputs may reach on each side.
DEVIATIONS = 6.0

# Output of a matrix product: (hook point, its input's hook point, weight's name in the layer).
PRODUCTS = (
    ("attn.q_proj", "attn.norm", "self_attn.q_proj.weight"),
    ("attn.k_proj", "attn.norm", "self_attn.k_proj.weight"),
    ("attn.v_proj", "attn.norm", "self_attn.v_proj.weight"),
    ("attn.out", "attn.z", "self_attn.o_proj.weight"),
    ("mlp.gate", "mlp.norm", "mlp.gate_proj.weight"),
    ("mlp.up", "mlp.norm", "mlp.up_proj.weight"),
    ("mlp.out", "mlp.hidden", "mlp.down_proj.weight"),
    ("router.logits", "router.norm", "router.proj.weight"),
    ("per_layer.gate", "resid_ffn", "per_layer_input_gate.weight"),
    ("per_layer.out", "per_layer.hidden", "per_layer_projection.weight"),
)
# Output of an RMSNorm: (hook point, its input's, weight's name); None is the norm without weights.
NORMS = (
    ("attn.norm", "resid_pre", "input_layernorm.weight"),
    ("attn.q", "attn.q_proj", "self_attn.q_norm.weight"),
    ("attn.k", "attn.k_proj", "self_attn.k_norm.weight"),
    ("attn.v", "attn.v_proj", None),
    ("attn.post", "attn.out", "post_attention_layernorm.weight"),
    ("mlp.norm", "resid_mid", "pre_feedforward_layernorm.weight"),
    ("experts.norm", "resid_mid", "pre_feedforward_layernorm_2.weight"),
    ("ffn.post", "ffn.out", "post_feedforward_layernorm.weight"),
    ("per_layer.post", "per_layer.out", "post_per_layer_input_norm.weight"),
)


class Layer:
    """One layer's values on both sides, and its weights as they lie in the file."""

    def __init__(self, folder, index: int, got, want) -> None:
        self._prefix = f"layers.{index}."
        self._got, self._want, self._file = got, want, folder / "model.safetensors"

    def pair(self, point: str) -> tuple[np.ndarray, np.ndarray]:
        name = self._prefix + point
        return self._got[name].astype(np.float64), self._want[name].astype(np.float64)

    def has(self, point: str) -> bool:
        return self._prefix + point in self._want

    def weight(self, name: str) -> torch.Tensor:
        with safe_open(self._file, "pt") as tensors:
            prefix = "model." + self._prefix
            if name.endswith("v_proj.weight") and prefix + name not in tensors.keys():
                name = name.replace("v_proj", "k_proj")  # K = V: values are the raw keys.
            return tensors.get_tensor(prefix + name).float()


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


def assert_within(difference: np.ndarray, bound: np.ndarray, name: str) -> None:
    ratio = float((np.abs(difference) / np.maximum(bound, 1e-30)).max())
    assert ratio <= 1, f"{name}: {ratio:.2f} times the bound"


def check_product(layer: Layer, out: str, source: str, weight_name: str) -> None:
    weight = layer.weight(weight_name)
    (got, want), (got_x, want_x) = layer.pair(out), layer.pair(source)
    got, want, got_x, want_x = flat(got), flat(want), flat(got_x), flat(want_x)
    moved = (torch.from_numpy((got_x - want_x).astype(np.float32)) @ weight.T).numpy()
    squares = torch.from_numpy((got_x**2 + want_x**2).astype(np.float32)) @ weight.T**2
    walk = DEVIATIONS * UNIT_ROUNDOFF * weight.shape[1] ** 0.5
    assert_within(got - want - moved, walk * squares.sqrt().numpy(), out)


def check_norm(layer: Layer, out: str, source: str, weight_name: str | None) -> None:
    got, x = layer.pair(out)[0], layer.pair(source)[0]
    exact = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    if weight_name is not None:
        exact = exact * layer.weight(weight_name).numpy()
    # The mean's rounding (a sum of squares: no cancellation), then power, product and product.
    roundoff = UNIT_ROUNDOFF * (DEVIATIONS * x.shape[-1] ** 0.5 / 2 + 8)
    assert_within(got - exact, roundoff * np.abs(exact), out)


def check_gate(layer: Layer, out: str, gate_point: str, factor_point: str) -> None:
    got, gate, factor = (layer.pair(point)[0] for point in (out, gate_point, factor_point))
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    exact = 0.5 * gate * (1 + np.tanh(inner)) * factor
    # 1 + tanh cancels for negative gates, so its error is absolute; tanh's argument has its own.
    slope = 1 / np.cosh(np.clip(inner, -40, 40)) ** 2
    roundoff = UNIT_ROUNDOFF * (16 + 8 * np.abs(inner) * slope)
    assert_within(got - exact, roundoff * np.abs(gate * factor), out)


def check_attention(layer: Layer, source: Layer, window: int | None) -> None:
    """Checks z of `layer`, whose keys and values are those of `source`."""
    got, q = layer.pair("attn.z")[0], layer.pair("attn.rot_q")[0]
    keys, values = source.pair("attn.rot_k")[0], source.pair("attn.v")[0]
    roundoff = UNIT_ROUNDOFF * (q.shape[-1] + len(q))
    exact, bound = attention_and_bound(q, keys, values, window, roundoff)
    assert_within(got - exact, bound, "attn.z")
    for point in ("attn.rot_q", "attn.rot_k"):
        if layer.has(point):
            assert_whole_tensor(*layer.pair(point), point)


def check_layer(layer: Layer) -> None:
    for product in PRODUCTS:
        if layer.has(product[0]):
            check_product(layer, *product)
    for norm in NORMS:
        if layer.has(norm[0]):
            check_norm(layer, *norm)
    check_gate(layer, "mlp.hidden", "mlp.gate", "mlp.up")
    if layer.has("per_layer.gate"):
        check_gate(layer, "per_layer.hidden", "per_layer.gate", "per_layer.in")


def check_experts(layer: Layer) -> None:
    got, want = layer.pair("router.experts")
    probs = layer.pair("router.probs")[1]
    assert_experts_equal_or_tied(got.astype(int), probs, "router.experts")
    # A tied token's output may differ wholly; the random weights here have none.
    ordered = np.sort(probs, axis=1)
    k = got.shape[1]
    assert (ordered[:, -k] - ordered[:, -k - 1]).min() > TIE
    assert np.array_equal(np.sort(got, axis=1), np.sort(want, axis=1))
    got_out, want_out = layer.pair("experts.out")
    assert_whole_tensor(got_out, want_out, "experts.out")


def assert_whole_tensor(got: np.ndarray, want: np.ndarray, name: str) -> None:
    bound = 1e-4 * max(1.0, np.abs(want).max())
    assert np.abs(got - want).max() <= bound, f"{name}: {np.abs(got - want).max():.2e}"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_layers_equal_transformers(name, tmp_path):
    try:
        write_full_size(name, tmp_path)
        ids = random_ids(2 * WINDOW + 5)
        # One side in memory at a time: the largest has 4 GB of float32 weights.
        want = hf_run(load_full_size(tmp_path), ids)
        gc.collect()
        points = {p for product in PRODUCTS for p in product[:2]} | {n[0] for n in NORMS}
        points |= {n[1] for n in NORMS} | {"resid_post", "per_layer.in", "mlp.hidden"}
        points |= {"router.experts", "router.probs", "experts.out", "attn.rot_q", "attn.rot_k"}
        names = [n for n in want if n.split(".", 2)[-1] in points and n.startswith("layers.")]
        run = gl.load(tmp_path, dtype="float32").run(ids, logits="all", capture=names)
        got, logits = dict(run.captured), run.logits
        del run
        gc.collect()
        layers = [Layer(tmp_path, i, got, want) for i in range(len(FULL_SIZE[name]["layer_types"]))]
        for index, layer in enumerate(layers):
            check_layer(layer)
            is_sliding = FULL_SIZE[name]["layer_types"][index] == "sliding_attention"
            source = layer if layer.has("attn.rot_k") else layers[index - 2]
            check_attention(layer, source, WINDOW if is_sliding else None)
            if layer.has("router.experts"):
                check_experts(layer)
            assert_whole_tensor(*layer.pair("resid_post"), "resid_post")
        assert_whole_tensor(logits, want["logits"], "logits")
    finally:
        shutil.rmtree(tmp_path)
