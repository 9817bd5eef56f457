"""Captures and edits of `model.run` inside the audio tower: points that begin with "audio."."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemloupe.media.audio_tower import AudioTower, Sound
from gemloupe.media.content import Medium
from gemloupe.prompt import Prompt

PREFIX = "audio."


@dataclass(frozen=True)
class AudioRequest:
    """The captures and edits of one call inside the audio tower."""

    capture: Mapping[str, Any]
    edit: Sequence[tuple[str, Any]]
    check_finite: bool = False

    def __bool__(self) -> bool:
        return bool(self.capture or self.edit)


@dataclass
class Heard:
    """What the tower gave while it was watched."""

    soft_tokens: dict[Medium, np.ndarray] = field(default_factory=dict)
    """Of each sound, after edits."""
    arrays: dict[str, Any] = field(default_factory=dict)
    """One array a point; with several sounds a list with one array a sound."""
    positions: dict[str, np.ndarray] = field(default_factory=dict)


def encode(tower: AudioTower, prompt: Prompt, request: AudioRequest, row: int) -> Heard:
    """Encodes a prompt's sounds anew and returns what `request` asks for.

    Positions number the soft tokens (at "audio.mel" the frames) of each sound from 0. ValueError
    where the prompt has no sound, or soft tokens whose sound is not known.
    """
    sounds = [medium for medium in prompt.media if medium.kind == "audio"]
    if not sounds:
        raise ValueError("capture= or edit= has points of the audio tower, but there is no sound")
    heard = Heard()
    found: dict[str, list[Any]] = {}
    for medium in sounds:
        medium.content.check_encodes(f"audio {medium.index}")
        source = medium.content.source
        if not isinstance(source, Sound):
            raise ValueError(
                f"audio {medium.index} was given as soft tokens of an unknown sound, which can't "
                "be encoded anew; pass the sound to look into the audio tower"
            )
        encoding = tower.encode(
            source.clip,
            adapters=medium.content.adapters,
            capture=request.capture,
            edit=[{name: value} for name, value in request.edit],
            check_finite=request.check_finite,
            row=row,
        )
        heard.soft_tokens[medium] = encoding.soft_tokens
        for name, value in encoding.captured.items():
            found.setdefault(name, []).append(value)
            at = encoding.captured.positions_of(name)
            before = heard.positions.get(name, np.zeros(0, np.int64))
            heard.positions[name] = np.concatenate([before, at])
    one = len(sounds) == 1
    heard.arrays = {name: values[0] if one else values for name, values in found.items()}
    return heard
