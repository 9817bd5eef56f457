"""Edits of the KV cache: entries set, copied, removed, inserted; what the next pass sees."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import gemloupe as gl
from cache_helpers import DTYPES, LONG, contents, filled, load, same, sources
from tiny_models import VARIANTS, random_ids

EPS = 2.0**-24
# Roundings of a rotated pair: sine, cosine, two products and a sum.
ROTATION = 5 * EPS


def step(dtype: str, keys: np.ndarray) -> np.ndarray:
    """The error of rounding keys [S, K, H] to a cache's dtype once."""
    largest = np.abs(keys).max(axis=-1, keepdims=True)
    relative = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 1.001 / 254}
    return np.broadcast_to(relative[dtype] * largest, keys.shape)


# set


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_set_replaces_what_is_named_and_nothing_else(
    tiny: Callable, variant: str, dtype: str
) -> None:
    cache = filled(load(tiny, variant), dtype=dtype)
    fork = cache.fork()
    before = contents(fork)
    for index in sources(cache):
        layer = cache.layers[index]
        _count, heads, head_dim = layer.shape
        values = np.random.default_rng(index).normal(size=(3, heads, head_dim)).astype(np.float32)
        at = [LONG - 1, LONG - 7, -3]
        layer.set(values=values, positions=at)
        kept_keys, old_values = before[index]
        if dtype == "float32" or fork.layers[index].storage == "separate":
            assert np.array_equal(layer.keys, kept_keys)
        else:  # derived keys are rounded once when they are stored whole
            assert (np.abs(layer.keys - kept_keys) <= step(dtype, kept_keys)).all()
        rows = np.array([LONG - 1, LONG - 7, LONG - 3]) - layer.positions[0]
        assert (np.abs(layer.values[rows] - values) <= step(dtype, values)).all()
        others = np.setdiff1d(np.arange(len(old_values)), rows)
        assert np.array_equal(layer.values[others], old_values[others])
        new_values, separated = layer.values, layer.keys
        layer.set(keys=values, positions=at)
        assert np.array_equal(layer.values, new_values)
        assert np.array_equal(layer.keys[others], separated[others])
        assert (np.abs(layer.keys[rows] - values) <= step(dtype, values)).all()
        assert layer.storage == "separate"
    for old, (keys, values) in zip(before, contents(fork), strict=True):
        assert np.array_equal(old[0], keys) and np.array_equal(old[1], values)


def transformers_cache(model: torch.nn.Module, ids: list[int]) -> object:
    return model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("count", [20, LONG])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_edited_entry_changes_the_next_pass_as_in_transformers(
    tiny: Callable, variant: str, count: int, part: str
) -> None:
    reference, _folder = tiny(variant)
    model = load(tiny, variant)
    ids, more = random_ids(count), random_ids(4, seed=2)[1:]
    cache = filled(model, count)
    theirs = transformers_cache(reference, ids)
    unedited = model.run(more, cache=cache.fork(), logits="all").logits
    for index in sources(cache):
        layer = cache.layers[index]
        edited = np.array(getattr(layer, part)[-4:])
        edited[1:3] = 1.5 * edited[1:3] + 0.5
        layer.set(**{part: edited}, positions=slice(-4, None))
        # transformers keeps the last W − 1 positions of sliding layers: its rows end as ours do.
        tensor = getattr(theirs.layers[index], part)
        tensor[0, :, -4:] = torch.from_numpy(edited).transpose(0, 1)
    with torch.no_grad():
        want = reference(input_ids=torch.tensor([more]), past_key_values=theirs).logits[0].numpy()
    got = model.run(more, cache=cache, logits="all").logits
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.abs(got - unedited).max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_setting_what_is_there_changes_no_logit(tiny: Callable, variant: str, dtype: str) -> None:
    model = load(tiny, variant)
    cache = filled(model, dtype=dtype, separate_keys=True)
    fork = cache.fork()
    for index in sources(cache):
        layer = cache.layers[index]
        layer.set(keys=layer.keys, values=torch.from_numpy(np.array(layer.values)))
    got, want = (model.run([7], cache=one).logits for one in (cache, fork))
    if dtype == "int8":  # a row's scale is found again to within its rounding
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)
    else:
        assert np.array_equal(got, want)


