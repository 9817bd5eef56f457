"""A prompt whose sound is still coming: the text model reads soft tokens behind the speaker."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.adapters.selection import NO_ADAPTERS, Selection
from gemloupe.media.audio_tower import AudioStream
from gemloupe.media.content import Content, Medium
from gemloupe.prompt import Prompt, is_batch

if TYPE_CHECKING:
    from gemloupe.cache import KvCache
    from gemloupe.model import Model

# Rows of one pass: fewer would read the model's weights more often than the sound comes.
_READ_AT_ONCE = 25
_OF_STREAM = (
    "adapter",
    "cache",
    "images",
    "audio",
    "videos",
    "max_soft_tokens",
    "bos",
    "thinking",
)


class ListeningStream(AudioStream):
    """An `AudioStream` inside a prompt; made by `model.audio_stream(prompt=…)`.

    What stands before the sound is read at once, soft tokens 25 at a time (a second of sound) as
    they become final; `generate` ends the sound, and its first pass has only the rest to read.
    """

    def __init__(
        self,
        model: Model,
        x: Any,
        sampling_rate: int | None = None,
        adapters: Selection = NO_ADAPTERS,
        **options: Any,
    ) -> None:
        """`x`: text or a chat with one sound, or ids with one audio id. `options` of `prepare`."""
        mix = model.adapters.media(adapters).of_tower("audio")
        super().__init__(model.audio_tower, sampling_rate, mix)
        if is_batch(x) or isinstance(x, Prompt):
            what = "a batch" if is_batch(x) else "a prepared prompt"
            raise ValueError(f"prompt is {what}; expected one text, chat or list of ids")
        self._model = model
        self._under = dict(adapters.adapters)
        stand_in = np.zeros((1, model.config.text.hidden_size), np.float32)
        whole = model.prepare(x, audio=stand_in, **options)
        [sound] = [medium for medium in whole.media if medium.kind == "audio"]
        at = int(sound.positions[0])
        self._before = _part(whole, 0, at)
        self._after = _part(whole, at + 1, len(whole))
        self._audio_id = int(whole.ids[at])
        self._unread: list[np.ndarray] = []
        self._read = 0
        self.cache: KvCache = model.new_cache()
        """What the text model has read so far."""
        if len(self._before):
            self._run(self._before)

    @property
    def unread(self) -> int:
        """Soft tokens that are final and not read yet."""
        return sum(map(len, self._unread))

    def push(self, samples: Any) -> np.ndarray:
        """As `AudioStream.push`; what is final is read when 25 soft tokens wait."""
        tokens = super().push(samples)
        if len(tokens):
            self._unread.append(tokens)
        if self.unread >= _READ_AT_ONCE:
            self._run(self._sound(np.concatenate(self._unread)))
            self._read += self.unread
            self._unread = []
        return tokens

    def finish(self) -> np.ndarray:
        """As `AudioStream.finish`; the last soft tokens are read by `generate`."""
        tokens = super().finish()
        if len(tokens):
            self._unread.append(tokens)
        return tokens

    def generate(self, **arguments: Any) -> Any:
        """Ends the sound and answers: what `model.generate` gives for the whole prompt.

        `arguments`: those of `model.generate` but for what stands in the prompt and its cache.
        `out.prompt` is what was left to read. ValueError before the first soft token, and where
        this was called before.
        """
        for name in _OF_STREAM:
            if name in arguments:
                raise ValueError(f"{name}= belongs to the prompt, which this stream has already")
        self.finish()
        if not self.num_tokens:
            raise ValueError("no sound came; push at least one frame of 20 ms")
        rest = self._after
        if self._unread:
            rest = _joined(self._sound(np.concatenate(self._unread)), rest)
        if not len(rest):
            raise ValueError("this stream was answered, and nothing is left to read")
        out = self._model.generate(rest, cache=self.cache, adapter=self._under, **arguments)
        self._unread, self._after = [], _part(self._after, 0, 0)
        return out

    def _sound(self, tokens: np.ndarray) -> Prompt:
        held = tokens.copy()
        content = Content("audio", (len(held),), lambda _adapters: held, fixed=True)
        ids = np.full(len(held), self._audio_id, np.int32)
        medium = Medium(content, 0, (np.arange(len(held)),))
        return dataclasses.replace(self._before, ids=ids, media=(medium,))

    def _run(self, prompt: Prompt) -> None:
        under = self._under
        self._model.run(prompt, cache=self.cache, logits=None, routing=False, adapter=under)


def _part(prompt: Prompt, begin: int, end: int) -> Prompt:
    """The ids from `begin` to `end`, with the media that stand there."""
    media = [
        Medium(m.content, m.index, tuple(block - begin for block in m.blocks))
        for m in prompt.media
        if begin <= m.positions[0] < end
    ]
    return dataclasses.replace(prompt, ids=prompt.ids[begin:end], media=tuple(media))


def _joined(first: Prompt, second: Prompt) -> Prompt:
    media = [
        Medium(m.content, m.index, tuple(block + len(first) for block in m.blocks))
        for m in second.media
    ]
    ids = np.concatenate([first.ids, second.ids])
    return dataclasses.replace(second, ids=ids, media=(*first.media, *media))
