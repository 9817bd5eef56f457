"""What `vocab=` and `targets=` of a run ask of its logits, which are then never held whole.

logprobs[t] = ln softmax(logits[t])[target of t]; entropy[t] = −Σ p ln p of the same distribution,
both after the soft-cap, in nats, summed in float64 (Shannon 1948).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemloupe import _core
from gemloupe.config import ModelConfig
from gemloupe.errors import quoted
from gemloupe.prompt import Prompt

_NONE = -1


@dataclass(frozen=True)
class Reading:
    """What one row of a call asks for."""

    vocab: list[int] | None = None
    """The columns of logits that are kept; None for all."""
    targets: list[int] | None = None
    """One id for each of the row's ids, −1 for none; None for no scores."""
    vocab_size: int = 0

    def scores(self) -> _core.TokenScores | None:
        """What the engine fills."""
        return None if self.targets is None else _core.TokenScores(self.targets)

    def columns(self, values: np.ndarray | None, logits: Any, rows: int) -> np.ndarray | None:
        """The engine's logits; where there are no rows or no columns, an array of none."""
        if logits is None:
            return None
        if self.vocab == []:
            return np.zeros((rows, 0), np.float32)
        width = self.vocab_size if self.vocab is None else len(self.vocab)
        return np.zeros((0, width), np.float32) if values is None else values


def values(scores: _core.TokenScores | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(logprobs, entropy) that the engine filled in, or (None, None)."""
    return (None, None) if scores is None else (scores.logprobs, scores.entropy)


def per_row(targets: Any, rows: int | None) -> list[Any]:
    """`targets=` of each row: "next" and None hold for all, else a batch has one entry a row."""
    if rows is None or targets is None or isinstance(targets, str):
        return [targets] * (rows or 1)
    if not hasattr(targets, "__len__"):
        raise ValueError(
            f'targets is {quoted(targets)}; expected "next", or ids for each of {rows} rows'
        )
    if len(targets) != rows:
        raise ValueError(
            f'targets has {len(targets)} entries for {rows} rows; pass ids for each row, or "next"'
        )
    return list(targets)


def parse(
    vocab: Any, targets: Sequence[Any], prompts: Sequence[Prompt], config: ModelConfig, logits: Any
) -> list[Reading]:
    """One `Reading` a row. ValueError for ids outside the vocabulary and for other lengths."""
    size = config.text.vocab_size
    columns = None if vocab is None else _ids(vocab, "vocab", size, 0)
    if columns is not None and logits is None:
        raise ValueError("vocab chooses columns of logits, but logits is None; leave one out")
    return [
        Reading(columns, _targets(of_row, prompt, config), size)
        for of_row, prompt in zip(targets, prompts, strict=True)
    ]


def _targets(targets: Any, prompt: Prompt, config: ModelConfig) -> list[int] | None:
    if targets is None:
        return None
    if isinstance(targets, str):
        if targets != "next":
            raise ValueError(f'targets is {quoted(targets)}; expected "next", or an id a row')
        following = np.append(prompt.ids[1:], _NONE)
        if prompt.media:  # No model predicts soft tokens.
            media = (config.image_token_id, config.audio_token_id, config.video_token_id)
            following[np.isin(following, [token for token in media if token is not None])] = _NONE
        return [int(token) for token in following]
    ids = _ids(targets, "targets", config.text.vocab_size, _NONE)
    if len(ids) != len(prompt):
        raise ValueError(
            f"targets has {len(ids)} ids; expected one for each of the {len(prompt)} rows (-1 for "
            "none)"
        )
    return ids


def _ids(given: Any, name: str, size: int, low: int) -> list[int]:
    try:
        array = np.asarray(given)
    except (ValueError, TypeError):  # Lists of different lengths.
        raise ValueError(f"{name} is {quoted(given)}; expected a list of token ids") from None
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} is {array.dtype} of shape {list(array.shape)}; expected a list of token ids"
        )
    wrong = array[(array < low) | (array >= size)]
    if wrong.size:
        raise ValueError(f"{name} has the id {wrong[0]}; expected {low} to {size - 1}")
    return [int(token) for token in array]
