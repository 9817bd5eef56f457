"""Positions of a prompt know what they stand for; attention to sounds is drawn over them."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest

import gemloupe as gl
from gemloupe.media import Place
from gemloupe.media.mel import log_mel
from tiny_models import save_tiny_tokenizer

matplotlib.use("Agg")

NAME = "layers.3.attn.pattern"  # A full layer.


@pytest.fixture(scope="module")
def model(tiny: Callable) -> gl.Model:
    vision = {"position_embedding_size": 64}
    folder = tiny("e2b", towers="tiny", media_ids=True, vision=vision)[1]
    save_tiny_tokenizer(folder)
    return gl.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32)


def _picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def test_every_position_of_a_prompt_tells_what_it_stands_for(
    model: gl.Model, clip: np.ndarray
) -> None:
    frames = np.stack([_picture(40, 80)] * 8)
    run = model.run(
        "a <|image|> b <|audio|> c <|video|>",
        images=_picture(60, 90), max_soft_tokens=70, audio=clip,
        videos=gl.video(frames, fps=2, num_frames=2), logits=None,
    )  # fmt: skip

    places = run.media.places()

    media = np.concatenate([run.prompt.positions(kind) for kind in ("image", "audio", "video")])
    assert [place.position for place in places] == sorted(media.tolist())
    assert [run.media.at(place.position) for place in places] == places
    assert run.media.at(0) is None and run.media.at(len(run.prompt)) is None
    image, sound, video = run.media
    rows, columns = image.content.source.grid
    first, last = run.media.at(image.positions[0]), run.media.at(image.positions[-1])
    box = (0.0, 0.0, 90 / columns, 60 / rows)
    assert first == Place(int(image.positions[0]), "image", 0, 0, box, None, None)
    assert last is not None and last.box is not None and last.box[2:] == pytest.approx((90, 60))
    third = run.media.at(sound.positions[3])
    assert third is not None and third.frames == (12, 15) and third.box is None
    assert third.seconds == pytest.approx((0.12, 0.16))
    shown = run.media.at(video.blocks[1][0])
    assert shown is not None and shown.token == len(video.blocks[0])
    assert shown.frames == (4, 4) and shown.seconds == (2.0, 2.0)
    assert shown.box is not None and shown.box[:2] == (0, 0) and 0 < shown.box[2] < 80
    assert len(run.media.table()) == len(places)
    assert run.media.table()["seconds"][len(image.positions) + 3] == "0.12 0.16"
    assert pickle.loads(pickle.dumps(run.prompt)).media[2].spans.frames[-1].tolist() == [4, 4]


def test_soft_tokens_of_unknown_origin_stand_for_a_kind_alone(model: gl.Model) -> None:
    tokens = np.asarray(model.encode_image(_picture(60, 90), 70))
    run = model.run("<|image|>", images=tokens, logits=None)
    position = int(run.media[0].positions[0])
    assert run.media.at(position) == Place(position, "image", 0, 0, None, None, None)


def test_attention_is_painted_over_the_spectrogram(model: gl.Model, clip: np.ndarray) -> None:
    run = model.run("a <|audio|><|audio|> b", audio=[clip[:5000], clip], capture=NAME)

    ax = gl.plot.audio_attention(run, 3, 1, audio=1)

    under, over = ax.images
    mel = log_mel(clip)
    np.testing.assert_array_equal(under.get_array(), mel.T)
    assert under.get_extent() == [0, pytest.approx(len(mel) / 100), 0, 128]
    weights = run[NAME][1, -1, run.media[1].positions]
    np.testing.assert_array_equal(np.asarray(over.get_array())[0], weights)
    assert over.get_extent()[1] == pytest.approx(0.04 * len(weights))
    assert ax.get_title().startswith("layer 3, head 1: “")
    assert ax.get_title().endswith(f"” gives this sound {weights.sum():.0%}")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("seconds", "Hz (mel scale)")
    # 1000 Hz is 1000 mel of 2840: the band whose peak lies there is the 45th.
    ticks = dict(zip([t.get_text() for t in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    tone = log_mel(np.sin(np.arange(16_000) * 2 * np.pi / 16).astype(np.float32))
    assert int(ticks["1000"]) == int(tone.mean(0).argmax()) == 44


def test_a_pattern_of_some_positions_is_read_at_its_own(model: gl.Model, clip: np.ndarray) -> None:
    text = "a <|audio|> b c"
    whole = model.run(text, audio=clip, capture=NAME)
    some = model.run(text, audio=clip, capture={NAME: gl.at([-2])})
    expected = np.asarray(gl.plot.audio_attention(whole, 3, 0, token=-2).images[1].get_array())
    got = np.asarray(gl.plot.audio_attention(some, 3, 0, token=-2).images[1].get_array())
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="token is .*, but 'layers.3.attn.pattern' was captured"):
        gl.plot.audio_attention(some, 3, 0)


def test_what_can_not_be_painted_is_said(model: gl.Model, clip: np.ndarray) -> None:
    run = model.run("<|audio|>", audio=clip, capture=NAME)
    with pytest.raises(KeyError, match="was not captured; run with capture='layers.1.attn.patt"):
        gl.plot.audio_attention(run, 1, 0)
    for arguments, expected in (
        ({"head": 9}, "head is 9; expected 0 to"),
        ({"head": 0, "token": 999}, "token is 999"),
        ({"head": 0, "audio": 1}, "audio is 1, but the prompt has 1 sounds"),
    ):
        with pytest.raises(ValueError, match=expected):
            gl.plot.audio_attention(run, 3, **arguments)
    unknown = model.run("<|audio|>", audio=np.asarray(model.encode_audio(clip)), capture=NAME)
    with pytest.raises(ValueError, match="soft tokens of an unknown sound; pass the sound"):
        gl.plot.audio_attention(unknown, 3, 0)
    silent = model.run("a", capture=NAME)
    with pytest.raises(ValueError, match="audio is 0, but the prompt has 0 sounds"):
        gl.plot.audio_attention(silent, 3, 0)
