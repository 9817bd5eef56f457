"""Sound from files and arrays, beside transformers' loader."""

from __future__ import annotations

import base64
import io
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers.audio_utils import load_audio

from gemloupe.media.audio import AudioSource, read_clip


def tone(seconds: float, rate: int, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    columns = [0.4 * np.sin(2 * np.pi * hertz * (i + 1) * t) for i in range(channels)]
    return np.stack(columns, 1).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int, **options: str) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.mark.parametrize("rate", (8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000))
@pytest.mark.parametrize("channels", (1, 2, 6))
def test_files_of_any_rate_are_read_as_transformers_reads_them(
    tmp_path: Path, rate: int, channels: int
) -> None:
    path = write(tmp_path / "tone.wav", tone(0.7, rate, channels), rate, subtype="FLOAT")

    clip = read_clip(path)

    expected = load_audio(str(path), backend="soundfile")
    np.testing.assert_allclose(clip.samples, expected, atol=1e-7)
    assert len(clip.samples) == len(expected)
    assert clip.seconds == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("name", ("a.wav", "a.flac", "a.ogg", "a.mp3"))
def test_common_formats_are_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, tone(0.5, 44_100, 2), 44_100)

    np.testing.assert_allclose(
        read_clip(path).samples, load_audio(str(path), backend="soundfile"), atol=1e-7
    )


def test_path_bytes_and_data_url_are_the_same_sound(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.wav", tone(0.2, 16_000), 16_000)
    data = path.read_bytes()
    url = "data:audio/wav;base64," + base64.b64encode(data).decode()

    expected = read_clip(str(path)).samples

    for source in (data, bytearray(data), memoryview(data), url, path):
        np.testing.assert_array_equal(read_clip(source).samples, expected)


def test_a_file_that_is_cut_equals_the_beginning_of_the_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.wav", tone(3.0, 44_100), 44_100)

    with pytest.warns(UserWarning, match=r"3\.00 s long.* 1 s, and the last 2\.00 s"):
        clip = read_clip(path, max_seconds=1)

    np.testing.assert_array_equal(clip.samples, read_clip(path).samples[:16_000])
    assert clip.seconds == 3.0


def test_a_clip_of_exactly_the_limit_is_not_cut() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_clip(np.zeros(16_000, np.float32), max_seconds=1)

    assert len(clip) == 16_000


def test_long_files_are_read_in_bounded_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "long.flac", np.zeros((400 * 48_000, 1), np.float32), 48_000)

    tracemalloc.start()
    with pytest.warns(UserWarning, match="the last 399.00 s are lost"):
        read_clip(path, max_seconds=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 8 << 20  # All of it would be 77 MB.


def test_channels_are_averaged() -> None:
    left, right = np.full(400, 0.5, np.float32), np.full(400, 0.1, np.float32)

    clip = read_clip(np.stack([left, right], 1))

    np.testing.assert_allclose(clip.samples, 0.3, rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([0, 16_384, -32_768], np.int16), [0.0, 0.5, -1.0]),
        (np.array([0, 1 << 30, -(1 << 31)], np.int32), [0.0, 0.5, -1.0]),
        (np.array([128, 192, 0], np.uint8), [0.0, 0.5, -1.0]),
        (np.array([0.0, 0.5, -1.0]), [0.0, 0.5, -1.0]),
        ([0.0, 0.5, -1.0], [0.0, 0.5, -1.0]),
    ],
)
def test_arrays_of_integers_are_scaled_and_floats_are_not(
    array: object, expected: list[float]
) -> None:
    np.testing.assert_array_equal(read_clip(array).samples, np.array(expected, np.float32))


def test_arrays_at_another_rate_are_resampled_as_files_are(tmp_path: Path) -> None:
    samples = tone(0.5, 48_000)
    path = write(tmp_path / "tone.wav", samples, 48_000, subtype="FLOAT")

    clip = read_clip(samples[:, 0], sampling_rate=48_000)

    np.testing.assert_array_equal(clip.samples, read_clip(path).samples)


def test_blocks_of_a_reader_make_up_the_clip(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.wav", tone(20.0, 32_000), 32_000)

    blocks = list(AudioSource(path).blocks())

    assert len(blocks) > 2
    np.testing.assert_array_equal(np.concatenate(blocks), read_clip(path).samples)


def test_an_extension_that_is_wrong_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.flac", tone(0.2, 16_000), 16_000)

    renamed = path.rename(tmp_path / "tone.mp3")

    np.testing.assert_array_equal(
        read_clip(renamed).samples, read_clip(renamed.read_bytes()).samples
    )


def _of_unknown_codec() -> bytes:
    """A WAV whose header names no format that there is."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(100, np.int16), 16_000, format="WAV")
    data = bytearray(file.getvalue())
    data[20:22] = (0x1234).to_bytes(2, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (np.zeros(0, np.float32), "the sound is empty"),
        (np.array([0.0, np.nan]), "has nan at sample 1; expected finite samples"),
        (np.array([0.0, 0.0, -np.inf]), "has -inf at sample 2"),
        (np.zeros((2, 4000)), r"shape \[2, 4000\].* transpose it"),
        (np.zeros((2, 2, 2)), r"shape \[2, 2, 2\]; expected \[N\]"),
        (b"", "audio bytes are empty"),
        (b"not a sound at all", "libsndfile can't read this as audio"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 200, "libsndfile can't read this as audio"),
        (_of_unknown_codec(), "libsndfile can't read this as audio"),
        ("data:audio/wav,plain", "no data URL in base64"),
        ("data:audio/wav;base64,!!!", "the data URL's base64 is damaged"),
    ],
)
def test_what_is_no_sound_is_refused_in_words(source: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_clip(source)


@pytest.mark.parametrize("rate", (0, 100, 10**7, True, "16000", 16_000.0))
def test_impossible_rates_are_refused(rate: object) -> None:
    with pytest.raises(ValueError, match="expected samples a second, 1000 to 768000"):
        read_clip(np.zeros(10), sampling_rate=rate)  # type: ignore[arg-type]


def test_a_rate_for_a_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.wav", tone(0.1, 16_000), 16_000)

    with pytest.raises(ValueError, match="says its own"):
        read_clip(path, sampling_rate=8000)


def test_objects_and_complex_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="audio is a dict; expected a path"):
        read_clip({})
    with pytest.raises(TypeError, match="dtype complex128"):
        read_clip(np.zeros(4, complex))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.wav: no such file"):
        read_clip(tmp_path / "nothing.wav")


def test_truncated_files_are_refused_or_short(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (48_000, 1)).astype(np.float32)
    for name in ("a.flac", "a.ogg", "a.wav"):
        data = write(tmp_path / name, samples, 16_000).read_bytes()
        try:
            clip = read_clip(data[: len(data) // 2])
        except ValueError as error:
            assert "cut short" in str(error) or "can't read" in str(error), name
        else:  # Formats whose length is that of the file.
            assert 0 < len(clip) < 30_000, name


def test_a_wav_header_that_promises_too_much_allocates_nothing() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(100, np.int16), 16_000, format="WAV")
    data = bytearray(file.getvalue())
    data[40:44] = (0xFFFF_FFF0).to_bytes(4, "little")  # The size of the samples.

    tracemalloc.start()
    clip = read_clip(bytes(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(clip) == 100
    assert peak < 8 << 20
