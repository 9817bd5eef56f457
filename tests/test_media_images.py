"""Pictures in every form that callers have them in, and files that are none."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from gemloupe.media import images
from gemloupe.media.images import default_budget, read_image, target_size


def _array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def _file(kind: str = "PNG", picture: PilImage.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture or PilImage.fromarray(_array())).save(buffer, kind, **options)
    return buffer.getvalue()


def _read(value: Any, budget: int = 70) -> images.Image:
    return read_image(value, "images[0]", 48, budget)


def test_one_picture_in_every_form_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "wrong_name.jpg"
    path.write_bytes(_file())
    url = "data:image/png;base64," + base64.b64encode(_file()).decode()
    forms = [
        path, str(path), _file(), bytearray(_file()), memoryview(_file()), url,
        PilImage.open(path), _array(), np.dstack([_array(), np.full((60, 90), 255, np.uint8)]),
    ]  # fmt: skip
    expected = _read(_array()).pixels
    assert all(np.array_equal(_read(form).pixels, expected) for form in forms)
    assert not expected.flags.writeable
    gray = _read(_array()[:, :, 0])
    assert np.array_equal(gray.pixels, _read(np.repeat(_array()[:, :, :1], 3, axis=2)).pixels)


def test_files_are_turned_upright_and_laid_on_white() -> None:
    exif = PilImage.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = _read(_file("JPEG", exif=exif, quality=95))
    assert (image.width, image.height) == (60, 90)
    clear = PilImage.new("RGBA", (50, 50), (200, 0, 0, 0))
    assert (_read(_file(picture=clear)).pixels == 255).all()


def test_soft_tokens_know_their_pixels() -> None:
    image = read_image(np.zeros((100, 200, 3), np.uint8), "x", 48, 70)
    rows, columns = image.grid
    assert image.soft_tokens == rows * columns == len(image.boxes) <= 70
    wide, high = 200 / columns, 100 / rows
    assert image.boxes[0] == pytest.approx([0, 0, wide, high])
    assert image.boxes[columns] == pytest.approx([0, high, wide, 2 * high])
    assert image.boxes[-1, 2:] == pytest.approx([200, 100])


@pytest.mark.parametrize("shape", [(1, 1), (1, 280), (5000, 3), (480, 640), (8192, 8192)])
def test_every_shape_fills_its_budget_and_no_more(shape: tuple[int, int]) -> None:
    for budget in images.BUDGETS:
        height, width = target_size(*shape, 48, budget)
        cells = height * width // 48**2
        assert 0 < cells <= budget and height % 48 == width % 48 == 0
        assert cells > budget / 2 or min(height, width) == 48


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (
            b"hello, not a picture",
            "is no image in a format that is read .*it begins with b'hello, n'",
        ),
        (_file()[:200], "is a broken PNG image"),
        (_file("JPEG")[:-500], "is a broken JPEG image"),
        (_file("JPEG")[:500], "is a broken image"),
        (_file("GIF")[:900], "is a broken GIF image"),
        (_bomb(40_000, 40_000), r"1600000000 pixels.* Expected at most 67,108,864 pixels"),
        (_bomb(9_000, 9_000), "has 9000 x 9000 pixels, 81,000,000 in all; expected at most 67"),
        (_bomb(0, 10), "is (a broken|no) image"),
        (np.zeros((0, 10, 3), np.uint8), "has 10 x 0 pixels; expected at least one"),
        (np.zeros((10, 10, 3)), r"an array of float64 \[10, 10, 3\]; expected uint8"),
        (np.zeros((3, 10, 10), np.uint8), r"an array of uint8 \[3, 10, 10\]; expected uint8"),
        ("data:image/png,abc", "the data URL 'data:image/png'; expected one such as"),
        ("data:image/png;base64,a", "the data URL is no base64"),
        ("https://example.com/a.png", "nothing is downloaded; pass a path or bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is no image in a format that is read"),
        (3, "is a int; expected a path, bytes"),
        ("/", "can't be read"),
    ],
)
def test_hostile_and_wrong_pictures_are_refused_in_words(value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^images\[0\].*{expected}"):
        _read(value)


def test_a_missing_file_and_a_wrong_budget_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"images\[0\]: '.*cat.png': no such file"):
        _read(tmp_path / "cat.png")
    with pytest.raises(ValueError, match="max_soft_tokens is 100; expected one of 70, 140, 280"):
        _read(_array(), 100)


def test_a_picture_just_below_the_limit_of_pixels_is_read() -> None:
    wide = PilImage.new("L", (images.MAX_PIXELS // 64, 64))
    assert _read(wide).soft_tokens <= 70
    with pytest.raises(ValueError, match="expected at most 67,108,864"):
        _read(PilImage.new("L", (images.MAX_PIXELS // 64 + 1, 64)))


@pytest.mark.parametrize(
    ("processor", "budget"),
    [
        (None, 280),
        ("{}", 280),
        ('{"image_processor": {"max_soft_tokens": 70}}', 70),
        ('{"feature_extractor": {}, "image_processor": {"patch_size": 16}}', 280),
    ],
)
def test_the_default_budget_is_what_the_checkpoint_names(
    tmp_path: Path, processor: str | None, budget: int
) -> None:
    if processor is not None:
        (tmp_path / "processor_config.json").write_text(processor)
    assert default_budget(tmp_path) == budget


def test_a_default_budget_that_there_is_not_is_refused(tmp_path: Path) -> None:
    text = '{"image_processor": {"max_soft_tokens": 100}}'
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(ValueError, match="processor_config.json: image_processor: max_soft_tokens"):
        default_budget(tmp_path)
