"""Induction heads: which heads look back to what followed the current token before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.analysis import arguments
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
    model: Model,
    length: int = 24,
    repeats: int = 2,
    seed: int = 0,
    *,
    sequences: int = 8,
    ids: Any = None,
) -> InductionScores:
    """Measures attention on random tokens that are repeated.

    The input is BOS, then `length` random tokens, `repeats` times over. The score of a head is its
    mean attention from position t of a repetition to t − length + 1, the token that followed the
    same token the time before; a perfect induction head has 1 (Olsson et al., "In-context learning
    and induction heads", 2022). The control goes to a random earlier token instead. Mean over
    `sequences` inputs drawn with `seed`, each token at most once in a sequence, from `ids`: None
    for all tokens that begin a word. Heads may well do better on tokens that the model knows well.

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
    words = _word_ids(model) if ids is None else _given_ids(ids, model)
    if length > len(words):
        raise ValueError(f"length is {length}; expected at most {len(words)}, the tokens to choose")
    rng = np.random.default_rng(seed)
    shape = (text.num_hidden_layers, text.num_attention_heads)
    values, control = np.zeros(shape), np.zeros(shape)
    group = max(1, _BLOCK_BYTES // (4 * text.num_attention_heads * size * size))
    bos = model.config.bos_token_id
    with ProgressBar("induction heads") as bar:
        for sequence in range(sequences):
            once = rng.choice(words, length, replace=False)
            x = np.concatenate([[] if bos is None else [bos], np.tile(once, repeats)]).astype(int)
            t = np.arange(len(x) - length * (repeats - 1), len(x))
            elsewhere = _other_positions(t, t - length + 1, rng)
            for begin in range(0, shape[0], group):
                layers = range(begin, min(begin + group, shape[0]))
                names = [f"layers.{layer}.attn.pattern" for layer in layers]
                run = model.run(x, capture=names, logits=None, routing=False)
                for layer, name in zip(layers, names, strict=True):
                    pattern = run[name]  # [N, T, S]
                    values[layer] += pattern[:, t, t - length + 1].mean(axis=1)
                    control[layer] += pattern[:, t, elsewhere].mean(axis=1)
                bar.show((sequence + layers.stop / shape[0]) / sequences)
    return InductionScores(
        (values / sequences).astype(np.float32), (control / sequences).astype(np.float32),
        length, repeats, seed,
    )  # fmt: skip


def _word_ids(model: Model) -> np.ndarray:
    """Returns the ids of tokens that begin a word: a space, then two letters or more.

    Bytes, marks, unused and special tokens are rare in texts, so that heads hardly know them.
    All ids where the model has no tokenizer.
    """
    ids = range(model.config.text.vocab_size)
    if not model.tokenizer.exists:
        return np.array(ids)
    pieces = zip(ids, model.tokenizer.tokens(ids), strict=True)
    return np.array([i for i, p in pieces if p[0] == "\u2581" and len(p) > 2 and p[1:].isalpha()])


def _given_ids(ids: Any, model: Model) -> np.ndarray:
    return np.unique([arguments.token_id(index, model) for index in ids])


def _other_positions(t: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns for each query a random position from 1 to t − 1 that is not its target."""
    drawn = rng.integers(1, t - 1)
    return np.where(drawn >= target, drawn + 1, drawn)
