"""Log-mel features, beside transformers' feature extractor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import Gemma4AudioFeatureExtractor

from gemloupe.media.mel import MelOptions, MelStream, log_mel, mel_filters, read_options

LENGTHS = (161, 320, 321, 480, 481, 1000, 1601, 16_000, 16_007, 70_001, 479_999, 480_000)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, count).astype(np.float32)


@pytest.mark.parametrize("length", LENGTHS)
def test_features_are_bit_for_bit_those_of_transformers(length: int) -> None:
    samples = noise(length)

    features = log_mel(samples)

    expected = Gemma4AudioFeatureExtractor()([samples])
    valid = expected["input_features_mask"][0]
    np.testing.assert_array_equal(features, expected["input_features"][0][valid])
    assert len(features) == MelOptions().num_frames(length) == valid.sum()


def test_a_clip_in_a_batch_of_longer_ones_has_the_same_features() -> None:
    clips = [noise(5000, 1), noise(16_000, 2)]

    expected = Gemma4AudioFeatureExtractor()(clips)

    for i, clip in enumerate(clips):
        valid = expected["input_features_mask"][i]
        np.testing.assert_array_equal(log_mel(clip), expected["input_features"][i][valid])


def test_silence_gives_the_logarithm_of_the_floor() -> None:
    features = log_mel(np.zeros(1600, np.float32))

    np.testing.assert_allclose(features, np.log(0.001), rtol=1e-6)


def test_other_settings_of_the_extractor_give_its_features() -> None:
    settings = {"feature_size": 40, "frame_length_ms": 32.0, "hop_length_ms": 12.5}
    settings |= {"min_frequency": 125.0, "max_frequency": 7600.0, "fft_overdrive": True}
    settings["mel_floor"] = 1e-5
    samples = noise(9000)

    expected = Gemma4AudioFeatureExtractor(**settings)([samples])

    options = MelOptions(**settings)
    features = log_mel(samples, options)
    valid = expected["input_features_mask"][0]
    np.testing.assert_array_equal(features, expected["input_features"][0][valid])
    assert len(features) == options.num_frames(9000)


@pytest.mark.parametrize("step", (1, 97, 160, 1000, 4001))
def test_pushed_pieces_give_the_features_of_the_whole(step: int) -> None:
    samples = noise(4001)
    stream = MelStream()

    parts = [stream.push(samples[i : i + step]) for i in range(0, len(samples), step)]

    # The float64 product with the filters may round a few of them differently.
    np.testing.assert_allclose(np.concatenate(parts), log_mel(samples), rtol=3e-7)


def test_less_than_a_frame_has_no_features() -> None:
    assert log_mel(noise(160)).shape == (0, 128)


def test_the_filters_are_those_of_transformers() -> None:
    np.testing.assert_array_equal(
        mel_filters(MelOptions()), Gemma4AudioFeatureExtractor().mel_filters
    )


def test_options_come_from_a_checkpoints_processor_config(tmp_path: Path) -> None:
    assert read_options(tmp_path) == MelOptions()
    extractor = Gemma4AudioFeatureExtractor(feature_size=80, mel_floor=1e-4)
    config = {"feature_extractor": extractor.to_dict(), "audio_seq_length": 750}
    (tmp_path / "processor_config.json").write_text(json.dumps(config, default=float))

    assert read_options(tmp_path) == MelOptions(feature_size=80, mel_floor=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("preemphasis", 0.97, "preemphasis is 0.97; expected 0.0"),
        ("dither", 1e-4, "dither is 0.0001; expected 0.0"),
        ("hop_length_ms", 0, "hop_length_ms is 0; expected 1 to 1000"),
        ("feature_size", "128", "feature_size is '128'; expected a number"),
        ("feature_size", 10**5, "feature_size is 100000; expected 1 to 4096"),
    ],
)
def test_options_that_nothing_computes_are_refused(
    tmp_path: Path, name: str, value: object, problem: str
) -> None:
    extractor = {"mel_floor": 0.001, name: value}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor))

    with pytest.raises(ValueError, match=problem):
        read_options(tmp_path)
