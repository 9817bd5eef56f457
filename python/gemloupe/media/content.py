"""What stands in a prompt beside words, before and after it has its positions there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemloupe.adapters.selection import NO_ADAPTERS, Mix, Selection
from gemloupe.media.spans import Spans

KINDS = ("image", "audio", "video")
# Soft tokens of one content that are kept, under different adapters.
_KEPT = 4


class SoftTokens(np.ndarray):
    """Soft tokens float32 [n, D] of one image or sound, as the text model reads them.

    Made by `model.encode_image` and its like; prompts take them in place of what they were made
    of. `content` says what that was; slices and results of arithmetic have None.
    """

    content: Content | None = None

    @classmethod
    def of(cls, content: Content) -> SoftTokens:
        """Returns a read-only view of a content's soft tokens, which knows the content."""
        tokens = content.soft_tokens.view(cls)
        tokens.content = replace(content, fixed=True)
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
    encode: Callable[[Selection], np.ndarray] = field(repr=False)
    """Computes the soft tokens float32 [sum(lengths), D] under adapters; see `soft_tokens`."""
    labels: tuple[str, ...] = ()
    """What is written before each block: a video's times."""
    source: Any = field(default=None, repr=False)
    """What the soft tokens were made of, as its module describes it; None if it is not known."""
    adapters: Selection = field(default=NO_ADAPTERS, repr=False)
    """What its soft tokens are computed under."""
    fixed: bool = False
    """Whether it was given as soft tokens, which stay what they are under other adapters."""
    detached: bool = False
    """Whether it came from another process without the adapters of its soft tokens: encoding its
    source anew would give others."""
    _held: dict[Mix, np.ndarray] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Prompts travel between processes with their soft tokens, not with the tower.
        held = {(): np.asarray(self.soft_tokens)}
        without = {"encode": None, "adapters": NO_ADAPTERS, "fixed": True, "_held": held}
        return self.__dict__ | without | {"detached": self.detached or bool(self._mix)}

    def check_encodes(self, name: str) -> None:
        """ValueError where the source can't be encoded anew as it was."""
        if self.detached:
            raise ValueError(
                f"{name} came from another process, where adapters changed its soft tokens: it "
                "can't be encoded anew; prepare the prompt here to look into its tower"
            )

    @property
    def _mix(self) -> Mix:
        return self.adapters.of_tower("audio" if self.kind == "audio" else "vision")

    def under(self, adapters: Selection) -> Content:
        """The same content under other adapters; a fixed one is itself."""
        return self if self.fixed else replace(self, adapters=adapters)

    @property
    def soft_tokens(self) -> np.ndarray:
        """float32 [n, D], read-only; computed when first asked for."""
        mix = self._mix
        rows = self._held.get(mix)
        if rows is None:
            rows = self.encode(self.adapters)
            rows.setflags(write=False)
            self._held[mix] = rows
            for old in list(self._held)[:-_KEPT]:
                self._held.pop(old, None)
        return rows


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
