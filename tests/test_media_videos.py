"""Videos become frames at times, and their boxes and attention are drawn."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import matplotlib
import numpy as np
import pytest
from PIL import Image as PilImage

import gemloupe as gl
from gemloupe.media import videos
from gemloupe.media.images import read_image
from gemloupe.media.videos import VideoSource, read_video, sampled
from tiny_models import save_tiny_tokenizer

matplotlib.use("Agg")


def _frames(count: int, size: tuple[int, int] = (48, 32)) -> np.ndarray:
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (1, size[1] // 8, size[0] // 8, 3), np.uint8)
    frames = np.repeat(np.repeat(np.repeat(still, 8, axis=1), 8, axis=2), count, axis=0)
    frames[:, :, :, 0] = np.linspace(0, 255, count).astype(np.uint8)[:, None, None]
    return frames


def _file(count: int, fps: int = 10, kind: str = "matroska", codec: str = "ffv1") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        if codec != "ffv1":
            stream.pix_fmt = "yuv420p"
        for index, frame in enumerate(_frames(count)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_frames_are_sampled_at_equal_distances() -> None:
    assert sampled(100, 32) == [i * 100 // 32 for i in range(32)]
    assert sampled(5, 32) == [0, 1, 2, 3, 4] and sampled(3, 1) == [0]
    video = read_video(_frames(96), "videos[0]", 48)
    assert len(video.frames) == 32 and video.times[1] == 3 / 24 and video.total_frames == 96
    late = read_video(gl.video(list(_frames(4)), fps=1 / 61), "videos[0]", 48)
    assert late.labels == ("00:00", "01:01", "02:02", "03:03")
    small = read_video(gl.video(_frames(9), num_frames=3, max_soft_tokens=140), "x", 48)
    assert len(small.frames) == 3 and 70 < small.frames[0].soft_tokens <= 140
    assert np.array_equal(small.frames[1].pixels, read_image(_frames(9)[3], "x", 48, 140).pixels)


@pytest.mark.parametrize("kind", ["matroska", "avi"])
def test_a_file_gives_the_frames_and_times_that_it_holds(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "clip.video"
    path.write_bytes(_file(40, fps=10, kind=kind))
    for value in (path, path.read_bytes()):
        video = read_video(gl.video(value, num_frames=4), "videos[0]", 48)
        assert (video.total_frames, video.fps, video.times) == (40, 10.0, (0.0, 1.0, 2.0, 3.0))
        expected = [read_image(_frames(40)[i], "x", 48, 70).pixels for i in (0, 10, 20, 30)]
        for frame, pixels in zip(video.frames, expected, strict=True):
            assert np.array_equal(frame.pixels, pixels)


def _without_frames(codec: str) -> bytes:
    """A file with sound alone, or with a stream of pictures that has none."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        if codec == "ffv1":
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
            container.start_encoding()
        else:
            stream = container.add_stream(codec, rate=16_000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), "s16", "mono")
            sound.sample_rate = 16_000
            container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return buffer.getvalue()


