"""Videos as callers pass them to a few frames and their times.

Sampled as transformers' Gemma 4 video processor does: frame floor(i · total / 32) for i < 32, each
a picture of up to 70 soft tokens after its time in minutes and seconds. Frames are resized by
Pillow, whose values may differ from those of transformers (torchvision) by 1/255.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemloupe.errors import missing_extra, quoted
from gemloupe.media.images import (
    Image,
    check_budget,
    file_bytes,
    fitted,
    open_picture,
)
from gemloupe.media.spans import Spans

FRAMES = 32
"""Frames that are read of a video."""
FRAME_BUDGET = 70
"""Most soft tokens of one frame."""
DEFAULT_FPS = 24.0
"""Frames a second where nothing tells, as transformers assumes."""
_MAX_FRAMES = 1024
MAX_FRAME_PIXELS = 1 << 25
"""Of one frame of a file: 7680 x 4320. Decoders hold several frames."""
# Containers that hold all of their content themselves; playlists name other files.
_CONTAINERS = "mov,mp4,matroska,webm,avi,flv,ogg,mpeg,mpegts,gif,asf,apng"


@dataclass(frozen=True, eq=False)
class VideoSource:
    """A video and how it is to be read; made by `video`."""

    value: Any = field(repr=False)
    fps: float | None = None
    num_frames: int = FRAMES
    max_soft_tokens: int = FRAME_BUDGET
    most_pixels: int | None = None
    """Of all frames of a file together: decoding takes time for each. None: no bound."""


def video(
    value: Any,
    *,
    fps: float | None = None,
    num_frames: int = FRAMES,
    max_soft_tokens: int = FRAME_BUDGET,
) -> VideoSource:
    """Says how a video of `videos=` is to be read.

    `value`: a path or bytes of a video file (with PyAV: `pip install gemloupe[video]`), a list of
    frames (each as images are passed), or an array uint8 [F, H, W, 3]. `fps`: frames a second of
    `value`; None is the file's own, and 24 for frames. `num_frames`: of these as many are read, at
    equal distances (all where there are fewer). `max_soft_tokens` of each frame.
    """
    return VideoSource(value, fps, num_frames, max_soft_tokens)


@dataclass(frozen=True, eq=False)
class Video:
    """The frames of a video that a model reads."""

    frames: tuple[Image, ...] = field(repr=False)
    times: tuple[float, ...]
    """Seconds from the start, one a frame."""
    indices: tuple[int, ...]
    """Which of the caller's frames these are."""
    total_frames: int
    """Of the caller's video."""
    fps: float

    @property
    def labels(self) -> tuple[str, ...]:
        """What is written before each frame: minutes and seconds."""
        return tuple(f"{int(t // 60):02d}:{int(t % 60):02d}" for t in self.times)

    @property
    def spans(self) -> Spans:
        """What each soft token stands for: its box in its frame, the frame and its time."""
        counts = [frame.soft_tokens for frame in self.frames]
        frames = np.repeat(np.asarray(self.indices, np.int64), counts)
        seconds = np.repeat(np.asarray(self.times, np.float64), counts)
        return Spans(
            boxes=np.concatenate([frame.boxes for frame in self.frames]),
            frames=np.stack([frames, frames], axis=1),
            seconds=np.stack([seconds, seconds], axis=1),
        )


def read_video(value: Any, name: str, cell: int) -> Video:
    """Reads a video (see `video`); ValueError, beginning with `name`, for what is none."""
    source = value if isinstance(value, VideoSource) else VideoSource(value)
    _check(source, name)

    def fit(picture: Any) -> Image:  # At once: whole frames would take gigabytes.
        return fitted(picture, name, cell, source.max_soft_tokens)

    if isinstance(source.value, (str, os.PathLike, bytes, bytearray, memoryview)):
        images, indices, total, fps = _decode(source, name, fit)
    else:
        frames = _frames(source.value, name)
        total, fps = len(frames), float(source.fps or DEFAULT_FPS)
        indices = sampled(total, source.num_frames)
        images = [fit(open_picture(frames[i], f"{name}: frame {i}")) for i in indices]
    sizes = {(image.width, image.height) for image in images}
    if len(sizes) > 1:
        raise ValueError(f"{name} has frames of {len(sizes)} sizes; expected one size")
    times = tuple(index / fps for index in indices)
    return Video(tuple(images), times, tuple(indices), total, fps)


