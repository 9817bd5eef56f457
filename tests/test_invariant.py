"""Invariant mode: one answer, bit for bit, whatever the batch, chunk, threads and cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import gemloupe as gl
from gguf_files import SIZES, all_of, write_gguf
from tiny_models import make_tiny, random_ids, save_tiny

VARIANTS = ("e2b", "26b", "31b")
DTYPES = ("float32", "bfloat16", "int8", "int4")
GGUFS = {"Q4_0": Type.Q4_0, "Q4_K": Type.Q4_K}
KV_DTYPES = ("float32", "float16", "bfloat16", "int8")
# Beyond every window (7 to 12), and beyond two of attention's blocks of 64 positions.
IDS = random_ids(131)
LENGTHS = (1, 5, 23, 2, 66, 13, 31, 8)


@dataclass
class Subject:
    """One model, on one and on two threads."""

    one: gl.Model
    two: gl.Model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def get(variant: str, kind: str) -> Path:
        if (variant, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{variant}-{kind}")
            save_tiny(make_tiny(variant, **SIZES[variant]), folder)
            made[variant, kind] = folder / f"{kind}.gguf"
            write_gguf(made[variant, kind], folder, all_of(GGUFS[kind]))
        return made[variant, kind]

    return get


SUBJECTS = [(variant, dtype) for variant in VARIANTS for dtype in (*DTYPES, *GGUFS)]


@pytest.fixture(scope="module", params=SUBJECTS, ids="-".join)
def subject(request: pytest.FixtureRequest, tiny, gguf_file) -> Subject:
    variant, dtype = request.param
    if dtype in GGUFS:
        source, arguments = gguf_file(variant, dtype), {}
    else:
        source, arguments = tiny(variant, dtype="bfloat16")[1], {"dtype": dtype}
    return Subject(
        *(gl.load(source, threads=threads, invariant=True, **arguments) for threads in (1, 2))
    )


def logits_of(model: gl.Model, kv_dtype: str, chunk: int = 512) -> np.ndarray:
    cache = model.new_cache(dtype=kv_dtype)
    return model.run(IDS, logits="all", cache=cache, chunk=chunk).logits


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_chunks_and_threads_change_no_bit(subject: Subject, kv_dtype: str) -> None:
    expected = logits_of(subject.one, kv_dtype)
    assert np.isfinite(expected).all()
    for chunk in (1, 7, 64, 512):
        assert np.array_equal(logits_of(subject.two, kv_dtype, chunk), expected), chunk
    assert np.array_equal(logits_of(subject.one, kv_dtype, 7), expected)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_warm_and_forked_caches_change_no_bit(subject: Subject, kv_dtype: str) -> None:
    expected = logits_of(subject.one, kv_dtype)
    model = subject.two
    cache = model.new_cache(dtype=kv_dtype)
    warm = [model.run(IDS[:50], logits="all", cache=cache).logits]
    fork = cache.fork()
    model.run(IDS[60:100], cache=fork)  # what one fork reads, the other does not see
    warm += [model.run(part, logits="all", cache=cache).logits for part in (IDS[50:51], IDS[51:])]
    assert np.array_equal(np.concatenate(warm), expected)
    early = model.new_cache(dtype=kv_dtype)
    model.run(IDS[:70], cache=early)
    forked = model.run(IDS[70:], logits="all", cache=early.fork()).logits
    assert np.array_equal(forked, expected[70:])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_neighbours_in_a_batch_change_no_bit(subject: Subject, kv_dtype: str) -> None:
    prompts = [random_ids(length, seed=length) for length in LENGTHS]
    options = {"max_new_tokens": 5, "temperature": 0, "logprobs": 4, "prompt_logprobs": 2}
    alone = [
        subject.one.generate(ids, cache=subject.one.new_cache(dtype=kv_dtype), **options)
        for ids in prompts
    ]
    for rows in (2, 5, 8):
        caches = [subject.two.new_cache(dtype=kv_dtype) for _ in range(rows)]
        together = subject.two.generate(prompts[:rows], cache=caches, **options)
        for index, (one, out) in enumerate(zip(alone, together, strict=False)):
            assert list(out.ids) == list(one.ids), f"row {index} of {rows}"
            assert out.logprobs == one.logprobs, f"row {index} of {rows}"
            assert out.prompt_logprobs == one.prompt_logprobs, f"row {index} of {rows}"
