"""The pieces of an answer as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gemloupe.output import Output, TokenLogprobs
from gemloupe.tools import ToolResult

if TYPE_CHECKING:
    from gemloupe.capturing import RoutedTokens
    from gemloupe.generation import Generation


@dataclass(frozen=True)
class Piece:
    """What one more token of one row brought.

    `text` and `reasoning` are often "": characters and stop strings are never split over pieces, so
    that the texts of a row's pieces, joined, are the output's text.
    """

    row: int
    text: str = ""
    ids: tuple[int, ...] = ()
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls that this token completed, as in `Output.tool_calls`."""
    tool_errors: list[dict[str, str]] = field(default_factory=list)
    """Calls that can't be read, as in `Output.tool_errors`; `text` holds them too."""
    tool_results: list[ToolResult] = field(default_factory=list)
    """What the calls of a round gave, in a piece of its own; the row goes on after it."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each of `ids`, where the call asked for them."""
    experts: RoutedTokens | None = None
    """Of the tokens read since the last piece; in rows that were asked for it alone."""
    finish_reason: str | None = None
    """Set in the last piece of a row: "stop", "length", "tool_calls" or "cancelled"."""


class Stream(Iterator[Piece]):
    """Generates while it is iterated over; also a context manager that closes itself.

    An exception of the model, Ctrl-C while it computes included, ends every row and gives caches
    that the caller passed their earlier content; the model can be used on. Leaving a `with` block,
    by an exception of the caller's own too, is `close()`: caches keep what was computed.
    """

    def __init__(self, generation: Generation, is_batch: bool) -> None:
        self._generation = generation
        self._is_batch = is_batch
        self._pieces: deque[Piece] = deque()

    def __next__(self) -> Piece:
        while not self._pieces:
            if self._generation.done:
                raise StopIteration
            self._step()
        return self._pieces.popleft()

    def _step(self) -> None:
        try:
            self._pieces.extend(self._generation.step())
            for error in self._generation.errors.values():
                raise error
        except BaseException:
            self._generation.abort()
            raise

    def close(self) -> None:
        """Ends the rows that are still running; `result` has what came so far."""
        self._pieces.extend(self._generation.cancel())

    @property
    def result(self) -> Output | list[Output]:
        """The output, a list of them for a batch. What has not been generated yet is now."""
        while not self._generation.done:
            self._step()
        outputs = self._generation.outputs()
        return outputs if self._is_batch else outputs[0]

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
