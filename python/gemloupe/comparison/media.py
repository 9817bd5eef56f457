"""The media of a compared prompt: what stands in its rows, and what each tower makes of a source.

Both sides read the same pixels and mel frames, those of gemloupe's preprocessing (equal to what
transformers' processor makes); each encodes them with its own towers, one picture or sound at a
time. Soft tokens whose picture or sound is not known are given to both sides as they are.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemloupe import hooks
from gemloupe.adapters.selection import NO_ADAPTERS, Selection
from gemloupe.errors import quoted
from gemloupe.media import Content, Medium, blocks, tower_hooks
from gemloupe.media.audio_tower import Sound, read_ears
from gemloupe.media.images import Image
from gemloupe.media.videos import Video
from gemloupe.media.vision_hooks import vision_points

if TYPE_CHECKING:
    from gemloupe.config import ModelConfig
    from gemloupe.model import Model
    from gemloupe.prompt import Prompt

Source = Image | Sound
# Captured values of a tower that are in memory at a time, of each side.
_GROUP_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class MediaRows:
    """What stands in a prompt beside words, as one side computed it."""

    rows: np.ndarray
    """int64 [n]: positions."""
    soft_tokens: np.ndarray
    """float32 [n, D]."""
    padding_id: int
    """Whose per-layer embedding these rows get."""
    blocks: tuple[tuple[int, int], ...]
    """Ranges whose rows see later ones of their own, too, in sliding layers."""


def media_rows(
    prompt: Prompt, soft_tokens: Sequence[np.ndarray], config: ModelConfig
) -> MediaRows | None:
    """The rows of `prompt`; `soft_tokens` [n, D] one a medium. None without media."""
    if not prompt.media:
        return None
    return MediaRows(
        np.concatenate([medium.positions for medium in prompt.media]),
        np.concatenate(soft_tokens),
        config.pad_token_id or 0,
        tuple(blocks(prompt.media, config.text.bidirectional)),
    )


def parts(medium: Medium) -> list[Source] | None:
    """The pictures or the sound of a medium; None where it is not known."""
    source = medium.content.source
    if isinstance(source, Video):
        return list(source.frames)
    return [source] if isinstance(source, (Image, Sound)) else None


def sources(prompt: Prompt) -> list[Source]:
    """Every picture, frame and sound of a prompt that is known."""
    return [part for medium in prompt.media for part in parts(medium) or ()]


def tower_of(source: Source) -> str:
    """ "vision" or "audio"."""
    return "vision" if isinstance(source, Image) else "audio"


def tower_points(model: Model) -> dict[str, hooks.HookPoint]:
    """Every hook point of a model's towers."""
    seen = {} if model.vision is None else vision_points(model.vision.config)
    ears = read_ears(model.checkpoint)
    return {**seen, **({} if ears is None else hooks.hook_points(ears.config))}


def selected(model: Model, patterns: Sequence[str]) -> list[hooks.HookPoint]:
    """The points of towers that match; KeyError for a pattern of a tower that matches nothing."""
    points = tower_points(model)
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(points, pattern)
        if not found and pattern.startswith(tower_hooks.PREFIXES):
            raise KeyError(f"{quoted(pattern)} matches no hook point of the model's towers")
        chosen.update(found)
    return [point for name, point in points.items() if name in chosen]


def groups(
    points: Sequence[hooks.HookPoint], source: Source, model: Model
) -> Iterator[list[hooks.HookPoint]]:
    """The points of the tower that reads `source`, split into what fits into memory together."""
    tower = tower_of(source)
    if isinstance(source, Image):
        assert model.vision is not None
        vision = model.vision.config
        cell = vision.pooling_kernel_size**2 if vision.has_encoder else 1
        rows, heads = source.soft_tokens * cell, vision.num_attention_heads
    else:
        rows, heads = len(source.features), source.ears.config.num_attention_heads
    group: list[hooks.HookPoint] = []
    size = 0
    for point in points:
        if not point.name.startswith(tower + "."):
            continue
        shape = point_shape(point, source)
        elements = heads * rows**2 if shape == (-1,) else rows * int(np.prod(shape))
        if group and size + 4 * elements > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(point)
        size += 4 * elements
    if group:
        yield group


