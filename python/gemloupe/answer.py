"""Splits what a model generates into thoughts, answer and tool calls, and finds stop strings.

Everything comes piece by piece, and the pieces joined are the same whatever the cuts are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemloupe.tokenizer import StreamDecoder, Tokenizer
from gemloupe.tool_syntax import STRING, parse_call, typed

THOUGHT_OPEN = "<|channel>"
THOUGHT_CLOSE = "<channel|>"
CALL_OPEN = "<|tool_call>"
CALL_CLOSE = "<tool_call|>"
RESULT_OPEN = "<|tool_response>"
TURN_CLOSE = "<turn|>"
_TURN_OPEN = "<|turn>"
MARKS = (THOUGHT_OPEN, THOUGHT_CLOSE, CALL_OPEN, CALL_CLOSE, RESULT_OPEN, TURN_CLOSE, STRING)
_ENDS = ((True, RESULT_OPEN), (True, TURN_CLOSE))
_MARK = re.compile("(" + "|".join(map(re.escape, MARKS)) + ")")


@dataclass(frozen=True)
class Part:
    """What one more piece made certain. `stopped`: a stop string is complete."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_errors: tuple[dict[str, str], ...] = ()
    stopped: bool = False

    def __add__(self, other: Part) -> Part:
        return Part(
            self.text + other.text,
            self.reasoning + other.reasoning,
            self.tool_calls + other.tool_calls,
            self.tool_errors + other.tool_errors,
            self.stopped or other.stopped,
        )


class AnswerParser:
    """Reads an answer as runs of text and the marks (special tokens) between them.

    Text inside `<|channel>NAME newline … <channel|>` is reasoning, without the name and without
    white space at its ends, several blocks joined by a newline. `<|tool_call>…<tool_call|>` is a
    call; one that can't be read stays in the text as it is, and `tool_errors` says why. Everything
    else is the answer's text, in which stop strings are looked for; other marks show nowhere.
    """

    def __init__(
        self,
        stop_strings: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        salt: bytes = b"",
    ) -> None:
        """`tools`: the schemas that calls may follow. Ids of calls depend on `salt`."""
        self._schemas = _parameters(tools or ())
        self._salt = salt
        self._filter = _StopFilter(stop_strings)
        self._thought: _ThoughtText | None = None
        self._thoughts = _ThoughtText()
        self._call: _CallText | None = None
        # After a call whose string had no end, a closing mark ends a call even inside a string.
        self._lenient = False
        self.text = ""
        self.reasoning = ""
        self.tool_calls: list[dict[str, Any]] = []
        self.tool_errors: list[dict[str, str]] = []

    @property
    def in_thought(self) -> bool:
        return self._thought is not None

    @property
    def in_call(self) -> bool:
        return self._call is not None

    def open_thought(self, begun: str) -> None:
        """The prompt ends inside a thought, of which it holds `begun`."""
        self._thought = self._thoughts
        self._thought.start()
        self._thought.push(begun)

    def feed(self, text: str) -> Part:
        """Takes the next piece of text."""
        if self._call is not None:
            self._call.feed(text)
            return Part()
        if self._thought is not None:
            reasoning = self._thought.push(text)
            self.reasoning += reasoning
            return Part(reasoning=reasoning)
        text, stopped = self._filter.push(text)
        self.text += text
        return Part(text, stopped=stopped)

    def mark(self, mark: str) -> Part:
        """Takes one of `MARKS`; others are ignored outside of calls."""
        if self._call is not None:
            return self._mark_in_call(mark)
        if mark == CALL_OPEN:
            self._end_thought()
            self._call = _CallText()
        elif mark == THOUGHT_OPEN and self._thought is None:
            self._thought = self._thoughts
            self._thought.start()
        elif mark == THOUGHT_CLOSE:
            self._end_thought()
        return Part()

    def finish(self) -> Part:
        """Releases what was held back, at the end of the row."""
        part = Part()
        while self._call is not None:
            part += self._end_call(at_end=True)
        if self._thought is not None:
            return part
        rest = self._filter.flush()
        self.text += rest
        return part + Part(rest)

    def _end_thought(self) -> None:
        if self._thought is not None:
            self._thought.end()
        self._thought = None

    def _mark_in_call(self, mark: str) -> Part:
        assert self._call is not None
        if mark == STRING or (self._call.in_string and not self._lenient):
            self._call.mark(mark)
            return Part()
        if mark == CALL_CLOSE:
            self._call.mark(mark)
            return self._end_call()
        if mark in (CALL_OPEN, RESULT_OPEN, TURN_CLOSE):
            part = self._end_call(at_end=True)
            return part + self.mark(mark)
        self._call.mark(mark)
        return Part()

    def _end_call(self, at_end: bool = False) -> Part:
        call, self._call = self._call, None
        assert call is not None
        if at_end and call.in_string and not self._lenient and call.closes:
            # The string swallowed the rest: only what stands before the first close is broken.
            self._lenient = True
            return self._read_again(call.events)
        if at_end and call.events and call.events[-1] in _ENDS:
            call.events.pop()  # What ended the row is no part of a string that has no end.
        try:
            name, values = parse_call(call.parts())
        except ValueError as error:
            problem = {"text": call.raw(), "error": f"the tool call can't be read: {error}"}
            self.tool_errors.append(problem)
            text = self._filter.flush() + problem["text"]
            self.text += text
            return Part(text, tool_errors=(problem,))
        entry = {
            "id": self._id(call.raw()),
            "type": "function",
            "function": {"name": name, "arguments": typed(values, self._schemas.get(name))},
        }
        self.tool_calls.append(entry)
        return Part(tool_calls=(entry,))

    def _read_again(self, events: Sequence[tuple[bool, str]]) -> Part:
        self._call = _CallText()
        part = Part()
        for is_mark, text in events:
            part += self.mark(text) if is_mark else self.feed(text)
            if part.stopped:
                break
        return part

    def _id(self, raw: str) -> str:
        # Unique in a conversation, and the same whenever the same ids are read.
        text = f"{len(self.tool_calls)}:{raw}".encode(errors="replace")
        return "call_" + hashlib.blake2b(text, key=self._salt, digest_size=8).hexdigest()


