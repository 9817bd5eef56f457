"""KV caches of the tiny models, filled beyond every window."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import gemloupe as gl
from tiny_models import random_ids

DTYPES = ("float32", "float16", "bfloat16", "int8")
LONG = 150  # well past every window and past two blocks of 64


def load(tiny: Callable, variant: str, **arguments: object) -> gl.Model:
    return gl.load(tiny(variant, **arguments)[1], dtype="float32", invariant=True)


def filled(model: gl.Model, count: int = LONG, *, seed: int = 1, **arguments: object) -> gl.KvCache:
    cache = model.new_cache(**arguments)
    model.run(random_ids(count, seed=seed), cache=cache, logits=None)
    return cache


def contents(cache: gl.KvCache) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def same(a: gl.KvCache, b: gl.KvCache) -> bool:
    return all(
        np.array_equal(x, y)
        for one, other in zip(contents(a), contents(b), strict=True)
        for x, y in zip(one, other, strict=True)
    )


def sources(cache: gl.KvCache) -> list[int]:
    return [layer.index for layer in cache.layers if layer.kind != "shared"]
