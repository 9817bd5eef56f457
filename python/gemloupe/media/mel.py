"""Log-mel features of sound, equal to those of transformers' Gemma4AudioFeatureExtractor."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gemloupe import strict_json
from gemloupe.errors import quoted

# What a file may say of features that are computed here only without it, and what it says then.
_UNUSED: dict[str, Any] = {
    "dither": 0.0,
    "preemphasis": 0.0,
    "input_scale_factor": 1.0,
    "per_bin_mean": None,
    "per_bin_stddev": None,
    "sampling_rate": 16_000,
}
# Frames whose spectra are computed at once.
_BLOCK = 512


@dataclass(frozen=True)
class MelOptions:
    """How features are made; the fields of transformers' feature extractor."""

    feature_size: int = 128
    """Mel bands."""
    frame_length_ms: float = 20.0
    hop_length_ms: float = 10.0
    min_frequency: float = 0.0
    max_frequency: float = 8000.0
    fft_overdrive: bool = False
    mel_floor: float = 1e-3

    @property
    def frame_length(self) -> int:
        """Samples of a window."""
        return round(16 * self.frame_length_ms)

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return round(16 * self.hop_length_ms)

    @property
    def fft_length(self) -> int:
        return 1 << ((self.frame_length - 1).bit_length() + int(self.fft_overdrive))

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip: those whose window and next sample are all real samples."""
        first = self.frame_length + 1 - self.frame_length // 2
        return 0 if num_samples < first else (num_samples - first) // self.hop_length + 1


def read_options(folder: Path) -> MelOptions:
    """The options of a checkpoint's processor_config.json or preprocessor_config.json.

    The released models' where the folder says nothing. ValueError for what isn't supported.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        values = strict_json.read_object(path)
        section = values.get("feature_extractor", values)
        if isinstance(section, Mapping) and ("mel_floor" in section or "dither" in section):
            return _parse(section, path)
    return MelOptions()


def _parse(values: Mapping[str, Any], path: Path) -> MelOptions:
    for name, expected in _UNUSED.items():
        if values.get(name, expected) != expected:
            raise ValueError(
                f"{path}: {name} is {quoted(values[name])}; expected {expected}: released models "
                "use no other, and this version computes no other"
            )
    given: dict[str, Any] = {}
    for field in fields(MelOptions):
        value = values.get(field.name, field.default)
        kinds: tuple[type, ...] = (bool,) if field.name == "fft_overdrive" else (int, float)
        is_right = isinstance(value, kinds) and isinstance(value, bool) == (kinds == (bool,))
        if not is_right or not 0 <= value <= 100_000:
            raise ValueError(f"{path}: {field.name} is {quoted(value)}; expected a number")
        given[field.name] = value
    options = MelOptions(**given)
    limits = {"frame_length_ms": 1_000, "hop_length_ms": 1_000, "feature_size": 4_096}
    for name, most in limits.items():
        if not 1 <= given[name] <= most:
            raise ValueError(f"{path}: {name} is {given[name]}; expected 1 to {most}")
    return options


def log_mel(samples: np.ndarray, options: MelOptions = MelOptions()) -> np.ndarray:
    """Features float32 [frames, feature_size] of samples float32 [N] at 16 kHz.

    ln(|STFT| · filters + mel_floor) of windows of 20 ms every 10 ms, the first of which is centred
    on the first sample. Without the frames that transformers masks: those that reach beyond the
    last sample.
    """
    stream = MelStream(options)
    return stream.push(samples)


class MelStream:
    """Features of sound that comes piece by piece; what it gave is final."""

    def __init__(self, options: MelOptions = MelOptions()) -> None:
        self.options = options
        # The samples that coming frames still need; zeros stand before the first.
        self._held = np.zeros(options.frame_length // 2, np.float32)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Takes the next samples [N]; returns the features [frames, feature_size] they complete."""
        options = self.options
        held = np.concatenate([self._held, samples.astype(np.float32, copy=False)])
        length, hop = options.frame_length, options.hop_length
        count = 0 if len(held) < length + 1 else (len(held) - length - 1) // hop + 1
        result = np.empty((count, options.feature_size), np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(held, length)[::hop] if count else held
        window, filters = _window(length), mel_filters(options)
        for begin in range(0, count, _BLOCK):
            part = frames[begin : min(begin + _BLOCK, count)] * window
            magnitude = np.abs(np.fft.rfft(part, n=options.fft_length, axis=-1))
            # float64 from here on, as in transformers.
            result[begin : begin + len(part)] = np.log(magnitude @ filters + options.mel_floor)
        self._held = held[count * hop :].copy()
        return result


@functools.lru_cache(maxsize=8)
def _window(length: int) -> np.ndarray:
    """The periodic Hann window."""
    return np.hanning(length + 1)[:-1].astype(np.float32)


@functools.lru_cache(maxsize=8)
def mel_filters(options: MelOptions) -> np.ndarray:
    """float64 [fft_length / 2 + 1, feature_size]: triangles of height 1 on HTK's mel scale.

    mel = 2595 log10(1 + f / 700); the corners are evenly spaced in mel.
    """
    low, high = (
        2595.0 * np.log10(1.0 + f / 700.0) for f in (options.min_frequency, options.max_frequency)
    )
    corners = 700.0 * (10.0 ** (np.linspace(low, high, options.feature_size + 2) / 2595.0) - 1.0)
    bins = np.linspace(0, 8_000, options.fft_length // 2 + 1)
    distance = corners[None, :] - bins[:, None]
    widths = np.diff(corners)
    rising = -distance[:, :-2] / widths[:-1]
    falling = distance[:, 2:] / widths[1:]
    return np.maximum(0.0, np.minimum(rising, falling))
