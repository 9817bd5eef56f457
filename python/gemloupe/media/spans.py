"""What each soft token of an image, sound or video stands for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gemloupe.table import Table

if TYPE_CHECKING:
    from gemloupe.media.content import Medium


class Spans(NamedTuple):
    """One row a soft token; None for what this kind of medium has not, or what is not known."""

    boxes: np.ndarray | None = None
    """float64 [n, 4]: left, top, right, bottom, in pixels of the picture as it was passed (turned
    upright), of a video in pixels of its frame."""
    frames: np.ndarray | None = None
    """int64 [n, 2]: first and last log-mel frame of a sound (of 12B: block of 640 samples), or
    twice the index of the frame in the caller's video."""
    seconds: np.ndarray | None = None
    """float64 [n, 2]: from and to, of a sound; of a video's frame twice its time."""


@dataclass(frozen=True)
class Place:
    """What stands at one position of a prompt."""

    position: int
    """Index among the prompt's ids."""
    kind: str
    """ "image", "audio" or "video"."""
    index: int
    """Which one among those of its kind, from 0."""
    token: int
    """Which of its soft tokens, from 0."""
    box: tuple[float, ...] | None
    """Left, top, right, bottom in pixels; None of a sound. See `Spans`, as for the others."""
    frames: tuple[int, ...] | None
    """First and last frame; None of an image."""
    seconds: tuple[float, ...] | None
    """From and to; None of an image."""


class Media(tuple["Medium", ...]):
    """A prompt's images, sounds and videos, in order of position."""

    def at(self, position: int) -> Place | None:
        """What the soft token at `position`, an index among the prompt's ids, stands for.

        None where text stands. Box, frames and seconds are None, too, where soft tokens were passed
        whose picture or sound is not known.
        """
        for medium in self:
            found = np.flatnonzero(medium.positions == position)
            if len(found):
                return _place(medium, int(found[0]), medium.spans)
        return None

    def places(self) -> list[Place]:
        """What every soft token of the prompt stands for, in order of position."""
        found = []
        for medium in self:
            spans = medium.spans
            found += [_place(medium, token, spans) for token in range(len(medium.positions))]
        return found

    def table(self) -> Table:
        """The same as a table of position, kind, index, token, box, frames and seconds."""
        places = self.places()
        names = list(Place.__dataclass_fields__)
        return Table({name: [_cell(getattr(p, name)) for p in places] for name in names})


def _place(medium: Medium, token: int, spans: Spans) -> Place:
    boxes, frames, seconds = (
        None if rows is None else tuple(rows[token].tolist()) for rows in spans
    )
    position = int(medium.positions[token])
    return Place(position, medium.kind, medium.index, token, boxes, frames, seconds)


def _cell(value: Any) -> Any:
    if not isinstance(value, Iterable) or isinstance(value, str):
        return value
    return " ".join(f"{number:.5g}" for number in value)
