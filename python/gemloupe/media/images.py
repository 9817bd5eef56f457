"""Images as callers pass them to patches as models read them.

The rules are those of transformers' Gemma 4 image processor on Pillow: RGB, transparency on white,
the largest size in whole cells that keeps the budget, bicubic, values in [0, 1].
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.errors import missing_extra, one_of, quoted
from gemloupe.media.spans import Spans

if TYPE_CHECKING:
    from PIL import Image as PilImage

BUDGETS = (70, 140, 280, 560, 1120)
"""Most soft tokens of one image that models were trained on."""
DEFAULT_BUDGET = 280
MAX_PIXELS = 1 << 26
"""Of a picture that is decoded: 8192 x 8192, 200 MB as RGB. Larger files are refused unread."""
_MAX_BYTES = 1 << 30
# Raster formats that Pillow decodes by itself; it hands others, such as EPS, to other programs.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "ICO", "TGA")


@dataclass(frozen=True, eq=False)
class Image:
    """A picture at the size at which a model reads it."""

    pixels: np.ndarray = field(repr=False)
    """uint8 [H, W, 3], H and W multiples of `cell`."""
    width: int
    """Of the caller's picture, in pixels; so `height`."""
    height: int
    cell: int
    """Pixels of a soft token's side, in `pixels`."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of soft tokens."""
        return self.pixels.shape[0] // self.cell, self.pixels.shape[1] // self.cell

    @property
    def soft_tokens(self) -> int:
        """How many soft tokens it has; they go row by row."""
        rows, columns = self.grid
        return rows * columns

    @property
    def boxes(self) -> np.ndarray:
        """float64 [n, 4]: left, top, right, bottom of each soft token, in the caller's pixels."""
        rows, columns = self.grid
        y, x = np.divmod(np.arange(rows * columns), columns)
        wide, high = self.width / columns, self.height / rows
        return np.stack([x * wide, y * high, (x + 1) * wide, (y + 1) * high], axis=1)

    @property
    def spans(self) -> Spans:
        """What each soft token stands for: its box."""
        return Spans(boxes=self.boxes)

    def patches(self, side: int) -> np.ndarray:
        """float32 [n, side · side · 3] in [0, 1]: squares of `side` pixels, row by row; inside one
        row by row, three colours a pixel.
        """
        rows, columns = self.pixels.shape[0] // side, self.pixels.shape[1] // side
        squares = self.pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
        return _VALUES[squares.reshape(rows * columns, side * side * 3)]


# 1/255 in float64, then rounded, as transformers does.
_VALUES = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)


def read_image(value: Any, name: str, cell: int, max_soft_tokens: int = DEFAULT_BUDGET) -> Image:
    """Reads a picture and brings it to the size that the budget allows.

    `value`: a path, bytes of a file, a data URL, a PIL image, or an array uint8 [H, W], [H, W, 3]
    or [H, W, 4]. ValueError, beginning with `name`, for what is none; ImportError without Pillow.
    """
    check_budget(max_soft_tokens, name)
    picture = open_picture(value, name)
    return fitted(picture, name, cell, max_soft_tokens)


def check_budget(max_soft_tokens: Any, name: str) -> None:
    """ValueError unless it is one of BUDGETS."""
    if max_soft_tokens not in BUDGETS or isinstance(max_soft_tokens, bool):
        raise ValueError(
            f"{name}: max_soft_tokens is {quoted(max_soft_tokens)}; expected one of "
            + ", ".join(str(budget) for budget in BUDGETS)
        )


def target_size(height: int, width: int, cell: int, max_soft_tokens: int) -> tuple[int, int]:
    """Height and width, multiples of `cell`, of the largest picture of about the same shape that
    has at most `max_soft_tokens` cells. ValueError where there is none.
    """
    pixels = max_soft_tokens * cell**2
    factor = math.sqrt(pixels / (height * width))
    high = math.floor(factor * height / cell) * cell
    wide = math.floor(factor * width / cell) * cell
    # A side that is too thin for a cell gets one.
    if high == 0 and wide > 0:
        high, wide = cell, min(math.floor(width / height), max_soft_tokens) * cell
    elif wide == 0 and high > 0:
        high, wide = min(math.floor(height / width), max_soft_tokens) * cell, cell
    if not 0 < high * wide <= pixels:
        raise ValueError(f"{width} x {height} pixels fit no grid of {max_soft_tokens} soft tokens")
    return high, wide


