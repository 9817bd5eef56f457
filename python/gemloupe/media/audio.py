"""Reads sound of any kind as mono float32 samples at 16 kHz, block by block."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gemloupe.errors import missing_extra, quoted

SAMPLING_RATE = 16_000
"""Samples a second that the models read."""
_RATES = (1_000, 768_000)
_MAX_CHANNELS = 64
# Samples, of all channels together, that are decoded at once.
_BLOCK = 1 << 18
# A file is read this far beyond the cut, so that resampling sees what follows it.
_MARGIN_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class Clip:
    """Sound as the models read it."""

    samples: np.ndarray
    """float32 [N], mono, at 16 kHz, read-only."""
    seconds: float
    """How long the whole sound is, what was cut included."""
    name: str
    """What it was read from, for messages."""

    def __len__(self) -> int:
        return len(self.samples)


def read_clip(
    source: Any, sampling_rate: int | None = None, max_seconds: float | None = None
) -> Clip:
    """Reads a path, bytes, data URL or array, up to `max_seconds`; a `Clip` passes through.

    What is beyond is dropped, with a warning that names the seconds lost. Arrays are [N], or
    [N, channels] (their mean is taken); integers are scaled to [-1, 1], floats are taken as they
    are. `sampling_rate` belongs to arrays, 16 kHz without it: files say their own. Files of one
    channel at 16 kHz and files at other rates give what transformers' `load_audio` gives.
    ValueError for what is no sound: empty, with NaN or infinity, cut short, in an unknown format.
    """
    if isinstance(source, Clip):
        reader = AudioSource(source.samples)
        reader.name = source.name
    else:
        reader = AudioSource(source, sampling_rate)
    limit = None if max_seconds is None else round(max_seconds * SAMPLING_RATE)
    parts: list[np.ndarray] = []
    count = 0
    for block in reader.blocks(max_seconds):
        parts.append(block if limit is None else block[: limit - count])
        count += len(parts[-1])
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(samples):
        raise ValueError(f"{reader.name}: the sound is empty; expected at least one sample")
    seconds = source.seconds if isinstance(source, Clip) else reader.seconds
    if max_seconds is not None and seconds > max_seconds:
        warnings.warn(
            f"{reader.name}: the sound is {seconds:.2f} s long; the model reads {max_seconds:g} s, "
            f"and the last {seconds - max_seconds:.2f} s are lost. gl.transcribe splits longer "
            "speech at silences",
            stacklevel=3,
        )
    samples.setflags(write=False)
    return Clip(samples, seconds, reader.name)


class AudioSource:
    """A source of sound that is opened and checked, and not decoded yet."""

    def __init__(self, source: Any, sampling_rate: int | None = None) -> None:
        self.name = "audio"
        self._array: np.ndarray | None = None
        self._file: Any = None
        if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
            if sampling_rate is not None:
                raise ValueError(
                    f"sampling_rate is {quoted(sampling_rate)}, but the audio is a file, which "
                    "says its own; leave it out"
                )
            self._open(source)
        else:
            self._array = as_samples(source)
            self._rate = SAMPLING_RATE if sampling_rate is None else checked_rate(sampling_rate)
            self.seconds = len(self._array) / self._rate
            """How long the sound is; a file's header tells."""

    def _open(self, source: Any) -> None:
        try:
            import soundfile
        except ImportError:
            raise missing_extra("soundfile", "reading audio files", "media") from None
        if isinstance(source, str) and source.startswith("data:"):
            source = data_url_bytes(source)
        if isinstance(source, (str, os.PathLike)):
            path = Path(source).expanduser()
            self.name = str(path)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: no such file; expected audio. Give a path, bytes, a data URL or an "
                    "array of samples"
                )
            opened: Any = str(path)
        else:
            self.name = "audio bytes"
            if not len(source):
                raise ValueError("audio bytes are empty; expected the content of an audio file")
            opened = io.BytesIO(source)
        try:
            self._file = soundfile.SoundFile(opened)
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{self.name}: libsndfile can't read this as audio ({error.error_string}); "
                "expected WAV, FLAC, OGG or MP3. Convert it to one of these"
            ) from None
        self._rate = checked_rate(self._file.samplerate, f"{self.name}: ")
        if self._file.channels > _MAX_CHANNELS:
            self._refuse(f"has {self._file.channels} channels; expected 1 to {_MAX_CHANNELS}")
        self.seconds = self._file.frames / self._rate

    def _refuse(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.name}: the audio {problem}")

    def blocks(self, max_seconds: float | None = None) -> Iterator[np.ndarray]:
        """Yields float32 blocks [n] at 16 kHz, in order; a bit more than `max_seconds` of them."""
        end = None
        if max_seconds is not None:
            end = math.ceil((max_seconds + _MARGIN_SECONDS) * self._rate)
        source = self._checked(self._decoded(end))
        return source if self._rate == SAMPLING_RATE else self._resampled(source)

    def _decoded(self, end: int | None) -> Iterator[np.ndarray]:
        """Mono blocks at the source's own rate, up to `end` samples."""
        if self._array is not None:
            for begin in range(0, len(self._array[:end]), _BLOCK):
                yield self._array[begin : min(begin + _BLOCK, end or len(self._array))]
            return
        import soundfile

        frames = max(1, _BLOCK // self._file.channels)
        count = 0
        while end is None or count < end:
            wanted = frames if end is None else min(frames, end - count)
            try:
                block = self._file.read(wanted, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                self._refuse(
                    f"can't be decoded after {count / self._rate:.2f} s ({error.error_string}); it "
                    "is damaged or cut short"
                )
            if not len(block):
                break
            count += len(block)
            # As transformers does it; float32 sums of a few channels.
            yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]
        if (end is None or count < end) and count < self._file.frames:
            self._refuse(
                f"ends after {count / self._rate:.2f} s, but its header says {self.seconds:.2f} s; "
                "it is cut short"
            )

    def _checked(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        first = 0
        for block in blocks:
            check_finite(block, f"{self.name}: the audio", first)
            first += len(block)
            yield block

    def _resampled(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        resampler = Resampler(self._rate)
        for block in blocks:
            yield resampler.push(block)
        yield resampler.finish()


class Resampler:
    """Brings mono sound that comes block by block to 16 kHz; soxr's high quality."""

    def __init__(self, rate: int) -> None:
        """`rate`: samples a second of the source."""
        try:
            import soxr
        except ImportError:
            feature = f"audio at {rate} Hz (16000 needs no resampling)"
            raise missing_extra("soxr", feature, "media") from None
        self._stream = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32", quality="HQ")
        self._rate = rate
        self._read = self._given = 0

    def push(self, block: np.ndarray) -> np.ndarray:
        """Takes float32 [n]; returns what is final of the result, maybe nothing."""
        self._read += len(block)
        out: np.ndarray = self._stream.resample_chunk(np.ascontiguousarray(block))
        self._given += len(out)
        return out

    def finish(self) -> np.ndarray:
        """The rest: as many samples as the source's duration has, as transformers makes it."""
        out = self._stream.resample_chunk(np.zeros(0, np.float32), last=True)
        left = max(0, math.ceil(self._read * SAMPLING_RATE / self._rate) - self._given)
        return np.pad(out, (0, max(0, left - len(out))))[:left]


def checked_rate(rate: Any, where: str = "") -> int:
    """Returns a number of samples a second; ValueError for what is none."""
    is_number = isinstance(rate, (int, np.integer)) and not isinstance(rate, bool)
    if not is_number or not _RATES[0] <= rate <= _RATES[1]:
        raise ValueError(
            f"{where}sampling_rate is {quoted(rate)}; expected samples a second, {_RATES[0]} to "
            f"{_RATES[1]}, such as 16000"
        )
    return int(rate)


def as_samples(source: Any) -> np.ndarray:
    """float32 [N] of an array [N] or [N, channels]; TypeError or ValueError for anything else."""
    if not hasattr(source, "__array__") and hasattr(source, "__dlpack__"):
        source = np.from_dlpack(source)
    if not isinstance(source, (list, tuple)) and not hasattr(source, "__array__"):
        raise TypeError(
            f"audio is a {type(source).__name__}; expected a path, bytes, a data URL or an array "
            "of samples [N] or [N, channels]"
        )
    array = np.asarray(source)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"audio has dtype {array.dtype}; expected float or integer samples")
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 1 <= array.shape[1] <= _MAX_CHANNELS):
        hint = ""
        if array.ndim == 2 and 1 <= array.shape[0] <= _MAX_CHANNELS:
            hint = "; transpose it, channels come last"
        raise ValueError(
            f"audio has shape {list(array.shape)}; expected [N], or [N, channels] with 1 to "
            f"{_MAX_CHANNELS} channels{hint}"
        )
    if array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128.0) / 128.0
    elif array.dtype.kind in "iu":
        info = np.iinfo(array.dtype)
        array = array.astype(np.float64) / (float(info.max) + 1.0)
    if array.ndim == 2:
        array = array.mean(axis=1) if array.shape[1] > 1 else array[:, 0]
    return np.ascontiguousarray(array, np.float32)


def check_finite(samples: np.ndarray, what: str, first: int = 0) -> None:
    """ValueError, beginning with `what`, for NaN and infinity; `first` numbers the first sample."""
    finite = np.isfinite(samples)
    if not finite.all():
        at = int(np.argmin(finite))
        raise ValueError(
            f"{what} has {samples[at]} at sample {first + at}; expected finite samples, within "
            "about -1 to 1"
        )


def data_url_bytes(url: str) -> bytes:
    """The bytes of a base64 data URL; ValueError where it is none."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(
            f"{quoted(head)} is no data URL in base64; expected data:audio/wav;base64,… (or "
            "another type)"
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data URL's base64 is damaged: {error}") from None
