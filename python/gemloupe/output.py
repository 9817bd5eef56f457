"""What a generate call gives back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemloupe.answer import AnswerReader
from gemloupe.drafter import DraftCounts
from gemloupe.errors import quoted
from gemloupe.prompt import Prompt
from gemloupe.tools import ToolResult

TokenLogprobs = tuple[float, list[tuple[int, float]]]
"""(log-probability of the token, [(id, log-probability)] of the most likely ones)."""


@dataclass
class Timings:
    """Where the time of one row went. Rows of a batch share passes: their seconds overlap."""

    prefill_tokens: int = 0
    """Prompt tokens read, those found in a cache not counted."""
    cached_tokens: int = 0
    """Prompt tokens that a prefix cache held."""
    prefill_seconds: float = 0.0
    """Seconds in passes that read this prompt; the first token comes with the last of them."""
    decode_tokens: int = 0
    """Tokens after the first."""
    decode_seconds: float = 0.0
    time_to_first_token: float = 0.0
    """Seconds from the call, waiting for other rows included."""

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second; 0.0 where nothing was decoded."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(eq=False)
class Output:
    """One generated row. `print(out)` shows its text."""

    prompt: Prompt
    ids: np.ndarray
    """New ids [n], int32, read-only; an end-of-sequence id that ended the row is the last one."""
    finish_reason: str
    """"stop" (an end or stop id, or a stop string), "length", "cancelled", or "tool_calls": the
    model waits for results that the caller has to give."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry a new token, after the soft-cap and before the sampling filters; or None."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry a prompt token; None for the first, which nothing predicts."""
    captured: Mapping[str, Any] = field(default_factory=dict)
    routing: Any = None
    cache: Any = None
    """The KV cache: prompt and new ids but the last, which the model has not read."""
    timings: Timings = field(default_factory=Timings)
    drafts: DraftCounts | None = None
    """What became of a drafter's guesses in the last round; None without one."""
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    rounds: tuple[Output, ...] = ()
    """The rounds before this one, whose calls were answered; each has its own prompt and ids."""
    tool_results: tuple[ToolResult, ...] = ()
    """What this round's calls gave; () where the last round's are left to the caller."""
    cached_ids: np.ndarray | None = field(default=None, repr=False)
    """Ids that a cache held before the prompt [S]."""

    def __getstate__(self) -> dict[str, Any]:
        # Results travel between processes; the engine's cache and tools' functions do not.
        tools = tuple(replace(tool, function=None) for tool in self.prompt.tools)
        prompt = replace(self.prompt, tools=tools) if tools else self.prompt
        state = {**self.__dict__, "cache": None, "prompt": prompt}
        state.pop("_answer", None)
        return state

    @functools.cached_property
    def _answer(self) -> AnswerReader:
        ids = self.prompt.ids
        if self.cached_ids is not None:
            ids = np.concatenate([self.cached_ids, ids])
        schemas = [tool.schema for tool in self.prompt.tools]
        reader = AnswerReader(self.prompt.tokenizer, ids, self.stop_strings, schemas)
        for token in self.ids.tolist():
            if reader.push(token).stopped:
                return reader
        reader.finish()
        return reader

    @property
    def text(self) -> str:
        """The answer, without special tokens, thoughts, or the stop string that ended it."""
        return self._answer.text

    @property
    def reasoning(self) -> str:
        """What stands in the thinking channel; "" without thoughts."""
        return self._answer.reasoning

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls of this round, in OpenAI's form, with `arguments` as a dict in JSON types.

        {"id": ..., "type": "function", "function": {"name": ..., "arguments": {...}}}. Values that
        were written without quotes are as the tool's schema says.
        """
        return self._answer.parser.tool_calls

    @property
    def tool_errors(self) -> list[dict[str, str]]:
        """Calls that can't be read: {"text": as it was written, "error": why}.

        `text` holds them too.
        """
        return self._answer.parser.tool_errors

    @property
    def message(self) -> dict[str, Any]:
        """This round as a message for a history; its thoughts are left out where templates do."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All that came: each round's message and the results of its calls, for a history."""
        messages = []
        for output in (*self.rounds, self) if len(self.ids) else self.rounds:
            messages += [output.message, *(result.message for result in output.tool_results)]
        return messages

    @property
    def tokens(self) -> list[str]:
        """The vocabulary's piece of every new id (a space is U+2581)."""
        return self.prompt.tokenizer.tokens(self.ids)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        times = self.timings
        lines = [
            ("tokens", f"{len(self.prompt)} prompt + {len(self.ids)} new"),
            ("finish_reason", self.finish_reason),
            ("time", f"{times.time_to_first_token:.3f} s to the first token, then "
             f"{times.tokens_per_second:.1f} tokens/s"),
        ]  # fmt: skip
        try:
            lines.insert(0, ("text", quoted(self.text)))
            if self.reasoning:
                lines.insert(1, ("reasoning", quoted(self.reasoning)))
            for call in self.tool_calls:
                lines.insert(-2, ("tool call", quoted(call["function"])))
            for problem in self.tool_errors:
                lines.insert(-2, ("tool error", quoted(problem["error"])))
        except FileNotFoundError:  # A checkpoint without a tokenizer works on ids.
            lines.insert(0, ("ids", quoted(self.ids.tolist())))
        return "Output\n" + "\n".join(f"  {name:<14} {value}" for name, value in lines)