def test_a_shared_layer_names_the_layer_that_it_reads(tiny: Callable) -> None:
    cache = filled(load(tiny, "e2b"))
    shared = cache.layers[-1]
    with pytest.raises(ValueError, match=r"source_layer is 3\. Set cache\.layers\[3\]"):
        shared.set(values=np.zeros((1, 1, 20)), positions=[-1])
    with pytest.raises(ValueError, match="source_layer is 3"):
        cache.replace(cache.fork(), layers=[8])


def test_positions_that_left_the_ring_are_refused_with_those_that_are_held(tiny: Callable) -> None:
    cache = filled(load(tiny, "31b"))
    layer = cache.layers[0]
    first = layer.positions[0]
    assert first > 64
    with pytest.raises(ValueError, match=rf"position 3 is no longer held.*expected {first} to 149"):
        layer.set(keys=np.zeros((2, 4, 12)), positions=[3, 149])
    with pytest.raises(ValueError, match='sliding="full"'):
        cache.replace(cache.fork(), positions=[3])
    with pytest.raises(ValueError, match="position 150 is not in this cache; expected 0 to 149"):
        layer.set(keys=np.zeros((1, 4, 12)), positions=[150])
    assert layer.storage == "separate" and cache.layers[5].storage == "derived"


def test_wrong_shapes_and_arguments_are_named(tiny: Callable) -> None:
    cache = filled(load(tiny, "31b"))
    layer = cache.layers[5]
    before = contents(cache)
    with pytest.raises(ValueError, match=r"keys has shape \[2, 4, 12\]; expected \[1, 1, 22\]"):
        layer.set(keys=np.zeros((2, 4, 12)), positions=[3])
    with pytest.raises(ValueError, match="keys and values are None"):
        layer.set(positions=[3])
    with pytest.raises(ValueError, match="twice"):
        layer.set(values=np.zeros((2, 1, 22)), positions=[149, -1])
    with pytest.raises(TypeError, match="integers, a slice or a boolean mask"):
        layer.set(values=np.zeros((1, 1, 22)), positions=[1.5])
    with pytest.raises(ValueError, match="mask of 3; expected 150"):
        layer.set(values=np.zeros((1, 1, 22)), positions=[True, False, False])
    for old, new in zip(before, contents(cache), strict=True):
        assert np.array_equal(old[0], new[0])
    mask = np.arange(LONG) % 50 == 0
    layer.set(values=np.ones((3, 1, 22)), positions=mask)
    assert (layer.values[mask] == 1).all() and (layer.values[~mask] != 1).any()


# remove, insert


def removed(cache: gl.KvCache, positions: list[int]) -> gl.KvCache:
    cache = cache.fork()
    cache.remove(positions)
    return cache


@pytest.mark.parametrize("start", [0, 200_000])
@pytest.mark.parametrize("variant", [*VARIANTS, "full 26b", "full 31b"])
def test_moved_keys_of_layer_0_are_those_computed_at_the_new_positions(
    tiny: Callable, variant: str, start: int
) -> None:
    # Keys of layer 0 depend on the token only. Far from the start, angles more exact than the
    # model's float32 ones would be off by a hundredth.
    kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    name = variant.removeprefix("full ")
    model = load(tiny, name, **(kinds if name != variant else {}))
    ids = random_ids(LONG)
    gone = [3, 64, 65, 66, 131]
    cache = model.new_cache(sliding="full", start=start)
    model.run(ids, cache=cache, logits=None)
    unmoved = np.delete(cache.layers[0].keys, gone, axis=0)
    cache.remove([start + position for position in gone])
    fresh = model.new_cache(sliding="full", start=start)
    left = [token for position, token in enumerate(ids) if position not in gone]
    model.run(left, cache=fresh, logits=None)
    assert cache.tokens.tolist() == left
    assert cache.length == fresh.length
    got, want = cache.layers[0], fresh.layers[0]
    assert got.storage == ("derived" if name != variant else "separate")
    assert np.array_equal(got.values, want.values)
    size = np.linalg.norm(want.keys, axis=-1, keepdims=True)
    assert (np.abs(got.keys - want.keys) <= 3 * ROTATION * size).all()
    assert np.array_equal(got.keys[:3], want.keys[:3])
    assert np.abs(got.keys - unmoved).max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_removed_positions_inserted_again_give_back_the_cache(
    tiny: Callable, variant: str, dtype: str
) -> None:
    model = load(tiny, variant)
    cache = filled(model, sliding="full", dtype=dtype)
    want = contents(cache)
    tokens = cache.tokens
    begin, end = 61, 70
    piece = removed(cache, [*range(begin), *range(end, LONG)])
    rest = removed(cache, list(range(begin, end)))
    assert piece.tokens.tolist() == tokens[begin:end].tolist()
    rest.insert(piece, begin)
    assert np.array_equal(rest.tokens, tokens)
    for index in sources(cache):
        keys, values = want[index]
        got = rest.layers[index]
        assert np.array_equal(got.values, values)
        assert np.array_equal(got.keys[:begin], keys[:begin])
        size = np.linalg.norm(keys, axis=-1, keepdims=True)
        # Two rotations there and back, and two roundings to the cache's dtype, whose rows may be
        # up to √2 larger between.
        bound = 2 * ROTATION * size + 3 * step(dtype, keys)
        assert (np.abs(got.keys - keys) <= bound).all()
        assert got.storage == cache.layers[index].storage
    assert len(piece) == end - begin


