"""Which tokens a row may choose next: budgets of thinking, and answers of a given form.

A guide answers the session's `TokenMask` once for every token. What takes time, the masks of a
grammar, is worked out by a thread of its own while the model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gemloupe.answer import (
    CALL_CLOSE,
    CALL_OPEN,
    RESULT_OPEN,
    THOUGHT_CLOSE,
    THOUGHT_OPEN,
    open_thought,
)
from gemloupe.tokenizer import Tokenizer
from gemloupe.tool_syntax import STRING

_THINK, _TOOL = "<|think|>", "<|tool>"
_HEADER = "thought\n"
# Ids of a thought's first line; a model that writes more of them has left it out.
_MAX_HEADER = 8


class ThoughtBudget:
    """Counts the ids of thoughts and ends the thought that would have more than `limit`.

    It is ended as a model ends it: a new line, unless it stands at one, and the closing token. The
    first line, the channel's name, does not count. Several thoughts of a row share the budget; one
    that begins when it is used up is left empty.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._used = 0
        self._open = _required(tokenizer, THOUGHT_OPEN)
        self._close = _required(tokenizer, THOUGHT_CLOSE)
        self._newline = tokenizer.encode("\n", bos=False)
        self._header_ids = tokenizer.encode(_HEADER, bos=False)
        self._header: list[int] | None = None
        """Ids of the first line so far, None after it and outside of thoughts."""
        self._in_thought = False
        self._at_line_start = True

    def begin(self, ids: np.ndarray) -> None:
        """Reads what stands before the first new token."""
        self._in_thought = False
        start, used = open_thought(ids, self._tokenizer), self._used
        for id in [] if start is None else ids[start:].tolist():
            self.push(id)
        self._used = used

    def push(self, id: int) -> None:
        if id == self._open:
            self._in_thought, self._header, self._at_line_start = True, [], True
        elif id == self._close:
            self._in_thought = False
        elif self._in_thought:
            ends_line = self._ends_line(id)
            if self._header is None:
                self._used += 1
                self._at_line_start = ends_line
            else:
                self._header.append(id)
                if ends_line or len(self._header) >= _MAX_HEADER:
                    self._header, self._at_line_start = None, ends_line

    def forced(self) -> int | None:
        """The only id that may come next, None where the budget leaves the choice."""
        if not self._in_thought or self._used < self._limit:
            return None
        if self._header is not None:
            count = len(self._header)
            if self._header == self._header_ids[:count] and count < len(self._header_ids):
                return self._header_ids[count]
            return self._newline[0]
        return self._close if self._at_line_start else self._newline[0]

    def _ends_line(self, id: int) -> bool:
        piece = self._tokenizer.tokens([id])[0]
        return piece.endswith("\n") or piece == "<0x0A>"


class RequiredCall:
    """Makes a row's first round begin, after its thoughts, with a call of a tool."""

    def __init__(self, tokenizer: Tokenizer, name: str | None, thinking: bool) -> None:
        """`name`: of the tool, None for any. `thinking`: a thought comes first."""
        begun = CALL_OPEN + "call:" + ("" if name is None else name + "{")
        self._tokenizer = tokenizer
        self._open = _required(tokenizer, THOUGHT_OPEN)
        self._close = _required(tokenizer, THOUGHT_CLOSE)
        self._ids = tokenizer.encode(begun, bos=False)
        self._must_think = thinking
        self._in_thought = False
        self._given: int | None = None
        """Ids of the call so far, None before the first round."""

    def begin(self, ids: np.ndarray) -> None:
        self._given = 0 if self._given is None else len(self._ids)
        self._in_thought = open_thought(ids, self._tokenizer) is not None
        self._must_think = self._must_think and not self._in_thought

    def push(self, id: int) -> None:
        self._must_think = False
        if id == self._open and self._given == 0:
            self._in_thought = True
        elif self._in_thought and id not in (self._close, self._ids[0]):
            pass
        elif id == self._close:
            self._in_thought = False
        elif self._given is not None:
            self._in_thought = False
            self._given = min(self._given + 1, len(self._ids))

    def forced(self) -> int | None:
        """The only id that may come next, None where there is a choice."""
        if self._in_thought or self._given is None or self._given >= len(self._ids):
            return None
        return self._open if self._must_think else self._ids[self._given]


def _required(tokenizer: Tokenizer, piece: str) -> int:
    id = tokenizer.id(piece)
    if id is None:
        raise ValueError(
            f"{tokenizer.folder}: the tokenizer lacks {piece}, so this model can't think; leave "
            "max_thinking_tokens and tool_choice out"
        )
    return id


