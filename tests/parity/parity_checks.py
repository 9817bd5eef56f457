"""How gemloupe's values are compared with transformers' ones.

Tolerances: logits 1e-4 absolute, any other tensor 1e-4 of its largest value (at least 1). Both are
float32 against float32; nothing here is tuned to what gemloupe happens to give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from reference.attention import softmax
from reference.mask import visible

LOGIT_TOLERANCE = 1e-4
TENSOR_TOLERANCE = 1e-4
# A greedy token or an expert may differ only where the reference's own gap is below this.
TIE = 1e-5


def worst_difference(got: np.ndarray, want: np.ndarray, name: str) -> float:
    """Returns the largest |got - want|; masked (-inf) entries must be the same ones."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    masked = np.isneginf(want)
    assert np.array_equal(np.isneginf(got), masked), f"{name}: other positions are masked"
    difference = np.abs(np.where(masked, 0, got) - np.where(masked, 0, want))
    assert np.isfinite(difference).all(), f"{name}: NaN or infinity"
    return float(difference.max(initial=0))


def assert_logits_close(got: np.ndarray, want: np.ndarray, name: str = "logits") -> None:
    worst = worst_difference(got, want, name)
    assert worst <= LOGIT_TOLERANCE, f"{name}: off by {worst:.2e}"


def assert_tensor_close(got: np.ndarray, want: np.ndarray, name: str) -> None:
    worst = worst_difference(got, want, name)
    largest = np.abs(want[np.isfinite(want)]).max(initial=0)
    bound = TENSOR_TOLERANCE * max(1.0, float(largest))
    assert worst <= bound, f"{name}: off by {worst:.2e}, allowed {bound:.2e}"


def assert_layers_close(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    """Compares every layer's output, in order, so that the first wrong layer is named."""
    names = [name for name in want if name.endswith("resid_post")]
    assert names
    for name in names:
        assert_tensor_close(got[name], want[name], name)


def assert_greedy(ids: Sequence[int], generated: Sequence[int], logits: np.ndarray) -> None:
    """Checks generated tokens against the reference's logits [T, V] of prompt + generated.

    Every token must be the reference's argmax given the tokens before it (teacher forcing), or
    lie within TIE of it.
    """
    for step, token in enumerate(generated):
        row = logits[len(ids) + step - 1]
        gap = float(row.max() - row[token])
        assert gap < TIE, f"token {step}: chose {token}, {gap:.2e} below {int(row.argmax())}"


def assert_experts_equal_or_tied(got: np.ndarray, probs: np.ndarray, name: str) -> None:
    """Checks expert ids [T, k] against reference probabilities [T, E], ties aside."""
    k = got.shape[1]
    for row, (chosen, p) in enumerate(zip(got, probs, strict=True)):
        smallest = p[chosen].min()
        best_left_out = np.delete(p, chosen).max()
        assert len(set(chosen.tolist())) == k, f"{name}[{row}]: an expert twice"
        assert best_left_out - smallest < TIE, f"{name}[{row}]: {chosen}, probabilities {p}"


def attention_and_bound(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int | None, roundoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns z [T, N, H] in float64 and how far float32 attention on rounded keys may be off.

    A score may be off by `roundoff` times the sum of |q||k|; a probability then by the factor
    exp(2 * that); a weighted sum of values by this and the values' own roundoff.
    """
    group = q.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), group, axis=1) for x in (keys, values))
    q = q.astype(np.float64)
    scores = np.einsum("tnh,snh->nts", q, keys)
    size = np.einsum("tnh,snh->nts", np.abs(q), np.abs(keys))
    seen = visible(np.arange(len(q)), window, bidirectional=False)
    off = roundoff * np.where(seen, size, 0).max(axis=-1, keepdims=True)
    pattern = softmax(np.where(seen, scores, -np.inf))
    z = np.einsum("nts,snh->tnh", pattern, values)
    factor = np.expm1(2 * off) + roundoff
    return z, np.einsum("nts,snh->tnh", pattern * factor, np.abs(values))