class AnswerReader:
    """Reads the generated ids of one row into an `AnswerParser`'s text, reasoning and calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: np.ndarray,
        stop_strings: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """`prompt_ids`: all that stands before, the content of a cache included."""
        self._marks = {tokenizer.id(mark): mark for mark in MARKS}
        self._decoder = StreamDecoder(tokenizer)
        ids = np.ascontiguousarray(prompt_ids, np.int32)
        salt = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        self.parser = AnswerParser(stop_strings, tools, salt)
        begin = open_thought(ids, tokenizer)
        if begin is not None:
            self.parser.open_thought(tokenizer.decode(ids[begin:]))

    @property
    def text(self) -> str:
        return self.parser.text

    @property
    def reasoning(self) -> str:
        return self.parser.reasoning

    def push(self, id: int) -> Part:
        """Takes the next id."""
        mark = self._marks.get(id)
        if mark is None:
            text = self._decoder.push(id)
            return self.parser.feed(text) if text else Part()
        part = self.parser.feed(self._decoder.flush())
        return part if part.stopped else part + self.parser.mark(mark)

    def finish(self) -> Part:
        """Releases the text that was held back, at the end of the row."""
        part = self.parser.feed(self._decoder.flush())
        return part if part.stopped else part + self.parser.finish()


def open_thought(ids: np.ndarray, tokenizer: Tokenizer) -> int | None:
    """Returns where the thought begins in which `ids` [T] end, None where they end in none."""
    channel = tokenizer.id(THOUGHT_OPEN)
    if channel is None:
        return None
    marks = [channel, *(tokenizer.id(m) for m in (THOUGHT_CLOSE, _TURN_OPEN, TURN_CLOSE))]
    found = np.flatnonzero(np.isin(ids, [mark for mark in marks if mark is not None]))
    if not len(found) or ids[found[-1]] != channel:
        return None
    return int(found[-1])


def parse_answer(
    text: str,
    stop: Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> AnswerParser:
    """Reads a whole answer in which special tokens are written out.

    The result has `text`, `reasoning`, `tool_calls` and `tool_errors`, as an `Output` has.
    """
    parser = AnswerParser(stop, tools)
    splitter = _MarkSplitter()
    for is_mark, piece in [*splitter.push(text), *splitter.flush()]:
        if (parser.mark(piece) if is_mark else parser.feed(piece)).stopped:
            return parser
    parser.finish()
    return parser


def _parameters(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters") for function in functions}


class _MarkSplitter:
    """Cuts text at the marks written out in it, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[tuple[bool, str]]:
        """Returns [(whether it is a mark, text)] of what is certain."""
        *found, text = _MARK.split(self._held + text)
        keep = max(_overlap(text, mark) for mark in MARKS)
        self._held = text[len(text) - keep :]
        pieces = [*found, text[: len(text) - keep]]
        return [(bool(index % 2), piece) for index, piece in enumerate(pieces)]

    def flush(self) -> list[tuple[bool, str]]:
        held, self._held = self._held, ""
        return [(False, held)]


class _CallText:
    """What stands between the marks of a call."""

    def __init__(self) -> None:
        self.events: list[tuple[bool, str]] = []
        self.in_string = False
        self.closes = False
        """Whether a closing mark occurs, inside a string."""

    def feed(self, text: str) -> None:
        if text:
            self.events.append((False, text))

    def mark(self, mark: str) -> None:
        self.events.append((True, mark))
        self.in_string ^= mark == STRING
        self.closes |= mark == CALL_CLOSE

    def parts(self) -> list[str]:
        """The text cut at every string delimiter, without the closing mark."""
        events = self.events[:-1] if self.events[-1:] == [(True, CALL_CLOSE)] else self.events
        parts: list[list[str]] = [[]]
        for is_mark, text in events:
            if is_mark and text == STRING:
                parts.append([])
            else:
                parts[-1].append(text)
        return ["".join(texts) for texts in parts]

    def raw(self) -> str:
        return CALL_OPEN + "".join(text for _, text in self.events)


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
