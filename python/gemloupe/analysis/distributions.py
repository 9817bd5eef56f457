"""What is asked of logits of a whole vocabulary, row by row."""

from __future__ import annotations

import numpy as np

# Groups of logits whose largest are compared first: fewer than the groups of a real vocabulary.
_GROUP = 512


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """Returns log Σ exp(logits) [n] of rows [n, V]."""
    most = logits.max(axis=-1)
    return most + np.log(np.exp(logits - most[..., None]).sum(axis=-1))


def kl_divergence(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """Returns KL(p ‖ q) = Σ p (log p − log q) in nats [n], of logits [n, V]."""
    log_p = p_logits - log_sum_exp(p_logits)[..., None]
    log_q = q_logits - log_sum_exp(q_logits)[..., None]
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)


def top_ids(logits: np.ndarray, k: int) -> np.ndarray:
    """Returns the ids [n, k] of the largest logits of each row, descending; ties by lower id.

    Exact: the k largest lie in the k groups with the largest maxima.
    """
    rows, size = logits.shape
    k = min(k, size)
    if size <= _GROUP * k:
        return np.argsort(-logits, axis=1, kind="stable")[:, :k]
    full = size // _GROUP * _GROUP
    groups = logits[:, :full].reshape(rows, -1, _GROUP)
    best = np.argsort(-groups.max(axis=2), axis=1, kind="stable")[:, :k]
    ids = (np.sort(best, axis=1)[:, :, None] * _GROUP + np.arange(_GROUP)).reshape(rows, -1)
    ids = np.concatenate([ids, np.broadcast_to(np.arange(full, size), (rows, size - full))], axis=1)
    values = np.take_along_axis(logits, ids, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, axis=1)
