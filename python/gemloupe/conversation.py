"""A chat of several turns on one KV cache, as `gemloupe chat` holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemloupe.model import Model
    from gemloupe.stream import Stream


class Conversation:
    """A chat whose KV cache is kept: only what differs from what it holds is read again."""

    def __init__(self, model: Model, system: str | None, thinking: bool, **options: Any) -> None:
        self.model = model
        self.system = system
        self.thinking = thinking
        self.options = options
        self.reset()

    def reset(self) -> None:
        """Forgets every message but the system's."""
        self.messages: list[dict[str, Any]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self.cache = self.model.new_cache()

    def ask(self, text: str) -> Stream:
        """Returns the stream of the reply to `text`; call `keep` when it has ended."""
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self.model.prepare(self.messages, thinking=self.thinking)
            fresh = prompt.ids[self._reuse(prompt.ids.tolist()) :]
            stream = self.model.generate(fresh, cache=self.cache, stream=True, **self.options)
        except BaseException:
            self.messages.pop()
            raise
        return stream  # type: ignore[return-value]

    def _reuse(self, ids: list[int]) -> int:
        """Cuts the cache to what it has in common with `ids` and returns how much that is."""
        held = [int(token) for token in self.cache.tokens]
        common = 0
        # The last token must be read, since its logits give the first new one.
        while common < min(len(held), len(ids) - 1) and held[common] == ids[common]:
            common += 1
        if common == len(held):
            return common
        try:
            self.cache.truncate(common)
        except ValueError:  # A ring no longer holds the window before `common`.
            common = 0
        if common == 0:
            self.cache = self.model.new_cache()
        return common

    def keep(self, stream: Stream) -> None:
        """Ends the reply and adds it to the messages; an empty one is as if never asked for."""
        stream.close()
        out: Any = stream.result
        if out.text:
            self.messages.append({"role": "assistant", "content": out.text})
        else:
            self.messages.pop()
