"""Up to 8 rows in a pass, a row's bits do not depend on its neighbours or on the threads."""

from __future__ import annotations

import numpy as np
import pytest

import gemloupe as gl
from tiny_models import VARIANTS, random_ids, text_config

pytestmark = pytest.mark.core  # repeated for every instruction set

LENGTHS = (1, 5, 23, 2, 40, 13, 31, 8)


def prompts(count: int) -> list[list[int]]:
    return [random_ids(length, seed=length) for length in LENGTHS[:count]]


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_decoded_row_in_a_batch_equals_the_row_alone(tiny, variant, count):
    model = gl.load(tiny(variant)[1], dtype="float32")
    caches = [model.new_cache(max_tokens=64) for _ in range(count)]
    for ids, cache in zip(prompts(count), caches, strict=True):
        model.run(ids, cache=cache)
    forks = [cache.fork() for cache in caches]
    tokens = [[10 + row] for row in range(count)]
    together = model.run(tokens, cache=caches)
    for row in range(count):
        alone = model.run(tokens[row], cache=forks[row])
        assert np.array_equal(together[row].logits, alone.logits), f"row {row}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_generated_row_in_a_ragged_batch_equals_the_row_alone(tiny, variant, dtype):
    model = gl.load(tiny(variant, dtype="bfloat16")[1], dtype=dtype)
    together = model.generate(prompts(8), max_new_tokens=16, temperature=0)
    for ids, out in zip(prompts(8), together, strict=True):
        assert list(out.ids) == list(model.generate(ids, max_new_tokens=16, temperature=0).ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_threads_give_the_bits_of_one(tiny, variant, dtype):
    model, folder = tiny(variant, dtype="bfloat16")
    ids = random_ids(8 * text_config(model).sliding_window)
    names = ["layers.*.resid_post"]
    one, two = (
        gl.load(folder, dtype=dtype, threads=threads).run(ids, logits="all", capture=names, chunk=8)
        for threads in (1, 2)
    )
    assert np.array_equal(one.logits, two.logits)
    for name in one.captured:
        assert np.array_equal(one[name], two[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_row_passes_give_the_bits_of_eight_row_passes(tiny, variant, dtype):
    model = gl.load(tiny(variant, dtype="bfloat16")[1], dtype=dtype)
    ids = random_ids(50)
    one, eight = (model.run(ids, logits="all", chunk=chunk).logits for chunk in (1, 8))
    assert np.array_equal(one, eight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_capturing_changes_no_bit(tiny, variant):
    model = gl.load(tiny(variant)[1], dtype="float32")
    ids = random_ids(50)
    plain = model.run(ids, logits="all").logits
    assert np.array_equal(model.run(ids, logits="all", capture=["*"]).logits, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_invariant_models_give_one_answer_for_all_chunks_and_threads(tiny, variant, dtype):
    model, folder = tiny(variant, dtype="bfloat16")
    ids = random_ids(8 * text_config(model).sliding_window + 3)
    answers = [
        gl.load(folder, dtype=dtype, threads=threads, invariant=True)
        .run(ids, logits="all", chunk=chunk)
        .logits
        for threads, chunk in [(1, 512), (2, 512), (2, 1), (2, 7), (2, 33)]
    ]
    for other in answers[1:]:
        assert np.array_equal(other, answers[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_invariant_batches_give_the_bits_of_each_row_alone(tiny, variant):
    model = gl.load(tiny(variant)[1], dtype="float32", invariant=True)
    batch = [*prompts(8), random_ids(60, seed=8), random_ids(3, seed=9)]
    together = model.run(batch, logits="all")
    for ids, run in zip(batch, together, strict=True):
        assert np.array_equal(run.logits, model.run(ids, logits="all").logits)