def _png() -> bytes:
    buffer = io.BytesIO()
    PilImage.new("RGB", (48, 32)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"", "is no video that is read"),
        (_png(), "is no video that is read"),
        (_without_frames("pcm_s16le"), "has no pictures, only sound; expected a video"),
        (_without_frames("ffv1"), "is no video that is read|has no frames"),
        (_file(8).replace(b"V_FFV1", b"V_ZZZZ"), "with a codec that is not known here"),
        (
            _file(8, codec="mpeg4", kind="avi").replace(b"FMP4", b"ZZZZ"),
            "with a codec that is not known here",
        ),
        ([], "has no frames; expected at least one"),
        (np.zeros((0, 8, 8, 3), np.uint8), "has no frames"),
        (b"no video", "is no video that is read"),
        (_file(8)[:300], "is no video that is read|is cut short"),
        (_file(40, codec="mpeg4", kind="avi")[:-3000], "cut short|no video that is read"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\n/etc/passwd\n", "is no video that is read"),
        ("http://example.com/a.mp4", "nothing is downloaded"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "frames of 2 sizes"),
        ([np.zeros((8, 8, 3))], "frame 0 is an array of float64"),
        (gl.video(_frames(2), num_frames=0), "num_frames is 0; expected 1 to 1024"),
        (gl.video(_frames(2), fps=0.0), "fps is 0.0|expected"),
        (gl.video(_frames(2), max_soft_tokens=71), "max_soft_tokens is 71; expected one of"),
        (3, "is a int; expected a path, bytes, a list of frames"),
        (VideoSource(_file(8), most_pixels=12_000), "8 frames of 48 x 32 pixels, 12,288 in all"),
    ],
)
def test_wrong_videos_are_refused_in_words(value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^videos\[0\].*({expected})"):
        read_video(value, "videos[0]", 48)


def test_large_frames_are_refused_and_kept_ones_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _file(40)
    tracemalloc.start()
    read_video(data, "videos[0]", 2)  # 70 cells of 2 x 2 pixels.
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
    monkeypatch.setattr(videos, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"frames of 48 x 32 pixels; expected at most 1,000"):
        read_video(data, "videos[0]", 48)


@pytest.fixture
def model(tiny: Callable) -> gl.Model:
    vision = {"position_embedding_size": 64}
    folder = tiny("26b", towers="tiny", media_ids=True, vision=vision)[1]
    save_tiny_tokenizer(folder)
    return gl.load(folder, dtype="float32")


def test_each_frame_stands_after_its_time_and_sees_itself_whole(model: gl.Model) -> None:
    video = gl.video(_frames(8), fps=2, num_frames=2)
    prompt = model.prepare("see <|video|> now", videos=video)
    count = prompt.media[0].content.lengths[0]
    frame = "<|image>" + "<|video|>" * count + "<image|>"
    assert prompt.text == f"<bos>see 00:00 {frame} 00:02 {frame} now"
    medium = prompt.media[0]
    assert medium.kind == "video" and len(medium.blocks) == 2
    run = model.run(prompt, capture=["embed", "layers.0.attn.pattern", "vision.soft_tokens"])
    singles = [model.encode_image(picture, 70) for picture in (_frames(8)[0], _frames(8)[4])]
    assert np.array_equal(run["embed"][medium.positions], np.concatenate(singles))
    assert np.array_equal(run["vision.soft_tokens"], np.concatenate(singles))
    window = model.config.text.layers[0].window
    first, last = medium.blocks[0][0], medium.blocks[0][-1]
    pattern = run["layers.0.attn.pattern"][0]
    assert (pattern[first, first : last + 1] > 0).all()
    assert not pattern[first, last + 1 :].any()
    assert not pattern[last, : last - window + 1].any()
    again = model.run("see <|video|> now", videos=model.encode_video(video))
    assert np.array_equal(again.logits, run.logits)


def test_boxes_of_a_reply_are_read_and_drawn(tmp_path: Path) -> None:
    reply = """Here:
```json
[{"box_2d": [100, 250, 500, 750], "label": "cat"}, {"box_2d": [0, 0, 10.5, 1000]}, {"box_2d": [1"""
    boxes = gl.parse_boxes(reply)
    assert boxes == [gl.Box(100, 250, 500, 750, "cat"), gl.Box(0, 0, 10.5, 1000)]
    assert boxes[0].pixels(200, 100) == (50.0, 10.0, 150.0, 50.0)
    assert gl.parse_boxes("no boxes {here}") == []
    nested = gl.parse_boxes('{"found": [{"box_2d": [1, 2, 3, 4]}]}')
    assert nested == [gl.Box(1, 2, 3, 4)]
    for wrong in ("[1, 2, 3]", "[5, 0, 1, 9]", "[0, 0, 2000, 5]", '["a", 1, 2, 3]', "7"):
        with pytest.raises(ValueError, match="box_2d is .*; expected .top, left, bottom, right"):
            gl.parse_boxes(f'{{"box_2d": {wrong}}}')
    picture = PilImage.new("RGB", (200, 100), "white")
    ax = gl.plot.boxes(picture, reply)
    patch = ax.patches[0]
    assert (patch.get_x(), patch.get_y()) == (50, 10) and len(ax.patches) == 2
    assert [text.get_text() for text in ax.texts] == ["cat"]
    with pytest.raises(ValueError, match='no "box_2d" in the reply'):
        gl.plot.boxes(picture, "none")


def test_attention_is_painted_over_its_picture(model: gl.Model) -> None:
    picture = PilImage.fromarray(_frames(1, (96, 48))[0])
    name = "layers.5.attn.pattern"
    run = model.run("a <|image|> b", images=picture, max_soft_tokens=70, capture=name)
    ax = gl.plot.image_attention(run, 5, 1)
    under, over = ax.images
    assert under.get_extent() == [0, 96, 48, 0] == over.get_extent()
    weights = run[name][1, -1, run.media[0].positions]
    assert np.array_equal(np.asarray(over.get_array()).ravel(), weights)
    assert ax.get_title().startswith("layer 5, head 1: “")
    assert ax.get_title().endswith(f"” gives this picture {weights.sum():.0%}")
    for arguments, expected in (
        ({"head": 9}, "head is 9; expected 0 to 5"),
        ({"head": 0, "token": 999}, "token is 999"),
        ({"head": 0, "image": 1}, "image is 1, but the prompt has 1 pictures"),
    ):
        with pytest.raises(ValueError, match=expected):
            gl.plot.image_attention(run, 5, **arguments)
