"""Splits what a model generates into thought and answer, and finds stop strings, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemloupe.tokenizer import StreamDecoder, Tokenizer

THOUGHT_OPEN = "<|channel>"
THOUGHT_CLOSE = "<channel|>"
_TURN_OPEN = "<|turn>"


@dataclass(frozen=True)
class Part:
    """What one more token made certain. `stopped`: a stop string is complete."""

    text: str = ""
    reasoning: str = ""
    stopped: bool = False


class AnswerReader:
    """Reads the generated ids of one row.

    Text inside `<|channel>NAME newline … <channel|>` is reasoning, without the name and without
    white space at its ends, several blocks joined by a newline; everything else is the answer's
    text, in which stop strings are looked for. Special tokens show in neither.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: np.ndarray, stop_strings: Sequence[str] = ()
    ) -> None:
        self._open = tokenizer.id(THOUGHT_OPEN)
        self._close = tokenizer.id(THOUGHT_CLOSE)
        self._decoder = StreamDecoder(tokenizer)
        self._filter = _StopFilter(stop_strings)
        self._thought = _ThoughtText()
        self._in_thought = self._ends_in_thought(prompt_ids, tokenizer)
        self.text = ""
        self.reasoning = ""

    def push(self, id: int) -> Part:
        """Takes the next id."""
        if id == self._open and not self._in_thought:
            part = self._pass_on(self._decoder.flush())
            self._in_thought = True
            self._thought.start()
            return part
        if id == self._close and self._in_thought:
            part = self._pass_on(self._decoder.flush())
            self._thought.end()
            self._in_thought = False
            return part
        return self._pass_on(self._decoder.push(id))

    def finish(self) -> Part:
        """Releases the text that was held back, at the end of the row."""
        part = self._pass_on(self._decoder.flush())
        if part.stopped or self._in_thought:
            return part
        rest = self._filter.flush()
        self.text += rest
        return Part(part.text + rest, part.reasoning)

    def _pass_on(self, text: str) -> Part:
        if self._in_thought:
            reasoning = self._thought.push(text)
            self.reasoning += reasoning
            return Part(reasoning=reasoning)
        text, stopped = self._filter.push(text)
        self.text += text
        return Part(text, stopped=stopped)

    def _ends_in_thought(self, ids: np.ndarray, tokenizer: Tokenizer) -> bool:
        """Whether the prompt ends inside a thought, as after a tool result."""
        if self._open is None:
            return False
        marks = (self._open, self._close, tokenizer.id(_TURN_OPEN))
        found = [int(i) for i in ids if i in marks]
        if not found or found[-1] != self._open:
            return False
        start = int(np.flatnonzero(np.asarray(ids) == self._open)[-1])
        self._thought.start()
        self._thought.push(tokenizer.decode(ids[start:]))
        return True


class _ThoughtText:
    """Drops a thought's name and the white space at its ends, which only a later text can tell."""

    def __init__(self) -> None:
        self._needs_name = False
        self._is_empty = True
        self._blocks = 0
        self._space = ""

    def start(self) -> None:
        self._needs_name = True
        self._is_empty = True
        self._space = ""

    def end(self) -> None:
        self._blocks += not self._is_empty

    def push(self, text: str) -> str:
        if self._needs_name:
            _, newline, text = text.partition("\n")
            self._needs_name = not newline
            if not newline:
                return ""
        shown = text.rstrip()
        if not shown:
            self._space += text
            return ""
        if self._is_empty:
            before = "\n" if self._blocks else ""
            released = before + shown.lstrip()
        else:
            released = self._space + shown
        self._is_empty = False
        self._space = text[len(shown) :]
        return released


class _StopFilter:
    """Passes text on up to the first stop string, and holds back what may be the start of one."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = tuple(stop_strings)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns (text that is certain, whether a stop string is complete)."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
