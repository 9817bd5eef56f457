"""Speech of any length to text, piece by piece, cut at silences."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.errors import quoted
from gemloupe.media.audio import SAMPLING_RATE, AudioSource, Clip
from gemloupe.media.audio_tower import MAX_SECONDS

if TYPE_CHECKING:
    from gemloupe.model import Model

# A piece is cut at the quietest place after this many seconds, 30 at the latest.
_SHORTEST_PIECE = 10.0
# The quiet of a place is the energy around it.
_HOP = SAMPLING_RATE // 100
_QUIET_HOPS = 30
# What is never louder than this (-60 dB) holds no speech; a model would invent some.
_SILENCE = 1e-3

# The words of Gemma 4's model card.
_INSTRUCTIONS = (
    "Follow these specific instructions for formatting the answer:\n"
    "* Only output the transcription, with no newlines.\n"
    "* When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, and "
    "write 3 instead of three."
)


@dataclass(frozen=True)
class Segment:
    """What was said between two times."""

    begin: float
    """Seconds from the start of the sound."""
    end: float
    text: str
    """Empty where nothing is said."""
    translation: str | None = None
    """In the language of `translate_to`; None without it, or where the model gave none."""


@dataclass(frozen=True)
class Transcript:
    """The words of a sound; `print` shows them."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """All that was said."""
        return " ".join(segment.text for segment in self.segments if segment.text)

    @property
    def translation(self) -> str | None:
        """All of it in the language of `translate_to`; None without it."""
        parts = [s.translation for s in self.segments if s.translation is not None]
        return " ".join(part for part in parts if part) if parts else None

    def __str__(self) -> str:
        return self.text


def transcribe(
    model: Model,
    audio: Any,
    language: str | None = None,
    translate_to: str | None = None,
    *,
    sampling_rate: int | None = None,
    max_new_tokens: int = 512,
    **generation: Any,
) -> Transcript:
    """Writes down what is said in a sound of any length, and translates it if asked to.

    `audio`: a path, bytes, data URL, or samples [N] or [N, channels] at `sampling_rate` (16 kHz
    without it). It is read piece by piece, each cut at the quietest place between 10 and 30 s.
    `language` and `translate_to` are names such as "English"; without `language` the model finds it
    out. `generation`: arguments of `model.generate`; greedy unless they say otherwise.
    ValueError for what is no sound, and for models without ears.
    """
    return Transcript(
        tuple(
            segments(
                model,
                audio,
                language,
                translate_to,
                sampling_rate=sampling_rate,
                max_new_tokens=max_new_tokens,
                **generation,
            )
        )
    )


def segments(
    model: Model,
    audio: Any,
    language: str | None = None,
    translate_to: str | None = None,
    *,
    sampling_rate: int | None = None,
    **generation: Any,
) -> Iterator[Segment]:
    """The same, giving each segment as soon as it is written."""
    prompt = _prompt(_named(language, "language"), _named(translate_to, "translate_to"))
    arguments = {"temperature": 0, **generation}
    ears = model.audio_tower.ears  # Of a model without ears: ValueError before anything is read.
    begin = 0
    for samples in pieces(AudioSource(audio, sampling_rate).blocks()):
        clip = Clip(samples, len(samples) / SAMPLING_RATE, "audio")
        start, begin = begin / SAMPLING_RATE, begin + len(samples)
        times = (start, begin / SAMPLING_RATE)
        if np.abs(samples).max() < _SILENCE or not ears.num_tokens(clip):
            yield Segment(*times, "")
            continue
        out: Any = model.chat(prompt, audio=[clip], **arguments)
        if out.finish_reason == "length":
            warnings.warn(
                f"the text from {start:.1f} s on reached max_new_tokens and is cut; raise it",
                stacklevel=2,
            )
        yield Segment(*times, *_parts(out.text, translate_to))


def _named(value: str | None, name: str) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"{name} is {quoted(value)}; expected a language's name, such as 'German'")
    return value


def _prompt(language: str | None, translate_to: str | None) -> str:
    source = "its original language" if language is None else language
    if translate_to is None:
        into = "the same language" if language is None else language
        return f"Transcribe the following speech segment in {source} into {into} text. " + (
            _INSTRUCTIONS
        )
    return (
        f"Transcribe the following speech segment in {source}, then translate it into "
        f"{translate_to}. When formatting the answer, first output the transcription in {source}, "
        f"then one newline, then output the string '{translate_to}: ', then the translation in "
        f"{translate_to}."
    )


def _parts(answer: str, translate_to: str | None) -> tuple[str, str | None]:
    """The transcription of an answer, and its translation."""
    if translate_to is None:
        return " ".join(answer.split()), None
    text, mark, translation = answer.partition(f"{translate_to}:")
    if not mark:
        text, _, translation = answer.partition("\n")
    return " ".join(text.split()), " ".join(translation.split()) or None


def pieces(blocks: Iterable[np.ndarray], longest: float = MAX_SECONDS) -> Iterator[np.ndarray]:
    """Joins blocks of samples at 16 kHz to pieces of at most `longest` seconds, cut where it is
    quiet; together they are the sound. ValueError where there is none."""
    most = round(longest * SAMPLING_RATE)
    held = np.zeros(0, np.float32)
    found = False
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > most:
            cut = quiet_place(held[:most], round(_SHORTEST_PIECE * SAMPLING_RATE))
            found = True
            yield held[:cut]
            held = held[cut:]
    if len(held):
        yield held
    elif not found:
        raise ValueError("the sound is empty; expected at least one sample")


def quiet_place(samples: np.ndarray, first: int) -> int:
    """The middle of the quietest 0.3 s from sample `first` on; of a longer pause, its middle."""
    hops = len(samples) // _HOP
    energy = (samples[: hops * _HOP].astype(np.float64).reshape(hops, _HOP) ** 2).sum(axis=1)
    sums = np.concatenate([[0.0], np.cumsum(energy)])
    around = sums[_QUIET_HOPS:] - sums[:-_QUIET_HOPS]
    begin = min(first // _HOP, len(around) - 1)
    # Rounded, so that one cumulated sum of silence is not quieter than another.
    candidates = np.round(around[begin:], 9)
    quietest = np.flatnonzero(candidates == candidates.min())
    pause = np.split(quietest, np.flatnonzero(np.diff(quietest) > 1) + 1)[-1]
    return (begin + int(pause[len(pause) // 2]) + _QUIET_HOPS // 2) * _HOP
