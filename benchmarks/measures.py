"""How far one model's values are from another's: the numbers behind quality.py, on plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [T, V] of logits [T, V]."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats [T] of two sets of logits [T, V]."""
    p, q = log_softmax(reference), log_softmax(other)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def same_top(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether both prefer the same token [T]."""
    return np.asarray(reference).argmax(-1) == np.asarray(other).argmax(-1)


def losses(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Negative log-probabilities of ids[1:] under logits [T, V] of the tokens before: [T - 1]."""
    rows = np.arange(len(ids) - 1)
    return -log_softmax(logits[:-1])[rows, np.asarray(ids[1:])]


def relative_error(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """‖other − reference‖ / ‖reference‖ of each row [T] of arrays [T, D]."""
    reference = np.asarray(reference, np.float64)
    norm = np.linalg.norm(reference, axis=-1)
    return np.linalg.norm(other - reference, axis=-1) / np.maximum(norm, 1e-30)


def same_set(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the ids of each row [T, k] are the same, in whatever order: [T]."""
    return (np.sort(reference, -1) == np.sort(other, -1)).all(-1)


def js_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen–Shannon divergence in nats [T] of probabilities [T, E]: 0 to log 2."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    middle = (p + q) / 2

    def kl(a: np.ndarray) -> np.ndarray:
        return np.where(a > 0, a * np.log(np.maximum(a, 1e-300) / middle.clip(1e-300)), 0).sum(-1)

    return np.maximum((kl(p) + kl(q)) / 2, 0.0)


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    x = np.asarray(values, np.float64)
    return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; nan where one side does not vary. ValueError for unequal lengths, or under 2."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"got {len(a)} and {len(b)} values; expected two equal numbers of 2 or more"
        )
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def bootstrap(
    count: int, statistic: Callable[[np.ndarray], float], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of `statistic(indices)` over `count` things drawn with replacement.

    Samples without a value (nan) are left out; (nan, nan) if all are. ValueError for count 0.
    """
    if count < 1:
        raise ValueError("got nothing to draw from; expected at least one measurement")
    random = np.random.default_rng(seed)
    found = np.array([statistic(random.integers(0, count, count)) for _ in range(samples)])
    found = found[np.isfinite(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(groups: Sequence[np.ndarray], samples: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean over all elements, drawing whole groups (texts): tokens of one
    text are not independent."""
    sums = np.array([float(np.sum(g)) for g in groups])
    counts = np.array([len(g) for g in groups])
    return bootstrap(len(groups), lambda i: sums[i].sum() / counts[i].sum(), samples)


def round_q4_0(values: np.ndarray) -> np.ndarray:
    """Rounds float32 values [..., 32 n] as llama.cpp's Q4_0: one float16 scale for 32, −8 to 7.

    The scale is the value of the largest magnitude divided by −8, so that this one is exact.
    """
    if values.shape[-1] % 32:
        raise ValueError(f"rows have {values.shape[-1]} elements; expected a multiple of 32")
    blocks = np.asarray(values, np.float32).reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[:, None], -1)
    scale = largest / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    # As the C code: adds 8.5, cuts, at most 15.
    integers = np.minimum(np.floor(blocks * inverse + np.float32(8.5)), 15) - 8
    stored = scale.astype(np.float16).astype(np.float32)
    return (integers * stored).astype(np.float32).reshape(values.shape)
