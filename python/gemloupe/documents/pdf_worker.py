"""A process of its own that reads one PDF: what a hostile file does ends with it.

python pdf_worker.py text|image FILE FIRST LAST PIXELS MEMORY SECONDS writes to stdout for each page
a line of JSON, {"page", "text"} or {"page", "width", "height"} before its RGB bytes, and one with
"error" where a page, or the whole file (page 0), can't be read. The first line has "pages".
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

_MAX_PAGE_TEXT = 1 << 20


def main(arguments: list[str]) -> None:
    kind, path = arguments[:2]
    first, last, pixels, memory, seconds = map(int, arguments[2:])
    _limit(memory, seconds)
    pages = _texts(path, first, last) if kind == "text" else _images(path, first, last, pixels)
    try:
        for line, data in pages:
            _write(line, data)
    except MemoryError:
        _write({"page": 0, "error": "needs too much memory"}, b"")
    except Exception as error:  # Parsers of broken files raise whatever comes.
        _write({"page": 0, "error": f"{type(error).__name__}: {error}"[:300]}, b"")


def _limit(memory: int, seconds: int) -> None:
    """The file can neither take more than this, nor write one."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _write(line: dict[str, Any], data: bytes) -> None:
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\n" + data)
    sys.stdout.buffer.flush()


def _texts(path: str, first: int, last: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    import pypdf

    reader = pypdf.PdfReader(path, strict=False)
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("needs a password")
    count = len(reader.pages)
    yield {"pages": count}, b""
    for number in range(first, min(last, count) + 1):
        try:
            text = reader.pages[number - 1].extract_text()
        except MemoryError:
            raise
        except Exception as error:
            yield {"page": number, "error": f"{type(error).__name__}: {error}"[:300]}, b""
            continue
        text = text.encode("utf-8", "replace").decode()  # Fonts may name lone surrogates.
        if len(text) > _MAX_PAGE_TEXT:
            yield {"page": number, "error": f"too long: {len(text)} characters"}, b""
        else:
            yield {"page": number, "text": text}, b""


def _images(path: str, first: int, last: int, pixels: int) -> Iterator[tuple[dict[str, Any], Any]]:
    import pypdfium2

    document = pypdfium2.PdfDocument(path)
    count = len(document)
    yield {"pages": count}, b""
    for number in range(first, min(last, count) + 1):
        try:
            page = document[number - 1]
            width, height = page.get_size()
            # Whoever reads it brings it to a grid of cells of about this many pixels.
            scale = (pixels / max(1.0, width * height)) ** 0.5
            if not 1 <= min(width, height) * scale <= max(width, height) * scale <= 1 << 14:
                raise ValueError(f"a page of {width:.0f} x {height:.0f} points")
            bitmap = page.render(scale=scale, rev_byteorder=True)
            yield {"page": number, "width": bitmap.width, "height": bitmap.height}, _rgb(bitmap)
            page.close()
        except MemoryError:
            raise
        except Exception as error:
            yield {"page": number, "error": f"{type(error).__name__}: {error}"[:300]}, b""


def _rgb(bitmap: Any) -> bytes:
    """A rendered page's rows, one after the other, in three colours."""
    pixels = memoryview(bitmap.buffer).cast("B")
    channels = bitmap.n_channels
    data = bytearray()
    for row in range(bitmap.height):
        begin = row * bitmap.stride
        line = bytes(pixels[begin : begin + bitmap.width * channels])
        rgb = bytearray(bitmap.width * 3)
        for colour in range(3):  # Of grey, the one; of RGBX, the first three.
            rgb[colour::3] = line[min(colour, channels - 1) :: channels]
        data += rgb
    return bytes(data)


if __name__ == "__main__":
    # This folder's names are none of the libraries'.
    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != folder]
    main(sys.argv[1:])
