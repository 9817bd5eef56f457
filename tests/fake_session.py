"""A scripted stand-in for the C++ session, and a model around it, for tests of what Python does."""

from __future__ import annotations

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gemloupe.adapters.registry import Adapters
from gemloupe.config import parse_config
from gemloupe.media import Reader
from gemloupe.tokenizer import Tokenizer
from tiny_models import save_tiny_tokenizer

VOCAB_SIZE = 480
EOS = 1


class FakeCache:
    """Counts tokens only; like the real one it lacks the last token, which was never read."""

    def __init__(self, tokens: list[int] | None = None) -> None:
        self.tokens = list(tokens or [])

    @property
    def length(self) -> int:
        return len(self.tokens)

    def fork(self) -> FakeCache:
        return FakeCache(self.tokens)

    def truncate(self, length: int) -> None:
        del self.tokens[length:]

    provenance = ()

    def note_adapter(self, adapter: str) -> None:
        assert adapter == "none"

    def forget(self, notes: Any) -> None:
        pass


class FakeSession:
    """Row n answers with `scripts[n]`; an exception in a script is raised at its turn."""

    def __init__(self, scripts: list[list[Any]], chunk: int = 4) -> None:
        self.scripts = scripts
        self.chunk = chunk
        self.requests: list[Any] = []
        self.prefilled: list[int] = []
        self.generated: list[int] = []
        self.last: list[int] = []
        self.befores: list[list[int]] = []
        self.ended: list[str] = []

    def submit(self, request: Any) -> int:
        request.cache = request.cache or FakeCache()
        self.befores.append(list(request.cache.tokens))
        self.requests.append(request)
        self.prefilled.append(0)
        self.generated.append(0)
        self.last.append(-1)
        self.ended.append("")
        return len(self.requests) - 1

    @property
    def active(self) -> int:
        return self.ended.count("")

    def step(self) -> list[Any]:
        """Runs one step. What a script says comes, or the lowest id that the row's mask allows."""
        running = [row for row, ended in enumerate(self.ended) if not ended]
        for row in running:
            ids = self.requests[row].ids
            begin = self.prefilled[row]
            if begin < len(ids):
                end = self.prefilled[row] = min(len(ids), begin + self.chunk)
                self.requests[row].cache.tokens += ids[begin:end]
                return [self._choose(row) if end == len(ids) else self._result(row, -1, "")]
        for row in running:
            self.requests[row].cache.tokens.append(self.last[row])
        return [self._choose(row) for row in running]

    def _choose(self, row: int) -> Any:
        request = self.requests[row]
        token = self.scripts[row][self.generated[row]]
        if isinstance(token, BaseException):
            raise token
        if getattr(request, "mask", None) is not None:
            token = request.mask.nearest(token)
        self.generated[row] += 1
        self.last[row] = token
        reason = "length" if self.generated[row] >= request.max_new_tokens else ""
        reason = "stop" if token in request.stop_ids else reason
        self.ended[row] = reason
        return self._result(row, token, reason)

    def _result(self, row: int, token: int, reason: str) -> Any:
        request = self.requests[row]

        def entry(count: int) -> Any:
            return SimpleNamespace(logprob=-0.5, top=[(token, -0.5)] * count)

        prompt = request.prompt_logprobs >= 0 and token >= 0 and self.generated[row] == 1
        return SimpleNamespace(
            row=row,
            token=token,
            prefilled=self.prefilled[row],
            finish_reason=reason,
            error="",
            logprobs=entry(request.logprobs) if request.logprobs >= 0 else None,
            prompt_logprobs=[entry(request.prompt_logprobs)] * (len(request.ids) - 1)
            if prompt
            else [],
        )

    def cancel(self, row: int) -> None:
        self.ended[row] = "cancelled"

    def rollback(self, row: int) -> None:
        self.ended[row] = "rolled back"
        self.requests[row].cache.tokens[:] = self.befores[row]

    def cache(self, row: int) -> FakeCache:
        return self.requests[row].cache


class FakeMask:
    """`_core.TokenMask` in Python: one answer serves one token."""

    def __init__(self, vocab_size: int) -> None:
        self.words = np.zeros((vocab_size + 31) // 32, np.uint32)
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def allow(self) -> None:
        self.answers.put(self.words.copy())

    def allow_all(self) -> None:
        self.answers.put(None)

    def fail(self, reason: str) -> None:
        self.answers.put(ValueError(reason))

    def nearest(self, token: int) -> int:
        answer = self.answers.get(timeout=10)
        if isinstance(answer, ValueError):
            raise answer
        if answer is None:
            return token
        allowed = [i for i in range(32 * len(answer)) if answer[i // 32] >> (i % 32) & 1]
        return token if token in allowed else allowed[0]


class FakeModel:
    """A model whose next session answers with `scripts`: strings (encoded) or lists of ids."""

    def __init__(self, folder: Path, *scripts: Any, **generation_config: Any) -> None:
        self.config = parse_config(
            {
                "model_type": "gemma4",
                "bos_token_id": 2,
                "eos_token_id": EOS,
                "text_config": {"vocab_size": VOCAB_SIZE, "hidden_size_per_layer_input": 0},
            }
        )
        self.tokenizer = Tokenizer(folder, self.config)
        self.generation_config = generation_config
        self.adapters = Adapters(self)
        self.media_reader = Reader(self.config.text.hidden_size)
        self.scripts = [self._ids(script) for script in scripts]
        self.session: FakeSession | None = None

    def _ids(self, script: Any) -> list[Any]:
        return self.tokenizer.encode(script, bos=False) if isinstance(script, str) else script

    @property
    def requests(self) -> list[Any]:
        assert self.session is not None
        return self.session.requests

    def new_session(self) -> FakeSession:
        self.session = FakeSession(self.scripts)
        return self.session

    def new_request(self) -> Any:
        return SimpleNamespace(cache=None, sampling=SimpleNamespace())

    def new_mask(self, vocab_size: int) -> FakeMask:
        return FakeMask(vocab_size)

    def core_cache(self, cache: Any) -> Any:
        return cache

    def wrap_cache(self, core_cache: Any) -> Any:
        return core_cache


def tokenizer_folder(folder: Path) -> Path:
    """Writes the tokenizer that `FakeModel` uses."""
    return save_tiny_tokenizer(folder, VOCAB_SIZE)
