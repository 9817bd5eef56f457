"""Which rows of a sequence a capture or an edit is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gemloupe import _core
from gemloupe.errors import one_of, quoted
from gemloupe.prompt import KINDS

# Tokens of the longest sequence that a model of the family takes: a slice's later stop is no end.
_LONGEST = 1 << 18

WORDS = ("prompt", "generated", "last", "answer")


class Rows(Protocol):
    """What a call's rows are: a prompt, or the rows of a tower."""

    def __len__(self) -> int: ...

    @property
    def media(self) -> Sequence[Any]: ...

    def positions(self, kind: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Span:
    """Where the prompt of a call stands in its sequence: positions [first, first + len(prompt))."""

    prompt: Rows
    first: int

    @property
    def end(self) -> int:
        """The position after the prompt, of the first generated token."""
        return self.first + len(self.prompt)


@dataclass(frozen=True)
class Positions:
    """Resolved positions: `listed` (ascending, absolute), and all from `begin` on if not None."""

    listed: tuple[int, ...]
    begin: int | None

    def core(self) -> _core.PositionFilter:
        return _core.PositionFilter(self.listed, self.begin)

    def count(self, rows: int, first: int) -> int:
        """How many of the positions first … first + rows − 1 these are."""
        end = first + rows
        begin = end if self.begin is None else max(first, min(self.begin, end))
        return end - begin + sum(first <= position < begin for position in self.listed)


EVERYWHERE = Positions((), 0)


def resolve(positions: Any, span: Span) -> Positions:
    """Resolves what a caller writes for positions, once, at the call.

    None: all. Numbers are absolute in the sequence, negative ones count from the end of the prompt
    (-1 is its last token). A slice counts likewise; without an end it goes on into the answer. A
    boolean array has one entry a prompt token. Words: "prompt", "generated", "last" (the prompt's
    last token and every generated one), "answer" (what the model wrote in the chat, and what it is
    writing), and the kinds of `Prompt.positions`; "model" goes on into the answer.

    Raises ValueError for positions before 0 and unknown words, TypeError for other things.
    """
    if positions is None:
        return EVERYWHERE
    if isinstance(positions, Positions):
        return positions
    if isinstance(positions, str):
        return _resolve_word(positions, span)
    if isinstance(positions, slice):
        return _resolve_slice(positions, span)
    if isinstance(positions, (bool, np.bool_)):
        raise TypeError(f"positions is {positions}; expected numbers, a slice or a word")
    array = np.asarray(positions)
    if array.dtype == bool:
        if array.shape != (len(span.prompt),):
            raise ValueError(
                f"positions is a boolean array of shape {array.shape}; expected "
                f"({len(span.prompt)},), one entry a token of the prompt"
            )
        return _listed(np.flatnonzero(array) + span.first)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(
            f"positions is {quoted(positions)}; expected numbers, a slice, a boolean array or one "
            f"of {one_of((*WORDS, *KINDS))}"
        )
    return _listed([_absolute(int(position), span) for position in np.atleast_1d(array).ravel()])


def _absolute(position: int, span: Span) -> int:
    resolved = span.end + position if position < 0 else position
    if resolved >= 2**31:
        raise ValueError(f"position {position} is beyond every sequence; expected below 2**31")
    if resolved < 0:
        raise ValueError(
            f"position {position} is before the start: the prompt ends at {span.end}; expected "
            f"{-span.end} or more"
        )
    return resolved


def _resolve_slice(positions: slice, span: Span) -> Positions:
    step = 1 if positions.step is None else positions.step
    if step < 1:
        raise ValueError(f"positions is {positions!r}; expected a step of 1 or more")
    start = 0 if positions.start is None else _absolute(positions.start, span)
    if positions.stop is None or positions.stop > _LONGEST:
        return Positions((), start) if step == 1 else _listed(range(start, span.end, step))
    return _listed(range(start, _absolute(positions.stop, span), step))


def _resolve_word(word: str, span: Span) -> Positions:
    if word == "prompt":
        return _listed(range(span.first, span.end))
    if word == "generated":
        return Positions((), span.end)
    if word == "last":
        return Positions((), span.end - 1)
    kind = "model" if word == "answer" else word
    if kind not in KINDS:
        raise ValueError(f"positions is {quoted(word)}; expected one of {one_of((*WORDS, *KINDS))}")
    listed = _listed(span.prompt.positions(kind) + span.first).listed
    return Positions(listed, span.end if kind == "model" else None)


def _listed(positions: Sequence[int] | range | np.ndarray) -> Positions:
    return Positions(tuple(sorted({int(position) for position in positions})), None)