def sampled(total: int, num_frames: int) -> list[int]:
    """The frames that are read of `total`: floor(i · total / num_frames), or all of fewer."""
    count = min(total, num_frames)
    return [i * total // count for i in range(count)]


def _check(source: VideoSource, name: str) -> None:
    check_budget(source.max_soft_tokens, name)
    count = source.num_frames
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MAX_FRAMES:
        raise ValueError(f"{name}: num_frames is {quoted(count)}; expected 1 to {_MAX_FRAMES}")
    if source.fps is not None and not 0 < float(source.fps) < 1e6:
        raise ValueError(f"{name}: fps is {quoted(source.fps)}; expected frames a second, above 0")


def _frames(value: Any, name: str) -> Sequence[Any]:
    if getattr(value, "ndim", 0) == 4:
        value = list(np.asarray(value))
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{name} is a {type(value).__name__}; expected a path, bytes, a list of frames or an "
            "array uint8 [frames, height, width, 3]"
        )
    if not value:
        raise ValueError(f"{name} has no frames; expected at least one")
    return value


def is_frame(value: Any) -> bool:
    """Whether a list that begins with `value` is one video's frames, not several videos."""
    is_picture = hasattr(value, "getbands") and hasattr(value, "convert")
    is_gray = getattr(value, "ndim", 0) == 2 and value.dtype == np.uint8
    return is_picture or is_gray or getattr(value, "ndim", 0) == 3


def _decode(
    source: VideoSource, name: str, fit: Callable[[Any], Image]
) -> tuple[list[Image], list[int], int, float]:
    """Returns the sampled frames, fitted, their indices, how many there are, and fps."""
    try:
        import av
    except ImportError:
        raise missing_extra("av", "Reading video files", "video") from None
    data = file_bytes(source.value, name)
    options = {"protocol_whitelist": "data", "format_whitelist": _CONTAINERS}
    try:
        with av.open(io.BytesIO(data), options=options) as container:
            if not container.streams.video:
                raise ValueError(f"{name} has no pictures, only sound; expected a video")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # Frame threads would hold many decoded frames.
            if stream.codec_context is None:
                raise ValueError(
                    f"{name} is encoded with a codec that is not known here; convert it to one "
                    "such as H.264, VP9 or AV1"
                )
            _check_frame(stream, name)
            total = stream.frames or _count(container, stream)
            pixels = total * (stream.width or 0) * (stream.height or 0)
            if source.most_pixels is not None and pixels > source.most_pixels:
                raise ValueError(
                    f"{name} has {total} frames of {stream.width} x {stream.height} pixels, "
                    f"{pixels:,} in all; expected at most {source.most_pixels:,}: make it shorter "
                    "or smaller"
                )
            fps = float(source.fps or stream.average_rate or DEFAULT_FPS)
            indices = sampled(total, source.num_frames)
            wanted = set(indices)
            pictures = []
            for index, frame in enumerate(container.decode(stream)):
                _check_frame(frame, name)
                if index in wanted:
                    pictures.append(fit(frame.to_image()))
                if index >= indices[-1]:
                    break
    except ValueError as error:
        if isinstance(error, av.error.FFmpegError):
            raise ValueError(f"{name} is no video that is read ({error})") from None
        raise
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{name} is no video that is read ({error})") from None
    if len(pictures) < len(indices):
        raise ValueError(
            f"{name} says that it has {total} frames, but ends after {len(pictures)} of the "
            f"{len(indices)} that are read; the file is cut short"
        )
    return pictures, indices, total, fps


def _check_frame(frame: Any, name: str) -> None:
    if (frame.width or 0) * (frame.height or 0) > MAX_FRAME_PIXELS:
        raise ValueError(
            f"{name} has frames of {frame.width} x {frame.height} pixels; expected at most "
            f"{MAX_FRAME_PIXELS:,} in all"
        )


def _count(container: Any, stream: Any) -> int:
    """Frames of a container that does not say how many."""
    total = sum(1 for packet in container.demux(stream) if packet.size)
    container.seek(0)
    return max(1, total)
