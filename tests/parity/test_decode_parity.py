"""Decoding, chunked prefill, continuing, truncating and forking all equal one prefill."""

from __future__ import annotations

import numpy as np
import pytest
from parity_checks import assert_greedy, assert_logits_close

import gemloupe as gl
from tiny_models import VARIANTS, hf_run, random_ids, text_config

pytestmark = pytest.mark.core  # repeated for every instruction set


@pytest.fixture(params=VARIANTS, scope="module")
def case(request, tiny):
    """Returns (gemloupe model, ids, transformers' logits [T, V], window).

    The ids span eight windows, and four storage blocks (64 positions), so that rings turn.
    """
    model, folder = tiny(request.param)
    window = text_config(model).sliding_window
    ids = random_ids(max(8 * window, 4 * 64) + 3)
    return gl.load(folder, dtype="float32"), ids, hf_run(model, ids)["logits"], window


@pytest.mark.parametrize("text_only", [False, True], ids=["multimodal", "text-only"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_64_greedy_tokens_equal_transformers(tiny, variant, dtype, text_only):
    model, folder = tiny(variant, dtype=dtype, text_only=text_only)
    ids = random_ids(13, seed=5)
    out = gl.load(folder, dtype="float32").generate(ids, max_new_tokens=64, temperature=0)
    assert len(out.ids) == 64
    assert_greedy(ids, out.ids, hf_run(model, [*ids, *out.ids])["logits"])


def test_token_by_token_decoding_equals_prefill(case):
    model, ids, want, window = case
    start = window - 1
    cache = model.new_cache(max_tokens=len(ids))
    rows = [model.run(ids[:start], cache=cache, logits="all").logits]
    rows += [model.run([token], cache=cache, logits="all").logits for token in ids[start:]]
    assert cache.length == len(ids)
    assert_logits_close(np.concatenate(rows), want)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 8, 9, 13, 16, 31, 512])
def test_any_chunking_equals_one_prefill(case, chunk):
    model, ids, want, _window = case
    assert_logits_close(model.run(ids, logits="all", chunk=chunk).logits, want)


@pytest.mark.parametrize("chunk", [3, 9, 512])
def test_the_last_position_shortcut_holds_in_every_chunking(case, chunk):
    model, ids, want, _window = case
    cache = model.new_cache(max_tokens=len(ids) + 1)
    assert_logits_close(model.run(ids[:-1], cache=cache, chunk=chunk).logits, want[-2:-1])
    assert_logits_close(model.run(ids[-1:], cache=cache).logits, want[-1:])


@pytest.mark.parametrize("sliding", ["ring", "full"])
def test_pieces_of_any_size_continue_a_cache(case, sliding):
    model, ids, want, window = case
    cache = model.new_cache(max_tokens=len(ids), sliding=sliding)
    rows, at = [], 0
    for size in [window + 1, 1, window, 2, 3 * window, 1, len(ids)]:
        if piece := ids[at : at + size]:
            rows.append(model.run(piece, cache=cache, logits="all").logits)
            at += len(piece)
    assert_logits_close(np.concatenate(rows), want)


def test_a_truncated_cache_continues_as_if_never_longer(case):
    model, ids, want, window = case
    cache = model.new_cache(max_tokens=len(ids), sliding="full")
    model.run([*ids[: 4 * window], *random_ids(2 * window, seed=9)], cache=cache)
    cache.truncate(4 * window)
    assert cache.length == 4 * window
    rows = model.run(ids[4 * window :], cache=cache, logits="all").logits
    assert_logits_close(rows, want[4 * window :])


def test_truncating_a_ring_beyond_what_it_holds_is_refused(case):
    model, _ids, _want, window = case
    cache = model.new_cache(max_tokens=3000)
    model.run(random_ids(3000), cache=cache, logits=None)
    oldest = int(cache.layers[0].positions[0])
    assert 0 < oldest <= 3000 - window  # A ring holds its window and little more.
    with pytest.raises(ValueError, match="sliding"):
        cache.truncate(oldest)  # Its last token would see positions before the oldest one.
    assert cache.length == 3000


def test_a_ring_truncated_within_what_it_holds_goes_on_as_if_never_longer(case):
    model, ids, want, window = case
    cache = model.new_cache(max_tokens=len(ids) + 3)
    model.run([*ids[: 4 * window], *random_ids(3, seed=9)], cache=cache, chunk=3)
    cache.truncate(4 * window)
    rows = model.run(ids[4 * window :], cache=cache, logits="all").logits
    assert_logits_close(rows, want[4 * window :])


def test_forks_go_on_independently(case):
    model, ids, want, window = case
    cache = model.new_cache(max_tokens=len(ids) + 1)
    model.run(ids[: 2 * window], cache=cache)
    other = cache.fork()
    model.run(random_ids(3 * window, seed=4), cache=other)
    rows = model.run(ids[2 * window :], cache=cache, logits="all").logits
    assert (cache.length, other.length) == (len(ids), 5 * window)
    assert_logits_close(rows, want[2 * window :])


def test_generate_continues_a_warm_cache(case):
    model, ids, _want, _window = case
    whole = model.generate(ids, max_new_tokens=9, temperature=0).ids
    cache = model.new_cache(max_tokens=len(ids) + 9)
    model.run(ids[:-2], cache=cache)
    warm = model.generate(ids[-2:], max_new_tokens=9, temperature=0, cache=cache).ids
    assert list(warm) == list(whole)


# Longer than a window and the default chunk of 512, so that rings wrap around more than once.
LONG = 1_300


@pytest.fixture(params=VARIANTS, scope="module")
def long_case(request, tiny):
    """Returns (gemloupe model, LONG ids, transformers' logits [LONG, V])."""
    model, folder = tiny(request.param)
    ids = random_ids(LONG, seed=6)
    return gl.load(folder, dtype="float32"), ids, hf_run(model, ids)["logits"]


@pytest.mark.parametrize("chunk", [1, 100, 512, LONG])
def test_long_prompts_wrap_around_their_rings(long_case, chunk):
    model, ids, want = long_case
    assert_logits_close(model.run(ids, logits="all", chunk=chunk).logits, want)


def test_decoding_after_a_long_prompt_equals_prefill(long_case):
    model, ids, want = long_case
    cache = model.new_cache(max_tokens=LONG)
    model.run(ids[:-30], cache=cache)
    fork = cache.fork()
    rows = [model.run([token], cache=cache).logits for token in ids[-30:]]
    assert_logits_close(np.concatenate(rows), want[-30:])
    assert_logits_close(model.run(ids[-30:], cache=fork, logits="all").logits, want[-30:])


def test_a_wrapped_ring_truncated_to_what_it_still_holds_goes_on(long_case):
    model, ids, want = long_case
    cache = model.new_cache(max_tokens=LONG)
    model.run(ids[:-7], cache=cache)
    sliding = next(layer for layer in cache.layers if layer.kind == "sliding")
    window = model.config.text.sliding_window
    shortest = int(sliding.positions[0]) + window - 1  # The next token sees W-1 positions back.
    assert shortest <= LONG - 7
    cache.truncate(shortest)
    rows = model.run(ids[shortest:], cache=cache, logits="all").logits
    assert_logits_close(rows, want[shortest:])