def fitted(picture: PilImage.Image, name: str, cell: int, max_soft_tokens: int) -> Image:
    """Brings an RGB picture to the size that the budget allows."""
    from PIL import Image as PilImage

    width, height = picture.size
    try:
        high, wide = target_size(height, width, cell, max_soft_tokens)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; crop the picture") from None
    if (high, wide) != (height, width):
        picture = picture.resize((wide, high), resample=PilImage.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    pixels.setflags(write=False)
    return Image(pixels, width, height, cell)


def open_picture(value: Any, name: str) -> PilImage.Image:
    """Returns a caller's picture as a PIL image in RGB; see `read_image`."""
    try:
        from PIL import Image as PilImage
    except ImportError:
        raise missing_extra("PIL", "Reading images", "media") from None
    if isinstance(value, PilImage.Image):
        _check_size(value.size, name)
        return _decoded(lambda: _rgb(value), name, "PIL image")
    if isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview)):
        return _open_bytes(file_bytes(value, name), name)
    if hasattr(value, "__array__"):
        return _from_array(np.asarray(value), name)
    raise ValueError(
        f"{name} is a {type(value).__name__}; expected a path, bytes, a data URL, a PIL image or "
        "an array uint8 [height, width, 3]"
    )


def file_bytes(value: Any, name: str) -> bytes:
    """Returns the bytes that a path, a data URL or bytes stand for.

    FileNotFoundError or ValueError, beginning with `name`, where there are none.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    text = os.fspath(value)
    if isinstance(text, str) and text.startswith("data:"):
        return _data_url(text, name)
    return _read_file(text, name)


def _read_file(path: Any, name: str) -> bytes:
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        raise ValueError(
            f"{name} is the address {quoted(path)}, but nothing is downloaded; pass a path or bytes"
        )
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise ValueError(f"{name}: {quoted(path)} is larger than 1 GiB; expected less")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: {quoted(path)}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {quoted(path)} can't be read ({error})") from None


def _data_url(url: str, name: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(
            f"{name} is the data URL {quoted(head)}; expected one such as data:image/png;base64,…"
        )
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: the data URL is no base64 ({error})") from None


def _open_bytes(data: bytes, name: str) -> PilImage.Image:
    from PIL import Image as PilImage
    from PIL import ImageOps, UnidentifiedImageError

    if not data:
        raise ValueError(f"{name} is empty (0 bytes); expected an image file")
    PilImage.init()
    formats = [known for known in _FORMATS if known in PilImage.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PilImage.DecompressionBombWarning)
            picture = PilImage.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} is no image in a format that is read ({one_of(formats)}): it begins with "
            f"{data[:8]!r}"
        ) from None
    except PilImage.DecompressionBombError as error:
        raise ValueError(f"{name}: {error} Expected at most {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        raise ValueError(f"{name} is a broken image ({error})") from None
    with picture:
        _check_size(picture.size, name)
        return _decoded(lambda: _rgb(ImageOps.exif_transpose(picture)), name, picture.format)


def _decoded(decode: Any, name: str, kind: str | None) -> PilImage.Image:
    """Decoders of broken files raise whatever comes: OSError, SyntaxError, struct.error, …"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decoded: PilImage.Image = decode()
            return decoded
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} is a broken {kind} image ({error})") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has {width} x {height} pixels; expected at least one")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels, {width * height:,} in all; expected at most "
            f"{MAX_PIXELS:,}: make it smaller, models see {max(BUDGETS)} cells of 48 x 48"
        )


def _rgb(picture: PilImage.Image) -> PilImage.Image:
    from PIL import Image as PilImage

    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        layer = picture.convert("RGBA")
        white = PilImage.new("RGBA", layer.size, (255, 255, 255, 255))
        return PilImage.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def _from_array(array: np.ndarray, name: str) -> PilImage.Image:
    from PIL import Image as PilImage

    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_picture:
        raise ValueError(
            f"{name} is an array of {array.dtype} {list(array.shape)}; expected uint8 "
            "[height, width], [height, width, 3] or [height, width, 4]"
        )
    _check_size((array.shape[1], array.shape[0]), name)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _rgb(PilImage.fromarray(np.ascontiguousarray(array)))
