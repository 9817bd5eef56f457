"""Storages of the KV cache: bytes at the released sizes, derived keys, int8, equalities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gemloupe as gl
from gemloupe import _core, sizes
from gemloupe.model import core_config
from gemloupe.variants import VARIANTS as RELEASED
from tiny_models import VARIANTS, random_ids

KV_DTYPES = ("float32", "float16", "bfloat16", "int8")
STORAGES = [(dtype, separate) for dtype in KV_DTYPES for separate in (False, True)]
BLOCK = 64
MIB = 1 << 20
# The scale and its inverse are rounded, and so is the product of a stored value.
FEW_ROUNDINGS = 1 + 2.0**-14
KEYS_AS_VALUES = ("12B", "26B-A4B", "31B")

# gemma4.md A.4, 16-bit: bytes per token of all sliding and all full layers, context, and MiB of the
# full context where sliding layers hold their window.
A4 = {
    "E2B": (12_288, 6_144, 131_072, 774),
    "E4B": (40_960, 16_384, 131_072, 2068),
    "12B": (327_680, 16_384, 262_144, 4416),
    "26B-A4B": (204_800, 20_480, 262_144, 5320),
    "31B": (819_200, 81_920, 262_144, 21_280),
}


def released(name: str):
    return RELEASED[name].config.text


def needed(name: str, tokens: int, dtype: str = "float16", chunk: int = 1, **options: bool) -> int:
    return _core.kv_bytes_needed(core_config(released(name)), dtype, tokens, chunk, **options)


@pytest.mark.parametrize("name", A4)
def test_bytes_of_a_token_are_those_of_the_specification(name: str) -> None:
    sliding, full, context, _mib = A4[name]
    nothing_windowed = needed(name, context, full_sliding=True, separate_keys=True)
    assert nothing_windowed == (sliding + full) * context
    # One block more of tokens costs 64 tokens in every layer.
    more = needed(name, 3 * BLOCK, full_sliding=True, separate_keys=True)
    assert more - needed(name, 2 * BLOCK, full_sliding=True, separate_keys=True) == BLOCK * (
        sliding + full
    )


@pytest.mark.parametrize("name", A4)
def test_bytes_of_the_full_context_are_those_of_the_specification_and_one_block(name: str) -> None:
    # A sliding layer holds its window and, because a window may begin inside a block, one more
    # block of 64 positions; a pass of one token adds none.
    sliding, _full, context, mib = A4[name]
    found = needed(name, context, chunk=1, separate_keys=True)
    assert found == mib * MIB + BLOCK * sliding


@pytest.mark.parametrize("name", A4)
def test_derived_keys_save_three_eighths_of_the_full_layers(name: str) -> None:
    sliding, full, context, mib = A4[name]
    derived = needed(name, context, chunk=1)
    kept = 5 / 8 if name in KEYS_AS_VALUES else 1
    assert derived == mib * MIB + BLOCK * sliding - round((1 - kept) * full * context)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("name", A4)
def test_the_estimate_counts_what_the_engine_allocates(name: str, dtype: str) -> None:
    for context, chunk in ((1, 512), (1000, 64), (5000, 512), (A4[name][2], 512)):
        assert sizes.kv_allocated(released(name), context, dtype, chunk) == needed(
            name, context, dtype, chunk
        )


@pytest.mark.parametrize("name", A4)
def test_int8_costs_half_of_float16_and_two_scales_a_head(name: str) -> None:
    half = needed(name, 4096, "float16", full_sliding=True)
    heads = sum(
        layer.num_kv_heads for i, layer in enumerate(released(name).layers) if layer.kv_source == i
    )
    assert needed(name, 4096, "int8", full_sliding=True) == half // 2 + 4096 * heads * 8


@pytest.mark.parametrize(("dtype", "separate"), STORAGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_allocates_the_bytes_it_announces(
    tiny: Callable, variant: str, dtype: str, separate: bool
) -> None:
    model = gl.load(tiny(variant)[1], dtype="float32", kv_dtype=dtype)
    cache = model.new_cache(sliding="full", separate_keys=separate)
    model.run(random_ids(130), cache=cache, logits=None)
    config = core_config(model.config.text)
    assert cache.nbytes == _core.kv_bytes_needed(
        config, dtype, 130, 512, full_sliding=True, separate_keys=separate
    )
    for layer, spec in zip(cache.layers, model.config.text.layers, strict=True):
        source = model.config.text.layers[spec.kv_source]
        derived = source.values_are_keys and 2 * source.rotary_pairs < source.head_dim
        assert layer.storage == ("derived" if derived and not separate else "separate")


def derived_variants(folder_of: Callable) -> list[str]:
    return [
        variant
        for variant in VARIANTS
        if any(
            layer.values_are_keys and 2 * layer.rotary_pairs < layer.head_dim
            for layer in gl.load(folder_of(variant)[1], dtype="float32").config.text.layers
        )
    ]


def test_some_variants_derive_keys(tiny: Callable) -> None:
    assert len(derived_variants(tiny)) >= 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_keys_are_rebuilt_bit_for_bit(tiny: Callable, variant: str) -> None:
    model = gl.load(tiny(variant)[1], dtype="float32", threads=2)
    ids = random_ids(90)
    caches = [model.new_cache(separate_keys=separate) for separate in (False, True)]
    for cache in caches:
        # Up to the first layer that reads derived keys the passes are the same.
        model.run(ids, cache=cache, logits=None)
    derived, separate = caches
    first = next((i for i, layer in enumerate(derived.layers) if layer.storage == "derived"), None)
    for i, (a, b) in enumerate(zip(derived.layers, separate.layers, strict=True)):
        if first is not None and i > first:
            np.testing.assert_allclose(a.keys, b.keys, rtol=0, atol=1e-4)
            continue
        assert np.array_equal(a.keys, b.keys)
        assert np.array_equal(a.values, b.values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_derived_keys_give_the_logits_of_separate_ones(tiny: Callable, variant: str) -> None:
    # The project's bound for one model computed in two orders of summation (float32).
    model = gl.load(tiny(variant)[1], dtype="float32")
    ids = random_ids(90)
    logits = [
        model.run(ids, cache=model.new_cache(separate_keys=separate), logits="all").logits
        for separate in (False, True)
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "separate"), STORAGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_storage_keeps_the_equalities(
    tiny: Callable, variant: str, dtype: str, separate: bool
) -> None:
    folder: Path = tiny(variant)[1]
    one, two = (
        gl.load(folder, dtype="float32", kv_dtype=dtype, threads=threads, invariant=True)
        for threads in (1, 2)
    )
    ids = random_ids(150)
    cache = two.new_cache(separate_keys=separate)
    want = two.run(ids, cache=cache, logits="all").logits
    for model, chunk in ((one, 512), (two, 1), (two, 7)):
        got = model.run(
            ids, cache=model.new_cache(separate_keys=separate), logits="all", chunk=chunk
        )
        assert np.array_equal(got.logits, want), f"{model.threads} threads, chunks of {chunk}"
    fork = cache.fork()
    rows = two.run([[5], [5]], cache=[cache, fork])
    assert np.array_equal(rows[0].logits, rows[1].logits)
    fork.truncate(len(ids))
    again = two.run([5], cache=fork)
    assert np.array_equal(again.logits, rows[0].logits)
    assert np.array_equal(fork.layers[0].keys, cache.layers[0].keys)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_entries_are_within_half_a_step_of_their_scale(
    tiny: Callable, variant: str, separate: bool
) -> None:
    model = gl.load(tiny(variant)[1], dtype="float32", kv_dtype="int8")
    ids = random_ids(40)
    cache = model.new_cache(sliding="full", separate_keys=separate)
    run = model.run(ids, cache=cache, capture=["layers.*.attn.rot_k", "layers.*.attn.v"])
    for index, layer in enumerate(cache.layers):
        if layer.kind == "shared":
            continue
        spec = model.config.text.layers[index]
        k, v = (run[f"layers.{index}.attn.{name}"] for name in ("rot_k", "v"))
        half_step = np.abs(v).max(-1, keepdims=True) / 254 * FEW_ROUNDINGS
        assert (np.abs(layer.values - v) <= half_step).all(), f"layer {index}"
        if layer.storage == "separate":
            allowed = np.abs(k).max(-1, keepdims=True) / 254 * FEW_ROUNDINGS
        else:
            # Rotated dims have a scale of their own; of the others the key is w times the value as
            # stored: w times its error, and one rounding in each of the two products.
            w = np.abs(model.weights[f"layers.{index}.self_attn.k_norm.weight"])
            rotated = np.arange(spec.head_dim) % (spec.head_dim // 2) < spec.rotary_pairs
            scaled = w * half_step
            allowed = np.where(
                rotated,
                np.abs(k[..., rotated]).max(-1, keepdims=True) / 254 * FEW_ROUNDINGS,
                scaled + 2.0**-23 * (np.abs(k) + scaled),
            )
        assert (np.abs(layer.keys - k) <= allowed).all(), f"layer {index}"


def test_other_dtypes_are_refused(tiny: Callable) -> None:
    model = gl.load(tiny("e2b")[1], dtype="float32")
    with pytest.raises(ValueError, match="'int4'"):
        model.new_cache(dtype="int4")
    with pytest.raises(ValueError, match="int4"):
        _core.new_cache(model.core, 0, "int4", 0, False, 512)
    with pytest.raises(ValueError, match="int4"):
        _core.TextModelOptions().kv_dtype = "int4"
    assert model.new_cache(dtype="int8").dtype == "int8"