class AnswerForm:
    """Makes the answer of one row follow a grammar, thoughts and tool calls beside it free."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        matcher: Any,
        end_ids: Sequence[int],
        *,
        thinking: bool,
        tools: bool,
    ) -> None:
        """`end_ids` end a row. `thinking`, `tools`: whether thoughts and calls may come.

        They may too where the ids before the answer turn them on, as in a continued cache.
        """
        self._tokenizer = tokenizer
        self._fresh = matcher
        self._marks = {
            mark: tokenizer.id(mark)
            for mark in (THOUGHT_OPEN, THOUGHT_CLOSE, CALL_OPEN, CALL_CLOSE, RESULT_OPEN, STRING)
        }
        self._ends = tuple(end_ids)
        self._thinking = thinking
        self._tools = tools

    def begin(self, ids: np.ndarray) -> None:
        """A round begins after `ids` [T]."""
        self._matcher = self._fresh.deep_copy()
        self._in_string = False
        self._may_think = self._thinking or self._has(ids, _THINK)
        self._may_call = self._tools or self._has(ids, _TOOL)
        inside = open_thought(ids, self._tokenizer) is not None
        self._state = "thought" if inside else "start"

    def _has(self, ids: np.ndarray, piece: str) -> bool:
        id = self._tokenizer.id(piece)
        return id is not None and bool((ids == id).any())

    def push(self, id: int) -> None:
        """Takes the token that was chosen. ValueError where the grammar does not have it."""
        marks = self._marks
        if self._state == "thought":
            if id == marks[THOUGHT_CLOSE]:
                self._state, self._may_think = "start", False
            elif id == marks[CALL_OPEN] and self._may_call:
                self._state, self._in_string = "call", False
        elif self._state == "call":
            self._in_string ^= id == marks[STRING]
            if id == marks[CALL_CLOSE] and not self._in_string:
                self._state = "called"
        elif id == marks[CALL_OPEN] and self._state in ("start", "called") and self._may_call:
            self._state, self._in_string = "call", False
        elif id == marks[THOUGHT_OPEN] and self._state == "start" and self._may_think:
            self._state = "thought"
        elif self._state != "called":
            self._state = "answer"
            if not self._matcher.consume_token(id):
                raise ValueError(
                    f"response_format: the answer can't go on with the token {id}: "
                    f"{self._matcher.get_error().splitlines()[0]}"
                )

    def allowed(self, words: np.ndarray) -> None:
        """Writes the mask of the next token into `words` (uint32)."""
        marks = self._marks
        if self._state in ("thought", "call"):
            words[:] = 0xFFFFFFFF
            if self._state == "thought":
                # A row that ended here would have no answer of the form that was asked for.
                for id in self._ends:
                    _clear(words, id)
                if not self._may_call:
                    _clear(words, marks[CALL_OPEN])
            return
        if self._state == "called":
            words[:] = 0
            for next_id in (marks[CALL_OPEN], *self._ends):
                _set(words, next_id)
            return
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            raise ValueError(f"response_format: {' '.join(self._matcher.get_error().split())}")
        if self._state == "start":
            if self._may_think:
                _set(words, marks[THOUGHT_OPEN])
            if self._may_call:
                _set(words, marks[CALL_OPEN])


def answer_ends(tokenizer: Tokenizer, end_ids: Sequence[int]) -> tuple[int, ...]:
    """The ids that may end an answer: the one that asks for a tool's result may not."""
    result = tokenizer.id(RESULT_OPEN)
    return tuple(id for id in end_ids if id != result) or tuple(end_ids)


def _set(words: np.ndarray, id: int | None) -> None:
    if id is not None:
        words[id // 32] |= np.uint32(1 << id % 32)


def _clear(words: np.ndarray, id: int | None) -> None:
    if id is not None:
        words[id // 32] &= np.uint32(~(1 << id % 32) & 0xFFFFFFFF)


class RowGuide:
    """Answers a row's mask from what forces ids and from its form, which may be missing."""

    def __init__(
        self,
        mask: Any,
        forcing: Sequence[ThoughtBudget | RequiredCall],
        form: AnswerForm | None,
        suppress: Sequence[int],
        workers: ThreadPoolExecutor,
    ) -> None:
        """`mask`: the `_core.TokenMask` of the row's request."""
        self.mask = mask
        self._forcing = tuple(forcing)
        self._form = form
        self._suppress = tuple(suppress)
        self._workers = workers
        # The session writes nothing here, and the array keeps the mask alive.
        self._words = mask.words

    def begin(self, ids: np.ndarray) -> None:
        """A round begins after `ids` [T]; works out the mask of its first token."""
        for each in self._forcing:
            each.begin(ids)
        if self._form is not None:
            self._form.begin(ids)
        self._answer(None)

    def push(self, id: int) -> None:
        """Takes the token that was chosen and works out the next mask."""
        for each in self._forcing:
            each.push(id)
        self._answer(id)

    def close(self) -> None:
        """The row has ended."""
        self._workers.shutdown(wait=False)

    def _answer(self, id: int | None) -> None:
        ids = (each.forced() for each in self._forcing)
        forced = next((id for id in ids if id is not None), None)
        if self._form is None:
            self._say(forced)
        else:
            self._workers.submit(self._work, id, forced)

    def _say(self, forced: int | None) -> None:
        if forced is None:
            self.mask.allow_all()
        else:
            self._words[:] = 0
            _set(self._words, forced)
            self.mask.allow()

    def _work(self, id: int | None, forced: int | None) -> None:
        try:
            assert self._form is not None
            if id is not None:
                self._form.push(id)
            if forced is not None:
                self._say(forced)
                return
            self._form.allowed(self._words)
            for suppressed in self._suppress:
                _clear(self._words, suppressed)
            if not self._words.any():
                raise ValueError(
                    "response_format: no token of the vocabulary can continue the answer"
                )
            self.mask.allow()
        except BaseException as error:
            # Whatever it is, the session must not wait for ever.
            self.mask.fail(str(error) or type(error).__name__)
