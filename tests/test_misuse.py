"""Caches, models and threads used as they must not be: errors, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

import gemloupe as gl


@pytest.fixture(scope="module")
def model() -> gl.Model:
    return gl.load("demo:edge")


@pytest.mark.parametrize("other", ["demo:moe", "demo:dense", "demo:edge"])
def test_a_cache_of_another_model_is_refused(model, other):
    cache = gl.load(other).new_cache()
    with pytest.raises(ValueError, match="another model"):
        model.run([2, 5], cache=cache)
    with pytest.raises(ValueError, match="another model"):
        model.generate([2, 5], cache=cache, max_new_tokens=2)
    assert cache.length == 0


def test_a_batch_that_fails_leaves_every_cache_as_it_was(model):
    caches = [model.new_cache(), model.new_cache(max_tokens=2)]
    with pytest.raises(ValueError, match="at most 2"):
        model.run([[2, 5], [2, 5, 9]], cache=caches)
    assert [cache.length for cache in caches] == [0, 0]


def test_one_cache_in_two_threads_is_an_error_and_no_crash(model):
    cache = model.new_cache()
    unexpected: list[BaseException] = []

    def work() -> None:
        for _ in range(40):
            try:
                model.run([2, 5, 9], cache=cache)
                model.generate([7], cache=cache, max_new_tokens=3, temperature=0)
            except RuntimeError as error:
                assert "in use" in str(error)
            except BaseException as error:
                unexpected.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not unexpected
    # What the cache holds is what its tokens give.
    fresh = model.new_cache()
    model.run(cache.tokens, cache=fresh, logits=None)
    for layer, want in zip(cache.layers, fresh.layers, strict=True):
        held = layer.positions[-8:] - want.positions[0]
        assert np.allclose(layer.keys[-8:], want.keys[held], atol=2e-2)


def test_per_layer_inputs_have_every_row_whatever_the_logits(model):
    for logits in ("last", None, "all"):
        run = model.run([2, 5, 6], capture="per_layer_inputs", logits=logits)
        assert run["per_layer_inputs"].shape[0] == 3


def test_logits_can_not_be_captured_where_none_are_computed(model):
    with pytest.raises(ValueError, match="logits is None"):
        model.run([2, 5], capture="logits_raw", logits=None)


def test_the_interpreter_ends_while_a_daemon_thread_computes():
    code = (
        "import threading, time, gemloupe as gl\n"
        "model = gl.load('demo:edge')\n"
        "def work():\n"
        "    while True: model.run([2] * 2000)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.5)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stderr.decode()


def test_a_cache_that_can_not_fit_is_refused_before_it_is_made(tiny):
    most = 1 << 24  # with these heads, terabytes
    folder = tiny("31b", max_position_embeddings=most, head_dim=2048, global_head_dim=2048)[1]
    large = gl.load(folder)
    with pytest.raises(MemoryError, match="tokens in float16 needs .* GiB, but .* is available"):
        large.new_cache(max_tokens=most, sliding="full")
    with pytest.raises(MemoryError, match="ask for fewer tokens"):
        large.generate([2, 3], max_new_tokens=most)
    with pytest.raises(ValueError, match="expected 1 to 16777216"):
        large.new_cache(max_tokens=most + 1)
