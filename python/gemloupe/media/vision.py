"""A model's eyes: its vision weights in the engine, loaded when an image is first encoded."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from gemloupe import _core
from gemloupe.adapters.selection import NO_ADAPTERS, Selection
from gemloupe.media.content import Content, SoftTokens
from gemloupe.media.images import DEFAULT_BUDGET, Image, read_image
from gemloupe.media.videos import VideoSource, read_video
from gemloupe.vision_config import VisionConfig


class Vision:
    """Encodes images for one model. Threads may share it: their images take turns."""

    def __init__(
        self, config: VisionConfig, load: Callable[[_core.VisionConfig], _core.VisionModel]
    ) -> None:
        """`load` makes the engine's part; it is called once, when soft tokens are needed."""
        self.config = config
        self._load = load
        self._lock = threading.Lock()
        self._core: _core.VisionModel | None = None

    @property
    def core(self) -> _core.VisionModel:
        """The engine's vision model, loaded now if it is not yet."""
        with self._lock:
            if self._core is None:
                self._core = self._load(core_config(self.config))
            return self._core

    def read(self, value: Any, name: str, max_soft_tokens: int = DEFAULT_BUDGET) -> Content:
        """Reads an image (see `images.read_image`); it is encoded when needed."""
        image = read_image(value, name, self.config.cell, max_soft_tokens)
        return Content(
            "image", (image.soft_tokens,), functools.partial(self.encode, image), source=image
        )

    def read_video(self, value: Any, name: str, max_soft_tokens: int | None = None) -> Content:
        """Reads a video (see `videos.video`); its frames are encoded when they are needed."""
        source = value if isinstance(value, VideoSource) else VideoSource(value)
        if max_soft_tokens is not None:
            source = dataclasses.replace(source, max_soft_tokens=max_soft_tokens)
        video = read_video(source, name, self.config.cell)
        lengths = tuple(frame.soft_tokens for frame in video.frames)

        def encode(adapters: Selection) -> np.ndarray:
            return np.concatenate([self.encode(frame, adapters) for frame in video.frames])

        return Content("video", lengths, encode, video.labels, source=video)

    def encode(
        self,
        image: Image,
        adapters: Selection = NO_ADAPTERS,
        hooks: _core.Hooks | None = None,
        first_row: int = 0,
    ) -> np.ndarray:
        """Returns the soft tokens float32 [n, D] of an image; `hooks` sees its patches' rows from
        `first_row` on.
        """
        side = self.config.patch_size if self.config.has_encoder else self.config.cell
        columns = image.pixels.shape[1] // side
        mix = adapters.of_tower("vision")
        return self.core.encode(image.patches(side), columns, hooks, first_row, mix)

    def encode_image(
        self, value: Any, max_soft_tokens: int, adapters: Selection = NO_ADAPTERS
    ) -> SoftTokens:
        """Reads and encodes one image."""
        return SoftTokens.of(self.read(value, "image", max_soft_tokens).under(adapters))

    def encode_video(self, value: Any, adapters: Selection = NO_ADAPTERS) -> SoftTokens:
        """Reads a video and encodes its frames."""
        return SoftTokens.of(self.read_video(value, "video").under(adapters))


def core_config(config: VisionConfig) -> _core.VisionConfig:
    """The engine's copy: the same fields under the same names."""
    core = _core.VisionConfig()
    for of in dataclasses.fields(config):
        setattr(core, of.name, getattr(config, of.name))
    return core
