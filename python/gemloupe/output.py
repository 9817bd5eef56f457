"""What a generate call gives back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemloupe.answer import AnswerReader
from gemloupe.errors import quoted
from gemloupe.prompt import Prompt

TokenLogprobs = tuple[float, list[tuple[int, float]]]
"""(log-probability of the token, [(id, log-probability)] of the most likely ones)."""


@dataclass
class Timings:
    """Where the time of one row went. Rows of a batch share passes: their seconds overlap."""

    prefill_tokens: int = 0
    """Prompt tokens read, those found in a cache not counted."""
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
    """"stop" (an end or stop id, or a stop string), "length" or "cancelled"."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry a new token, after the soft-cap and before the sampling filters; or None."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry a prompt token; None for the first, which nothing predicts."""
    captured: Mapping[str, Any] = field(default_factory=dict)
    routing: Any = None
    cache: Any = None
    """The KV cache: prompt and new ids but the last, which the model has not read."""
    timings: Timings = field(default_factory=Timings)
    seed: int = 0
    stop_strings: tuple[str, ...] = ()

    @functools.cached_property
    def _answer(self) -> AnswerReader:
        reader = AnswerReader(self.prompt.tokenizer, self.prompt.ids, self.stop_strings)
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
        """Always []: this version leaves calls as they are, in `ids`."""
        return []

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
        except FileNotFoundError:  # A checkpoint without a tokenizer works on ids.
            lines.insert(0, ("ids", quoted(self.ids.tolist())))
        return "Output\n" + "\n".join(f"  {name:<14} {value}" for name, value in lines)
