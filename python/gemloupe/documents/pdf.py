"""The pages of a PDF, as text or as pictures, read by a process that is bounded."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gemloupe.documents.text_file import Unreadable, open_regular
from gemloupe.errors import format_bytes, missing_extra

MAX_BYTES = 256 << 20
MAX_PAGES = 2000
MEMORY = 2 << 30
"""Bytes of address space of the process that reads a file."""
SECONDS = 60
"""Of computing, and twice as many in all, for one file."""
_MAX_LINE = 16 << 20
_MAX_PIXELS = 1 << 24
_LIBRARIES = {"text": "pypdf", "image": "pypdfium2"}
_WORKER = Path(__file__).with_name("pdf_worker.py")


@dataclass(frozen=True)
class Page:
    """One page: a text, or pixels uint8 [H, W, 3]; or why there is neither."""

    number: int
    text: str = ""
    pixels: np.ndarray | None = None
    problem: str | None = None


def is_pdf(path: Path) -> bool:
    """Whether a file begins as PDFs do; Unreadable for one that doesn't though it has their name,
    and for one of more than MAX_BYTES.
    """
    with open_regular(path) as file:
        head = file.read(1024)
        size = os.fstat(file.fileno()).st_size
    named = path.suffix.lower() == ".pdf"
    begins = head.startswith(b"%PDF-") or (named and b"%PDF-" in head)
    if begins and size > MAX_BYTES:
        raise Unreadable(f"too long: more than {format_bytes(MAX_BYTES)}")
    if named and not begins:
        raise Unreadable("no PDF, whatever its name says")
    return begins


def pages(
    path: Path, kind: str, wanted: tuple[int, int] | None = None, pixels: int = 0
) -> Iterator[Page]:
    """Yields a PDF's pages in order, `kind` "text" or "image" (of about `pixels` pixels).

    `wanted`: the first and last page. A page that can't be read has a `problem`; Unreadable for a
    file that can't, or that takes more than MEMORY or SECONDS. ImportError without the library.
    """
    library = _LIBRARIES[kind]
    if importlib.util.find_spec(library) is None:
        raise missing_extra(library, "Reading PDF files", "documents")
    first, last = wanted or (1, MAX_PAGES)
    if last - first >= MAX_PAGES:
        raise Unreadable(f"too long: pages {first} to {last}; choose up to {MAX_PAGES}")
    numbers = [first, last, pixels, MEMORY, SECONDS]
    process = subprocess.Popen(
        [sys.executable, str(_WORKER), kind, str(path.absolute()), *map(str, numbers)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(2 * SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        assert process.stdout is not None
        yield from _pages(process.stdout, first, last if wanted else None)
        code = process.wait()
        if late.is_set() or code in (-signal.SIGXCPU, -signal.SIGKILL):
            raise Unreadable(f"takes more than {SECONDS} s to read")
        if code:
            raise Unreadable(f"ends the program that reads it (code {code})")
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _pages(stream: IO[bytes], first: int, last: int | None) -> Iterator[Page]:
    """What the worker writes, which is not trusted to be well-formed."""
    while line := stream.readline(_MAX_LINE):
        try:
            said: dict[str, Any] = json.loads(line)
            if "pages" in said:
                _check_count(int(said["pages"]), first, last)
                continue
            number, problem = int(said["page"]), said.get("error")
            width, height = int(said.get("width", 0)), int(said.get("height", 0))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Unreadable("the program that reads it wrote nonsense") from None
        if problem is not None and number == 0:
            raise Unreadable(f"can't be read ({problem})")
        if problem is not None:
            yield Page(number, problem=f"can't be read ({problem})")
        elif "text" in said:
            yield Page(number, text=str(said["text"]))
        else:
            size = width * height
            data = stream.read(3 * size) if 0 < size <= _MAX_PIXELS else b""
            if not data or len(data) != 3 * size:
                raise Unreadable("its pages can't be drawn")
            yield Page(number, pixels=np.frombuffer(data, np.uint8).reshape(height, width, 3))


def _check_count(count: int, first: int, last: int | None) -> None:
    if first > count or (last or count) > count:
        raise Unreadable(f"has {count} pages")
    if last is None and count > MAX_PAGES:
        raise Unreadable(f"too long: {count} pages; choose up to {MAX_PAGES}: NAME#page=1-50")
