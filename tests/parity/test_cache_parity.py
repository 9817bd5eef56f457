"""What the KV cache holds in each storage type, and what its rounding may do."""

from __future__ import annotations

import numpy as np
import pytest
from parity_checks import assert_tensor_close, attention_and_bound

import gemloupe as gl
import reference
from reference import attention as reference_attention
from tiny_models import VARIANTS, hf_run, random_ids, text_config, text_model

# Unit roundoff of each storage type: half a unit in the last place of its significand.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Below float16's smallest normal number the error is absolute.
SMALLEST = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}


@pytest.mark.parametrize("sliding", ["ring", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_keys_and_values_equal_transformers(tiny, variant, sliding):
    model, folder = tiny(variant)
    ids = random_ids(8 * text_config(model).sliding_window + 3)
    want = hf_run(model, ids)
    mine = gl.load(folder, dtype="float32")
    cache = mine.new_cache(max_tokens=len(ids), sliding=sliding)
    mine.run(ids, cache=cache, chunk=8)
    for index, layer in enumerate(cache.layers):
        positions = list(layer.positions)
        assert positions[-1] == len(ids) - 1
        for name, got in (("keys", layer.keys), ("values", layer.values)):
            expected = want[f"layers.{index}.attn.{name}"][positions]
            assert_tensor_close(got, expected, f"layers.{index}.{name}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_of_the_cache_say_what_they_are(tiny, variant):
    model, folder = tiny(variant)
    config = text_config(model)
    cache = gl.load(folder, dtype="float32").new_cache(max_tokens=1000)
    for index, (layer, module) in enumerate(
        zip(cache.layers, text_model(model).layers, strict=True)
    ):
        if module.self_attn.is_kv_shared_layer:
            assert layer.kind == "shared" and layer.nbytes == 0
            assert config.layer_types[layer.source_layer] == config.layer_types[index]
        else:
            assert layer.kind == config.layer_types[index].removesuffix("_attention")
            assert layer.source_layer == index


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_keys_and_values_are_rounded_once(tiny, variant, kv_dtype):
    model, folder = tiny(variant)
    ids = random_ids(40)
    mine = gl.load(folder, dtype="float32", kv_dtype=kv_dtype)
    cache = mine.new_cache(max_tokens=len(ids), sliding="full")
    run = mine.run(ids, cache=cache, capture=["layers.*.attn.rot_k", "layers.*.attn.v"])
    for index, layer in enumerate(cache.layers):
        if layer.kind == "shared":
            continue
        for stored, name in ((layer.keys, "rot_k"), (layer.values, "v")):
            exact = run[f"layers.{index}.attn.{name}"]
            bound = UNIT_ROUNDOFF[kv_dtype] * np.abs(exact) + SMALLEST[kv_dtype]
            assert (np.abs(stored - exact) <= bound).all(), f"layers.{index}.attn.{name}"


def perturbed_logits(folder, ids, roundoff: float, seed: int, monkeypatch) -> np.ndarray:
    """Returns the reference's logits where every key and value is off by exactly `roundoff`."""
    generator = np.random.default_rng(seed)
    exact = reference_attention.keys_and_values

    def perturbed(*arguments):
        return tuple(
            x * (1 + roundoff * generator.choice([-1.0, 1.0], x.shape)) for x in exact(*arguments)
        )

    with monkeypatch.context() as patch:
        patch.setattr(reference_attention, "keys_and_values", perturbed)
        return reference.load(folder).run(ids)["logits"]


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_caches_cost_no_more_than_their_rounding(
    tiny, variant, kv_dtype, monkeypatch
):
    # Rounding is off by at most the unit roundoff; the reference with keys and values off by
    # exactly that, in random directions, gives the size of the effect on the logits.
    _model, folder = tiny(variant)
    ids = random_ids(60)
    exact = reference.load(folder).run(ids)["logits"]
    bound = max(
        np.abs(
            perturbed_logits(folder, ids, UNIT_ROUNDOFF[kv_dtype], seed, monkeypatch) - exact
        ).max()
        for seed in range(5)
    )
    mine = gl.load(folder, dtype="float32", kv_dtype=kv_dtype)
    for chunk in (1, 512):
        got = mine.run(ids, logits="all", chunk=chunk).logits
        assert np.abs(got - exact).max() <= bound + 1e-4


@pytest.mark.parametrize("chunk", [1, 512])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_on_stored_keys_stays_within_the_operands_bound(tiny, variant, kv_dtype, chunk):
    model, folder = tiny(variant)
    ids = random_ids(60)
    mine = gl.load(folder, dtype="float32", kv_dtype=kv_dtype)
    cache = mine.new_cache(max_tokens=len(ids), sliding="full")
    names = ["layers.*.attn.rot_q", "layers.*.attn.z"]
    run = mine.run(ids, cache=cache, capture=names, chunk=chunk)
    for index, layer in enumerate(reference.load(folder).config.layers):
        # Float32's share: one rounding per product and sum over H dims, then over S positions.
        roundoff = UNIT_ROUNDOFF[kv_dtype] + (layer.head_dim + len(ids)) * UNIT_ROUNDOFF["float32"]
        stored = cache.layers[index]
        q, got = run[f"layers.{index}.attn.rot_q"], run[f"layers.{index}.attn.z"]
        z, bound = attention_and_bound(q, stored.keys, stored.values, layer.window, roundoff)
        assert (np.abs(got - z) <= bound + SMALLEST[kv_dtype]).all(), f"layer {index}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_filled_ring_caches_hold_fewer_bytes_than_full_ones(tiny, variant):
    model, folder = tiny(variant)
    mine = gl.load(folder, dtype="float32")
    ring, full = (mine.new_cache(max_tokens=3000, sliding=sliding) for sliding in ("ring", "full"))
    for cache in (ring, full):
        mine.run(random_ids(3000), cache=cache, logits=None)
    for index, kind in enumerate(text_config(model).layer_types):
        if kind == "full_attention":
            assert ring.layers[index].nbytes == full.layers[index].nbytes
        elif full.layers[index].kind != "shared":
            assert ring.layers[index].nbytes < full.layers[index].nbytes / 2
    assert ring.nbytes == sum(layer.nbytes for layer in ring.layers)
