"""Induction heads: which heads look back to what followed the current token before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.errors import quoted
from gemloupe.progress import ProgressBar

if TYPE_CHECKING:
    from gemloupe.model import Model

# Patterns that are held at once.
_BLOCK_BYTES = 1 << 28


@dataclass(frozen=True, eq=False)
class InductionScores:
    """Mean attention of every head from a repeated token to what followed it before."""

    values: np.ndarray
    """float32 [L, N]: 1 for a head that looks nowhere else."""
    control: np.ndarray
    """float32 [L, N]: the same heads' mean attention to a random earlier token that is not it."""
    length: int
    repeats: int
    seed: int

    def top(self, count: int = 5) -> list[tuple[int, int, float]]:
        """Returns (layer, head, score) of the heads with the largest scores."""
        order = np.argsort(-self.values, axis=None, kind="stable")[:count]
        layers, heads = np.unravel_index(order, self.values.shape)
        return [
            (int(i), int(n), float(self.values[i, n])) for i, n in zip(layers, heads, strict=True)
        ]

    def plot(self, **arguments: Any) -> Any:
        """`gl.plot.induction(self)`."""
        from gemloupe import plot

        return plot.induction(self, **arguments)

    def __repr__(self) -> str:
        lines = [f"InductionScores(length={self.length}, repeats={self.repeats}, seed={self.seed})"]
        lines += [
            f"  layer {i:>2} head {n:>2}  {score:.3f}  (control {self.control[i, n]:.3f})"
            for i, n, score in self.top()
        ]
        return "\n".join(lines)


def induction_scores(
    model: Model, length: int = 24, repeats: int = 2, seed: int = 0, *, sequences: int = 8
) -> InductionScores:
    """Measures attention on random tokens that are repeated.

    The input is BOS, then `length` random tokens, `repeats` times over. The score of a head is its
    mean attention from position t of a repetition to t − length + 1, the token that followed the
    same token the time before; a perfect induction head has 1 (Olsson et al., "In-context learning
    and induction heads", 2022). The control goes to a random earlier token instead. Mean over
    `sequences` inputs drawn with `seed`: ordinary tokens, each at most once in a sequence.

    A layer with a sliding window W < length cannot see that far back: its scores are 0.
    Patterns are read a few layers at a time (256 MiB at most, unless one layer takes more).
    ValueError for sizes too small or beyond what the model has positions for.
    """
    text = model.config.text
    for name, value, least in (
        ("length", length, 2),
        ("repeats", repeats, 2),
        ("sequences", sequences, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {quoted(value)}; expected a number, {least} or more")
    size = 1 + length * repeats
    if size > text.max_position_embeddings:
        raise ValueError(
            f"length {length} × repeats {repeats} makes {size} tokens; the model takes "
            f"{text.max_position_embeddings}"
        )
    ordinary = _ordinary_ids(model)
    if length > len(ordinary):
        raise ValueError(f"length is {length}; the vocabulary has {len(ordinary)} ordinary tokens")
    rng = np.random.default_rng(seed)
    shape = (text.num_hidden_layers, text.num_attention_heads)
    values, control = np.zeros(shape), np.zeros(shape)
    group = max(1, _BLOCK_BYTES // (4 * text.num_attention_heads * size * size))
    bos = model.config.bos_token_id
    with ProgressBar("induction heads") as bar:
        for sequence in range(sequences):
            once = rng.choice(ordinary, length, replace=False)
            ids = np.concatenate([[] if bos is None else [bos], np.tile(once, repeats)]).astype(int)
            t = np.arange(len(ids) - length * (repeats - 1), len(ids))
            elsewhere = _other_positions(t, t - length + 1, rng)
            for begin in range(0, shape[0], group):
                layers = range(begin, min(begin + group, shape[0]))
                names = [f"layers.{layer}.attn.pattern" for layer in layers]
                run = model.run(ids, capture=names, logits=None)
                for layer, name in zip(layers, names, strict=True):
                    pattern = run[name]  # [N, T, S]
                    values[layer] += pattern[:, t, t - length + 1].mean(axis=1)
                    control[layer] += pattern[:, t, elsewhere].mean(axis=1)
                bar.show((sequence + layers.stop / shape[0]) / sequences)
    return InductionScores(
        (values / sequences).astype(np.float32), (control / sequences).astype(np.float32),
        length, repeats, seed,
    )  # fmt: skip


def _ordinary_ids(model: Model) -> np.ndarray:
    """Returns the ids that are no special tokens."""
    ids = np.arange(model.config.text.vocab_size)
    if not model.tokenizer.exists:
        return ids
    special = np.isin(ids, list(model.tokenizer.special_ids))
    return ids[~special & (ids < model.tokenizer.vocab_size)]


def _other_positions(t: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns for each query a random position from 1 to t − 1 that is not its target."""
    drawn = rng.integers(1, t - 1)
    return np.where(drawn >= target, drawn + 1, drawn)
