"""Log-probabilities of given tokens, without the logits of a long text in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gemloupe.cache import KvCache
    from gemloupe.model import Model

# Logits that are in memory at once.
_LOGITS_BYTES = 128 << 20


def logits_blocks(
    model: Model, ids: np.ndarray, begin: int, cache: KvCache, adapter: Any = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, logits [n, V]) of the rows of `ids` [T] from `begin` on, block after block.

    `ids` are appended to the cache.
    """
    rows = max(1, min(512, _LOGITS_BYTES // (4 * model.config.text.vocab_size)))
    arguments: dict[str, Any] = {"cache": cache, "routing": False, "adapter": adapter}
    if begin:
        model.run(ids[:begin], logits=None, **arguments)
    for at in range(begin, len(ids), rows):
        yield at, model.run(ids[at : at + rows], logits="all", **arguments).logits


def target_logprobs(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log p of each row's target, float64 [n], of logits [n, V] and ids [n]."""
    most = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - most).sum(axis=1, dtype=np.float64)
    chosen = np.take_along_axis(logits, targets[:, None].astype(np.int64), axis=1)
    return (chosen - most)[:, 0].astype(np.float64) - np.log(total)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log softmax of rows, float32 [n, V]; sums are float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, dtype=np.float64)
    shifted -= np.log(total)[:, None].astype(np.float32)
    return shifted
