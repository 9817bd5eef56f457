"""`model.routing_stats()`: which calls it counts, and that it equals the sum of their traces."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import gemloupe as gl
from gemloupe.routing import RoutingStats
from tiny_models import random_ids

GREEDY = {"max_new_tokens": 5, "temperature": 0}


@pytest.fixture
def model(tiny):
    return gl.load(tiny("26b")[1], dtype="float32")


def test_statistics_are_the_sum_of_the_traces_of_all_calls_inside(model):
    with model.routing_stats(coactivation=True) as stats:
        batch = model.run([random_ids(9, seed=s) for s in (1, 2)])
        out = model.generate(random_ids(7), **GREEDY)
        cache = model.new_cache()
        warm = [model.run(random_ids(6), cache=cache, routing="experts") for _ in range(2)]
        tokens = stats.tokens
    total = sum(call.routing for call in (*batch, out, *warm))
    assert tokens == stats.tokens == len(total) == 2 * 9 + 7 + 4 + 2 * 6
    assert stats.layers.tolist() == total.layers.tolist()
    np.testing.assert_allclose(stats.load(), total.load())
    np.testing.assert_array_equal(stats.coactivation(1), total.coactivation(1))


def test_nothing_is_counted_after_the_block_or_of_another_model(model, tiny):
    other = gl.load(tiny("26b", seed=1)[1], dtype="float32")
    with model.routing_stats() as outer:
        other.run(random_ids(5))
        with model.routing_stats() as inner, other.routing_stats() as of_other:
            model.run(random_ids(8))
            other.run(random_ids(4))
        model.run(random_ids(3))
    model.run(random_ids(20))
    assert (outer.tokens, inner.tokens, of_other.tokens) == (11, 8, 4)


def test_calls_without_a_trace_and_calls_that_raise_are_not_counted(model):
    def fail(x):
        raise LookupError("stop")

    with model.routing_stats() as stats:
        model.run(random_ids(5), routing=False)
        model.generate(random_ids(5), routing=False, **GREEDY)
        with pytest.raises(LookupError):
            model.run([random_ids(5)] * 2, edit=[None, {"layers.1.mlp.out": fail}])
    assert stats.tokens == 0
    with pytest.raises(LookupError), model.routing_stats() as stats:
        raise LookupError
    model.run(random_ids(5))
    assert stats.tokens == 0


def test_a_stream_is_counted_once_when_its_result_is_made():
    demo = gl.load("demo:moe")
    with demo.routing_stats() as stats:
        stream = demo.generate(random_ids(7), stream=True, **GREEDY)
        assert stats.tokens == 0
    assert stream.result is stream.result
    assert stats.tokens == 7 + 4
    assert len(stream.result.routing) == 11


def test_a_repeated_run_counts_the_tokens_that_it_computes(model):
    base = model.run(random_ids(12), keep=True)
    edit = {"layers.3.resid_post": gl.edits.zero(positions=-2)}
    with model.routing_stats() as stats:
        again = model.run(base, edit=edit, routing="experts")
    assert stats.tokens == len(again.routing)


def test_other_threads_are_not_counted(model):
    with model.routing_stats() as stats:
        thread = threading.Thread(target=model.run, args=(random_ids(5),))
        thread.start()
        thread.join()
    assert stats.tokens == 0 and isinstance(stats, RoutingStats)


def test_a_dense_model_is_refused(tiny):
    model = gl.load(tiny("e2b")[1])
    with pytest.raises(ValueError, match="has no experts"):
        model.routing_stats()
