"""From sound to the soft tokens that the text model reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemloupe import _core, capturing, towers
from gemloupe.adapters.selection import NO_ADAPTERS, Mix, Selection
from gemloupe.audio_config import AudioConfig, read_audio_config
from gemloupe.checkpoint import Checkpoint
from gemloupe.errors import quoted
from gemloupe.media.audio import (
    SAMPLING_RATE,
    Clip,
    Resampler,
    as_samples,
    check_finite,
    checked_rate,
    read_clip,
)
from gemloupe.media.content import Content, SoftTokens
from gemloupe.media.mel import MelOptions, MelStream, log_mel, read_options
from gemloupe.media.spans import Spans
from gemloupe.positions import Span

MAX_SECONDS = 30.0
"""Of sound that encoders read; what is beyond is cut, as transformers does it."""
FRAMES_PER_TOKEN = 4
"""Mel frames that the encoder's convolutions make one soft token of."""


@dataclass(frozen=True)
class Ears:
    """What a model hears: how sounds become features, and how many soft tokens these are."""

    config: AudioConfig
    mel: MelOptions

    @property
    def max_seconds(self) -> float | None:
        """The longest sound that is read; None where only the context bounds it."""
        return MAX_SECONDS if self.config.has_encoder else None

    def read(self, source: Any, sampling_rate: int | None = None) -> Clip:
        """Reads a sound (`read_clip`), cut at `max_seconds` with a warning; ValueError if the
        model can make no soft token of it."""
        clip = read_clip(source, sampling_rate, self.max_seconds)
        if not self.num_tokens(clip):
            least = self.mel.frame_length + 1 - self.mel.frame_length // 2
            raise ValueError(
                f"{clip.name}: the sound has {len(clip)} samples at 16 kHz; expected at least "
                f"{least}, one frame of {self.mel.frame_length_ms:g} ms"
            )
        return clip

    def num_tokens(self, clip: Clip) -> int:
        """Soft tokens of a clip: 25 a second."""
        if self.config.has_encoder:
            return -(-self.mel.num_frames(len(clip)) // FRAMES_PER_TOKEN)
        return -(-len(clip) // self.config.feature_size)

    def features(self, clip: Clip) -> np.ndarray:
        """What the engine reads: mel frames [F, bands], or samples [n, samples of a token]."""
        if self.config.has_encoder:
            return log_mel(clip.samples, self.mel)
        width = self.config.feature_size
        return np.pad(clip.samples, (0, -len(clip) % width)).reshape(-1, width)


class AudioTower:
    """The audio encoder of a checkpoint, or the projection of samples that 12B has instead."""

    def __init__(self, core: _core.AudioTower, ears: Ears) -> None:
        self.core = core
        self.ears = ears

    @property
    def config(self) -> AudioConfig:
        return self.ears.config

    def encode(
        self,
        clip: Clip,
        *,
        adapters: Selection = NO_ADAPTERS,
        capture: str | Iterable[str] | Mapping[str, Any] = (),
        edit: Any = None,
        check_finite: bool = False,
        row: int = 0,
    ) -> Encoding:
        """Computes the soft tokens of a clip; `capture` and `edit` as in `model.run`.

        `row`: of a batch, which edit functions are told.
        """
        features = self.ears.features(clip)
        mix = adapters.of_tower("audio")
        request = capturing.parse(
            capturing.Options(capture, False, check_finite), edit, self.config, adapters
        )
        if not request:
            tokens = self.core.encode(features, _core.AudioState(), True, None, mix)
            return Encoding(tokens, capturing.Captured({}, {}, self.config))
        span = Span(_Rows(self.ears.num_tokens(clip)), 0)
        capturing.check_memory(request, self.config, span, 0, len(span.prompt))
        bound = capturing.BoundHooks(request, self.config, span, row)
        bound.core.expected_rows = len(features)
        tokens = self.core.encode(features, _core.AudioState(), True, bound.core, mix)
        captured, _ = bound.take(np.zeros(0, np.int32), list, joined=True)
        return Encoding(tokens, captured)


@dataclass(frozen=True, eq=False)
class Encoding:
    """What encoding a sound gave."""

    soft_tokens: np.ndarray
    """float32 [n, D], read-only."""
    captured: capturing.Captured


@dataclass(frozen=True, eq=False)
class Sound:
    """What the soft tokens of a sound were made of: `content.source`."""

    clip: Clip
    ears: Ears
    captured: capturing.Captured
    """What `encode_audio(capture=…)` was asked for."""

    @functools.cached_property
    def features(self) -> np.ndarray:
        """float32 [F, B]: log-mel frames every 10 ms; of 12B, the samples [n, 640]."""
        return self.ears.features(self.clip)

    @functools.cached_property
    def frames(self) -> np.ndarray:
        """int64 [n, 2]: the first and the last frame of `features` that each token stands for."""
        width = FRAMES_PER_TOKEN if self.ears.config.has_encoder else 1
        first = np.arange(self.ears.num_tokens(self.clip)) * width
        return np.stack([first, np.minimum(first + width, len(self.features)) - 1], axis=1)

    @functools.cached_property
    def times(self) -> np.ndarray:
        """float64 [n, 2]: seconds from and to which each token stands, 40 ms."""
        if self.ears.config.has_encoder:
            token = FRAMES_PER_TOKEN * self.ears.mel.hop_length / SAMPLING_RATE
        else:
            token = self.ears.config.feature_size / SAMPLING_RATE
        first = np.arange(self.ears.num_tokens(self.clip)) * token
        return np.stack([first, first + token], axis=1)

    @property
    def spans(self) -> Spans:
        """What each soft token stands for: its frames and seconds."""
        return Spans(frames=self.frames, seconds=self.times)


def encode_audio(
    tower: AudioTower,
    source: Any,
    sampling_rate: int | None = None,
    *,
    adapters: Selection = NO_ADAPTERS,
    capture: str | Iterable[str] | Mapping[str, Any] = (),
    edit: Any = None,
    check_finite: bool = False,
) -> SoftTokens:
    """Returns a sound's soft tokens [n, D]; see `Model.encode_audio`."""
    clip = tower.ears.read(source, sampling_rate)
    encoding = tower.encode(
        clip,
        adapters=adapters,
        capture=capture,
        edit=edit,
        check_finite=check_finite,
    )
    rows = encoding.soft_tokens
    sound = Sound(clip, tower.ears, encoding.captured)
    content = Content(
        "audio", (len(rows),), lambda _adapters: rows, source=sound, adapters=adapters
    )
    return SoftTokens.of(content)


def read_audio(tower: AudioTower, value: Any, name: str) -> Content:
    """Reads a sound of a prompt: anything that `read_clip` takes, or (array, sampling rate).

    ValueError, beginning with `name`, for what can't be read. Its soft tokens are computed when
    they are first asked for.
    """
    rate = None
    if isinstance(value, tuple) and len(value) == 2:
        value, rate = value
    try:
        clip = tower.ears.read(value, rate)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None
    nothing = capturing.Captured({}, {}, tower.config)
    return Content(
        "audio",
        (tower.ears.num_tokens(clip),),
        lambda adapters: tower.encode(clip, adapters=adapters).soft_tokens,
        source=Sound(clip, tower.ears, nothing),
    )


class _Rows:
    """The rows of a tower in place of a prompt, for positions that count from their end."""

    media = ()

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def positions(self, kind: str) -> np.ndarray:
        raise ValueError(
            f"positions {quoted(kind)} are those of a prompt; of a tower, give numbers or a slice"
        )


def read_ears(checkpoint: Checkpoint) -> Ears | None:
    """What a checkpoint hears; None where it has no audio part. ValueError for a wrong config."""
    if not towers.has_audio(checkpoint):
        return None
    if checkpoint.folder.is_dir():
        mel = read_options(checkpoint.folder)
    else:
        bands = checkpoint.config.raw["audio_config"].get("input_feat_size", 128)  # See mmproj.py.
        mel = MelOptions(feature_size=bands)
    config = read_audio_config(checkpoint.config, mel.feature_size)
    return None if config is None else Ears(config, mel)


def open_tower(checkpoint: Checkpoint, options: _core.AudioTowerOptions) -> AudioTower:
    """Loads the audio part of a checkpoint, its weights as they are stored.

    ValueError where it has none, or where a tensor is missing or wrong.
    """
    ears = read_ears(checkpoint)
    if ears is None:
        raise towers.lacks(checkpoint, "audio", "an E2B, E4B or 12B checkpoint")
    return make_tower(ears, towers.weights(checkpoint, towers.AUDIO), options)


def make_tower(ears: Ears, weights: _core.Weights, options: _core.AudioTowerOptions) -> AudioTower:
    """Builds a tower on weights under their names in a checkpoint, without "model."."""
    config = _core.AudioConfig()
    for field in dataclasses.fields(ears.config):
        setattr(config, field.name, getattr(ears.config, field.name))
    return AudioTower(_core.AudioTower(config, weights, options), ears)


class AudioStream:
    """Sound that comes piece by piece; made by `model.audio_stream`.

    The encoder is causal: a soft token is final when the 40 ms that it stands for, and 20 ms beyond
    them, are there. All of them together are those of the whole sound.
    """

    def __init__(
        self, tower: AudioTower, sampling_rate: int | None = None, adapters: Mix = ()
    ) -> None:
        """`sampling_rate`: of the samples to come; 16 kHz without it."""
        self._tower = tower
        self._adapters = adapters
        self._rate = SAMPLING_RATE if sampling_rate is None else checked_rate(sampling_rate)
        self._resampler = None if self._rate == SAMPLING_RATE else Resampler(self._rate)
        self._mel = MelStream(tower.ears.mel)
        self._held = np.zeros(0, np.float32)  # Samples of a token that is not whole yet (12B).
        self._pushed = 0
        self._state = _core.AudioState()

    @property
    def num_tokens(self) -> int:
        """Soft tokens so far."""
        return self._state.tokens

    @property
    def seconds(self) -> float:
        """Of sound that came so far."""
        return self._pushed / self._rate

    def push(self, samples: Any) -> np.ndarray:
        """Takes the next samples, [N] or [N, channels]; returns the soft tokens [n, D] that are
        final now, maybe none.

        ValueError for NaN, after `finish`, and for sound beyond the 30 s that an encoder reads; the
        stream is then as it was before.
        """
        block = as_samples(samples)
        check_finite(block, "audio", self._pushed)
        if self._state.ended:
            raise ValueError("this stream has ended; begin another with model.audio_stream()")
        most = self._tower.ears.max_seconds
        if most is not None and self._pushed + len(block) > most * self._rate:
            raise ValueError(
                f"the stream would have {(self._pushed + len(block)) / self._rate:.2f} s of sound; "
                f"the model reads {most:g} s. Finish this stream and begin another"
            )
        self._pushed += len(block)
        return self._encode(block if self._resampler is None else self._resampler.push(block))

    def finish(self) -> np.ndarray:
        """Ends the sound; returns the last soft tokens [n, D]. A second call returns none."""
        if self._state.ended:
            return np.zeros((0, self._tower.config.text_hidden_size), np.float32)
        rest = np.zeros(0, np.float32)
        return self._encode(rest if self._resampler is None else self._resampler.finish(), True)

    def _encode(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        config = self._tower.config
        if config.has_encoder:
            features = self._mel.push(samples)
        else:
            width = config.feature_size
            held = np.concatenate([self._held, samples])
            whole = len(held) if last else len(held) // width * width
            self._held = held[whole:]
            features = np.pad(held[:whole], (0, -whole % width)).reshape(-1, width)
        return self._tower.core.encode(features, self._state, last, None, self._adapters)