def point_shape(point: hooks.HookPoint, source: Source) -> tuple[int, ...]:
    """The shape of one row; (-1,) of scores and patterns."""
    if isinstance(source, Sound):
        return hooks.point_shape(point, source.ears.config)
    assert point.row_shape is not None
    return point.row_shape


class GemloupeTowers:
    """A gemloupe model's own towers."""

    def __init__(self, model: Model, side: str, adapters: Selection = NO_ADAPTERS) -> None:
        """`side`: "model" or "reference", for messages. `adapters`: what the side runs under."""
        self._model = model
        self._side = side
        self._adapters = model.adapters.media(adapters)
        self._held: dict[int, tuple[Content, np.ndarray]] = {}

    def values(
        self, prompt: Prompt, source: Source, names: Collection[str]
    ) -> dict[str, np.ndarray]:
        """What the tower holds at points [rows, …] while it encodes one source."""
        self._check(source)
        tower = tower_of(source)
        wanted = dict.fromkeys(names)
        capture = tower_hooks.TowerCapture(
            wanted if tower == "vision" else {}, wanted if tower == "audio" else {}
        )
        _, request = tower_hooks.parse(self._model, capture, None, False, self._adapters)
        kind = "image" if tower == "vision" else "audio"
        count = source.soft_tokens if isinstance(source, Image) else len(source.times)
        content = Content(
            kind, (count,), lambda _: self._encode(source), source=source, adapters=self._adapters
        )
        alone = dataclasses.replace(prompt, media=(Medium(content, 0, (np.arange(count),)),))
        inside = tower_hooks.encode(self._model, alone, request, 0)
        arrays = {name: inside.arrays[name] for name in names}
        return {n: np.asarray(a[0] if isinstance(a, list) else a) for n, a in arrays.items()}

    def soft_tokens(self, medium: Medium) -> np.ndarray:
        """float32 [n, D] of one medium."""
        content = medium.content
        if id(content) not in self._held:
            known = parts(medium)
            if known is None:
                tokens = np.asarray(medium.soft_tokens)
            else:
                tokens = np.concatenate([self._encode(part) for part in known])
            self._held[id(content)] = content, tokens
        return self._held[id(content)][1]

    def prompt(self, prompt: Prompt) -> Prompt:
        """The prompt with the soft tokens of these towers."""
        media = []
        for medium in prompt.media:
            tokens = self.soft_tokens(medium)
            content = medium.content
            own = dataclasses.replace(content, adapters=NO_ADAPTERS, fixed=True, _held={(): tokens})
            media.append(Medium(own, medium.index, medium.blocks))
        return dataclasses.replace(prompt, media=tuple(media))

    def _encode(self, source: Source) -> np.ndarray:
        self._check(source)
        if isinstance(source, Image):
            assert self._model.vision is not None
            return self._model.vision.encode(source, self._adapters)
        return self._model.audio_tower.encode(source.clip, adapters=self._adapters).soft_tokens

    def _check(self, source: Source) -> None:
        if isinstance(source, Sound):
            ears = read_ears(self._model.checkpoint)
            same = ears is not None and ears == source.ears
            got = "no audio part" if ears is None else "another audio config"
        else:
            vision = self._model.vision
            same = vision is not None and vision.config.cell == source.cell
            got = "no vision part" if vision is None else f"cells of {vision.config.cell} pixels"
        if not same:
            raise ValueError(
                f"the {self._side} has {got}, and the prompt's {tower_of(source)} was read for "
                "another model; expected the same checkpoint, with its towers, on both sides"
            )
