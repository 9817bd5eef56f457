"""What stands in a prompt beside words, before and after it has its positions there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemloupe.media.spans import Spans

KINDS = ("image", "audio", "video")


class SoftTokens(np.ndarray):
    """Soft tokens float32 [n, D] of one image or sound, as the text model reads them.

    Made by `model.encode_image` and its like; prompts take them in place of what they were made
    of. `content` says what that was; slices and results of arithmetic have None.
    """

    content: Content | None = None

    @classmethod
    def of(cls, rows: np.ndarray, content: Content) -> SoftTokens:
        """Returns a read-only view of `rows` that knows its content."""
        tokens = rows.view(cls)
        tokens.content = content
        tokens.setflags(write=False)
        return tokens

    def __array_finalize__(self, _source: Any) -> None:
        self.content = None


@dataclass(frozen=True, eq=False)
class Content:
    """One image, sound or video: how many soft tokens it has, and the way to them."""

    kind: str
    """"image", "audio" or "video"."""
    lengths: tuple[int, ...]
    """Soft tokens of each block: one block of an image or sound, one a frame of a video."""
    encode: Callable[[], np.ndarray] = field(repr=False)
    """Computes the soft tokens float32 [sum(lengths), D]; see `soft_tokens`."""
    labels: tuple[str, ...] = ()
    """What is written before each block: a video's times."""
    source: Any = field(default=None, repr=False)
    """What the soft tokens were made of, as its module describes it; None if it is not known."""
    _held: list[np.ndarray] = field(default_factory=list, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Prompts travel between processes with their soft tokens, not with the tower.
        return {**self.__dict__, "encode": None, "_held": [np.asarray(self.soft_tokens)]}

    @property
    def soft_tokens(self) -> np.ndarray:
        """float32 [n, D], read-only; computed when first asked for."""
        if not self._held:
            rows = self.encode()
            rows.setflags(write=False)
            self._held.append(rows)
        return self._held[0]


@dataclass(frozen=True, eq=False)
class Medium:
    """A content at its place in a prompt."""

    content: Content
    index: int
    """Its number among those of its kind, from 0."""
    blocks: tuple[np.ndarray, ...]
    """For each block the indices of its soft tokens among the prompt's ids, int64."""

    @property
    def kind(self) -> str:
        """ "image", "audio" or "video"."""
        return self.content.kind

    @property
    def soft_tokens(self) -> np.ndarray:
        """float32 [n, D], one row a position."""
        return self.content.soft_tokens

    @property
    def positions(self) -> np.ndarray:
        """int64 [n]: the indices of its soft tokens among the prompt's ids."""
        return np.concatenate(self.blocks)

    @property
    def spans(self) -> Spans:
        """Boxes, frames and seconds of each soft token; None what this medium has not."""
        source = self.content.source
        spans: Spans = Spans() if source is None else source.spans
        return spans

    def __repr__(self) -> str:
        first, last = self.blocks[0][0], self.blocks[-1][-1]
        return f"Medium({self.kind} {self.index}, {len(self.positions)} at {first} to {last})"