@pytest.mark.parametrize("variant", VARIANTS)
def test_moved_keys_are_turned_by_the_difference_of_the_angles(
    tiny: Callable, variant: str
) -> None:
    model = load(tiny, variant)
    cache = filled(model, sliding="full")
    moved = removed(cache, [10, 11])
    for index, layer in enumerate(model.config.text.layers):
        if layer.kv_source != index:
            continue
        half, pairs = layer.head_dim // 2, layer.rotary_pairs
        exponents = 2.0 * np.arange(pairs) / layer.head_dim
        # Near the start float32 angles are exact to 1e-5.
        angles = -2.0 * layer.rope_theta**-exponents / layer.rope_factor
        keys = cache.layers[index].keys[12:].astype(np.float64)
        want = keys.copy()
        a, b = keys[..., :pairs], keys[..., half : half + pairs]
        want[..., :pairs] = a * np.cos(angles) - b * np.sin(angles)
        want[..., half : half + pairs] = b * np.cos(angles) + a * np.sin(angles)
        np.testing.assert_allclose(moved.layers[index].keys[10:], want, rtol=0, atol=1e-4)
        assert np.array_equal(moved.layers[index].values[10:], cache.layers[index].values[12:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_removing_the_end_is_truncating(tiny: Callable, variant: str) -> None:
    model = load(tiny, variant)
    cache = filled(model, sliding="full")
    fork = cache.fork()
    cache.remove(slice(-30, None))
    fork.truncate(LONG - 30)
    assert same(cache, fork)
    got, want = (model.run([5], cache=one).logits for one in (cache, fork))
    assert np.array_equal(got, want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ring_moves_what_it_holds(tiny: Callable, variant: str) -> None:
    model = load(tiny, variant)
    ring, full = filled(model), filled(model, sliding="full")
    for cache in (ring, full):
        cache.remove([2, 3, 40])
    assert ring.length == LONG - 3
    for one, other in zip(ring.layers, full.layers, strict=True):
        assert np.array_equal(one.keys, other.keys[-len(one.positions) :])
        assert one.positions[-1] == other.positions[-1]
        assert not one.window or len(one.positions) >= one.window - 1
    for _ in range(80):  # on through the next blocks
        got, want = (model.run([5], cache=one).logits for one in (ring, full))
        assert np.array_equal(got, want)


def test_a_ring_says_which_positions_it_would_need(tiny: Callable) -> None:
    model = load(tiny, "31b")
    cache = filled(model)
    before = contents(cache)
    first = cache.layers[0].positions[0]
    with pytest.raises(ValueError, match=rf"sliding layer 0 .* position {first - 1} of this cache"):
        cache.remove(range(first, LONG))
    with pytest.raises(ValueError, match='of the other cache.*sliding="full"'):
        model.new_cache(sliding="full").insert(cache, 0)
    for old, new in zip(before, contents(cache), strict=True):
        assert np.array_equal(old[0], new[0])
    assert cache.length == LONG and not cache.provenance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_inserted_into_an_empty_one_is_that_cache(
    tiny: Callable, variant: str, dtype: str
) -> None:
    model = load(tiny, variant)
    cache = filled(model, dtype=dtype)
    copy = model.new_cache(dtype=dtype)
    copy.insert(cache, 0)
    assert same(copy, cache)
    got, want = (model.run([5], cache=one).logits for one in (copy, cache))
    assert np.array_equal(got, want)


def test_a_cache_is_inserted_into_itself_and_into_another_dtype(tiny: Callable) -> None:
    model = load(tiny, "26b")
    cache = filled(model, 20)
    other = model.new_cache(dtype="float16", start=100)
    other.insert(cache, -1 + 101)
    assert other.tokens.tolist() == cache.tokens.tolist() and other.length == 120
    values = cache.layers[5].values
    assert np.array_equal(other.layers[5].values, values.astype(np.float16).astype(np.float32))
    cache.insert(cache, 20)
    assert cache.tokens.tolist() == other.tokens.tolist() * 2
    assert np.array_equal(cache.layers[0].values[:20], cache.layers[0].values[20:])
    model.run([5], cache=cache)


def test_entries_with_keys_of_their_own_make_the_cache_store_keys(tiny: Callable) -> None:
    model = load(tiny, "31b")
    cache, edited = filled(model, 20), filled(model, 20, seed=2)
    edited.layers[5].set(keys=np.ones((1, 1, 22)), positions=[4])
    other = cache.fork()
    cache.insert(edited, 20)
    assert cache.layers[5].storage == "separate" and other.layers[5].storage == "derived"
    assert np.array_equal(cache.layers[5].keys[:20], other.layers[5].keys)
    other.replace(edited, layers=5, positions=[4])
    assert (other.layers[5].keys[4] == 1).all()


def test_a_sequence_that_would_not_fit_is_refused(tiny: Callable) -> None:
    model = load(tiny, "e2b")
    cache = filled(model, 20, max_tokens=30)
    with pytest.raises(ValueError, match="40 tokens, expected at most 30"):
        cache.insert(cache.fork(), 20)
    with pytest.raises(ValueError, match="at is 21; expected 0 to 20"):
        cache.insert(cache.fork(), 21)
    other = load(tiny, "e2b")
    with pytest.raises(ValueError, match="another model"):
        cache.insert(filled(other, 5), 0)
    cache.remove(slice(None))
    assert cache.length == 0 and len(cache.layers[0].keys) == 0
    cache.remove([])
    model.run(random_ids(10), cache=cache)


# replace


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_replaced_entries_are_the_others_bit_for_bit(
    tiny: Callable, variant: str, dtype: str
) -> None:
    model = load(tiny, variant)
    cache, other = (filled(model, dtype=dtype, seed=seed) for seed in (1, 2))
    before = contents(cache)
    fork = cache.fork()
    index = sources(cache)[-1]
    cache.replace(other, layers=index, positions=[140, -2])
    for layer in cache.layers:
        theirs, (keys, values) = other.layers[layer.index], before[layer.index]
        rows = np.array([140, 148]) - layer.positions[0]
        expected = [keys.copy(), values.copy()]
        if layer.source_layer == index:
            expected[0][rows], expected[1][rows] = theirs.keys[rows], theirs.values[rows]
        assert np.array_equal(layer.keys, expected[0])
        assert np.array_equal(layer.values, expected[1])
        assert layer.storage == fork.layers[layer.index].storage
    cache.replace(other)
    assert same(cache, other)
    got, want = (model.run([5], cache=one).logits for one in (cache, other))
    assert np.array_equal(got, want)
    assert np.array_equal(fork.layers[index].keys, before[index][0])


def test_a_failed_replace_leaves_the_cache_as_it_was(tiny: Callable) -> None:
    model = load(tiny, "e2b")
    cache, other = filled(model, sliding="full"), filled(model, seed=2)
    fork = cache.fork()
    with pytest.raises(ValueError, match="position 3 is not held by layer 0"):
        cache.replace(other, layers=[3, 0], positions=[3])
    assert same(cache, fork)
