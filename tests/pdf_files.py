"""Small PDF files, written by hand."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_pdf(path: Path, texts: Sequence[str], *, resources: str = "") -> Path:
    """A page of 300 x 200 points for each text, in Helvetica; "" is a page without any."""
    contents = []
    for text in texts:
        lines = " ".join(f"({line}) Tj T*" for line in text.split("\n") if line)
        contents.append(f"BT /F1 18 Tf 20 TL 20 160 Td {lines} ET".encode() if text else b"")
    return write_pages(path, contents, {}, resources)


def write_pages(
    path: Path, contents: Sequence[bytes], more: Mapping[int, bytes], resources: str = ""
) -> Path:
    """A page for each content stream; `more` are objects by number, from 100 on."""
    count = len(contents)
    kids = " ".join(f"{10 + 2 * i} 0 R" for i in range(count))
    objects = {
        1: b"<< /Type /Catalog /Pages 2 0 R >>",
        2: f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode(),
        3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    }
    for i, content in enumerate(contents):
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents {11 + 2 * i} 0 R "
        page += f"/Resources << /Font << /F1 3 0 R >> {resources} >> >>"
        objects[10 + 2 * i] = page.encode()
        objects[11 + 2 * i] = stream(content)
    data = b"%PDF-1.4\n"
    offsets = {}
    for number, body in {**objects, **more}.items():
        offsets[number] = len(data)
        data += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    begin = len(data)
    data += b"xref\n0 1\n0000000000 65535 f \n"
    for number, offset in offsets.items():
        data += f"{number} 1\n{offset:010d} 00000 n \n".encode()
    size = max(offsets) + 1
    data += f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{begin}\n%%EOF\n".encode()
    path.write_bytes(data)
    return path


def stream(content: bytes, dictionary: str = "", *, packed: bool = False) -> bytes:
    """A stream object's body."""
    if packed:
        content, dictionary = zlib.compress(content, 9), dictionary + " /Filter /FlateDecode"
    head = f"<< /Length {len(content)} {dictionary} >>\nstream\n".encode()
    return head + content + b"\nendstream"


def nested_forms(depth: int, fan_out: int) -> dict[int, bytes]:
    """Forms of which each draws the next `fan_out` times: a page that never ends."""
    forms = {}
    for level in range(depth):
        below = f"/Resources << /XObject << /X {101 + level} 0 R >> >>" * (level < depth - 1)
        draws = b"/X Do " * fan_out if level < depth - 1 else b"0 0 1 1 re f"
        kind = f"/Type /XObject /Subtype /Form /BBox [0 0 300 200] {below}"
        forms[100 + level] = stream(draws, kind)
    return forms
