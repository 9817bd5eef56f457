"""Captures and edits of one call inside both towers, beside those of the text model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemloupe import capturing, edits
from gemloupe.adapters.selection import Selection
from gemloupe.media import audio_hooks, vision_hooks
from gemloupe.media.content import Medium
from gemloupe.prompt import Prompt

if TYPE_CHECKING:
    from gemloupe.config import ModelConfig, TextConfig
    from gemloupe.media.audio_tower import AudioTower
    from gemloupe.media.vision import Vision

PREFIXES = (vision_hooks.PREFIX, audio_hooks.PREFIX)


class TowerModel(Protocol):
    """What this module needs of a model."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def vision(self) -> Vision | None: ...
    @property
    def audio_tower(self) -> AudioTower: ...


@dataclass(frozen=True)
class TowerCapture:
    """The points of towers that a call captures: name or pattern -> positions."""

    vision: Mapping[str, Any]
    audio: Mapping[str, Any]


@dataclass(frozen=True)
class TowerRequest:
    """The captures and edits of one row inside its model's towers."""

    vision: vision_hooks.VisionRequest
    audio: audio_hooks.AudioRequest

    def __bool__(self) -> bool:
        return bool(self.vision or self.audio)

    @property
    def edited(self) -> list[str]:
        """What a cache remembers of the edits."""
        seen = [f"{point.name}: {edit.kind}" for point, edit in self.vision.edits]
        heard = [
            f"{name}: {one.kind}"
            for name, value in self.audio.edit
            for one in edits.as_edits(value, name)
        ]
        return seen + heard


@dataclass
class Inside:
    """What the towers gave while they were watched."""

    soft_tokens: dict[Medium, np.ndarray] = field(default_factory=dict)
    """Of each medium that was encoded anew, after edits."""
    arrays: dict[str, Any] = field(default_factory=dict)
    positions: dict[str, np.ndarray] = field(default_factory=dict)

    def captured(self, of_text: capturing.Captured | None, config: TextConfig) -> Any:
        """What was captured here before what was captured in the text model, if anything was."""
        if not self.arrays:
            return {} if of_text is None else of_text
        nothing = capturing.Captured({}, {}, config)
        return (nothing if of_text is None else of_text).with_more(self.arrays, self.positions)


def split_capture(capture: Any) -> tuple[Any, TowerCapture]:
    """Returns `capture` without the points of towers, and these alone."""
    capture, vision = vision_hooks.split_capture(capture)
    capture, audio = vision_hooks.split_capture(capture, audio_hooks.PREFIX)
    return capture, TowerCapture(vision, audio)


def has_edits(edit: Any) -> bool:
    """Whether `edit` has points of towers."""
    return any(vision_hooks.split_edit(edit, prefix)[1] for prefix in PREFIXES)


def parse(
    model: TowerModel,
    capture: TowerCapture,
    edit: Any,
    check_finite: bool,
    adapters: Selection,
) -> tuple[Any, TowerRequest]:
    """Returns one row's `edit` without the points of towers, and what is asked of these.

    `adapters`: those that the row runs under.
    KeyError with close matches for a pattern that matches nothing in the vision tower (in the audio
    tower, when a sound is encoded).
    """
    of_text, of_vision = vision_hooks.split_edit(edit)
    of_text, of_audio = vision_hooks.split_edit(of_text, audio_hooks.PREFIX)
    vision = vision_hooks.parse(model, capture.vision, of_vision, check_finite, adapters)
    return of_text, TowerRequest(
        vision, audio_hooks.AudioRequest(capture.audio, of_audio, check_finite)
    )


def encode(model: TowerModel, prompt: Prompt, request: TowerRequest, row: int) -> Inside:
    """Encodes a prompt's media anew, those whose tower is asked for something.

    `row`: the prompt's number in its batch. ValueError where there is no such medium.
    """
    inside = Inside()
    if request.vision:
        assert model.vision is not None
        seen = vision_hooks.encode(model.vision, prompt, request.vision, model.config.text, row)
        inside = Inside(seen.soft_tokens, seen.arrays, seen.positions)
    if request.audio:
        heard = audio_hooks.encode(model.audio_tower, prompt, request.audio, row)
        inside.soft_tokens |= heard.soft_tokens
        inside.arrays |= heard.arrays
        inside.positions |= heard.positions
    return inside
