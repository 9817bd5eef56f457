"""The text of a file that may be anything."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path
from typing import BinaryIO

from gemloupe.errors import format_bytes

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Unreadable(Exception):
    """Why a file or page can't stand in a prompt, in a few words."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file. Unreadable where it is none, or may not be read."""
    try:
        # A pipe in the file's place must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"can't be read ({error.strerror})") from None
    file = open(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise Unreadable("no regular file")
    return file


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Unreadable where there are none, or more than `most`."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Unreadable(f"too long: more than {format_bytes(most)}")
    if not data:
        raise Unreadable("empty")
    return data


def decoded(data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 with a byte order mark. Unreadable for other bytes."""
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8")
    if encoding != "utf-16" and b"\0" in data:
        raise Unreadable("binary")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"no UTF-8 text (byte {error.start})") from None
    if "\0" in text:  # UTF-32 begins as UTF-16 does.
        raise Unreadable("binary")
    if not text.strip():
        raise Unreadable("empty")
    return text
