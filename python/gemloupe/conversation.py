"""A chat of several turns on one KV cache, as `gemloupe chat` holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gemloupe.cache import KvCache
    from gemloupe.documents import Pack
    from gemloupe.model import Model
    from gemloupe.stream import Stream


class Conversation:
    """A chat whose KV cache is kept: only what differs from what it holds is read again."""

    def __init__(
        self,
        model: Model,
        system: str | None,
        thinking: bool,
        documents: Callable[[str | None], Pack] | None = None,
        **options: Any,
    ) -> None:
        """`documents` packs what stands before the first message, under given instructions."""
        self.model = model
        self.system = system
        self.thinking = thinking
        self.options = options
        self._documents = documents
        self.reset()

    def reset(self) -> None:
        """Forgets every message but the system's; documents stay."""
        self.messages: list[dict[str, Any]] = []
        self.pack = self._documents(self.system) if self._documents else None
        if self.system and not self.pack:
            self.messages.append({"role": "system", "content": self.system})
        self.cache = self._new_cache()
        # The cache before the last reply: thoughts leave the history, and after a long one the
        # ring of a sliding layer no longer holds what stood before it.
        self._before_reply = self.cache.fork()

    def ask(self, text: str) -> Stream:
        """Returns the stream of the reply to `text`; call `keep` when it has ended."""
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._prompt_ids()
            *fresh, last = ids[self._rewind(ids) :].tolist()
            if fresh:
                self.model.run(fresh, cache=self.cache, logits=None)
            self._before_reply = self.cache.fork()
            stream = self.model.generate([last], cache=self.cache, stream=True, **self.options)
        except BaseException:
            self.messages.pop()
            raise
        return stream  # type: ignore[return-value]

    def _new_cache(self) -> KvCache:
        return self.pack.cache().fork() if self.pack else self.model.new_cache()

    def _prompt_ids(self) -> np.ndarray:
        if self.pack:
            return self.pack.ask(self.messages).ids
        ids: np.ndarray = self.model.prepare(self.messages, thinking=self.thinking).ids
        return ids

    def _rewind(self, ids: np.ndarray) -> int:
        """Makes `cache` hold the longest beginning of `ids` that it can; returns its length."""
        for cache in (self.cache, self._before_reply):
            # The last token must be read, since its logits give the first new one.
            common = _common_length(cache.tokens, ids[:-1])
            try:
                cache.truncate(common)
            except ValueError:  # A ring no longer holds the window before `common`.
                continue
            self.cache = cache
            return common
        self.cache = self._new_cache()
        return len(self.pack) if self.pack else 0

    def keep(self, stream: Stream) -> None:
        """Ends the reply and adds it to the messages; an empty one is as if never asked for."""
        stream.close()
        out: Any = stream.result
        if out.text:
            self.messages.append({"role": "assistant", "content": out.text})
        else:
            self.messages.pop()


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    count = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a)[:count] != np.asarray(b)[:count])
    return int(differs[0]) if len(differs) else count
