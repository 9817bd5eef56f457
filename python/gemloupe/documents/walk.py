"""Which files some paths stand for, in an order that is always the same, and which they don't."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gemloupe.errors import missing_extra, quoted

MAX_FILES = 10_000
"""Entries of folders that are looked at; those after them are left out."""
MAX_DEPTH = 100
"""Folders in folders that are walked; deeper ones are left out."""
_MAX_IGNORE_BYTES = 1 << 20
_PAGES = re.compile(r"(.+)#page=(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class Found:
    """A file to read: where it is, and what it is called in the prompt."""

    path: Path
    name: str
    pages: tuple[int, int] | None = None
    """The first and the last page that are wanted, counted from 1."""


class LeftOut(NamedTuple):
    """A file, folder or page that is not in the prompt, and why."""

    name: str
    reason: str


def files(paths: Any) -> Iterator[Found | LeftOut]:
    """Yields what `paths` (one or several files and folders) stand for, in the order given.

    Folders are walked by name, depth first; hidden entries, those that a .gitignore names and
    symbolic links are left out, and of a file that comes twice the second. "a.pdf#page=3-5" is
    these pages of a PDF. FileNotFoundError for a path that does not exist.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    seen: set[tuple[int, int]] = set()
    budget = iter(range(MAX_FILES))
    for entry in given:
        if not isinstance(entry, (str, os.PathLike)):
            raise TypeError(f"paths has {quoted(entry)}; expected paths of files and folders")
        if not os.fspath(entry):  # Of a shell's empty variable; a Path would be this folder.
            raise ValueError('paths has an empty path; expected "." for the working folder')
        path, pages = _split_pages(Path(entry))
        if not path.exists():
            raise FileNotFoundError(f"{str(path)!r}: no such file or folder; check the path")
        found: Iterable[Found | LeftOut]
        if path.is_dir() and pages is not None:
            raise ValueError(f"{str(entry)!r}: a folder has no pages; expected a PDF before #page=")
        if path.is_dir():
            found = _walk(path, _ignored_above(path), budget)
        else:
            found = [Found(path, _name(path), pages)]
        for each in found:
            if isinstance(each, Found) and pages is None:
                try:
                    at = os.stat(each.path)
                except OSError as error:  # It was there a moment ago.
                    yield LeftOut(each.name, f"can't be read ({error.strerror})")
                    continue
                if (at.st_dev, at.st_ino) in seen:
                    continue
                seen.add((at.st_dev, at.st_ino))
            yield each


def _split_pages(path: Path) -> tuple[Path, tuple[int, int] | None]:
    match = _PAGES.fullmatch(str(path))
    if match is None or path.exists():
        return path, None
    first = int(match[2])
    last = int(match[3] or first)
    if not 1 <= first <= last:
        raise ValueError(f"{str(path)!r}: pages are {first} to {last}; expected such as #page=2-5")
    return Path(match[1]), (first, last)


def _name(path: Path) -> str:
    """A path as the prompt shows it: without ./ and without characters that break lines."""
    text = os.fsencode(os.path.normpath(path)).decode("utf-8", "replace")
    return "".join(c if c.isprintable() and c != '"' else "?" for c in text)


def _walk(
    folder: Path, rules: list[Rules], budget: Iterator[int], depth: int = 0
) -> Iterator[Found | LeftOut]:
    if depth > MAX_DEPTH:
        yield LeftOut(_name(folder) + "/", f"deeper than {MAX_DEPTH} folders")
        return
    rules = [*rules, *_rules_of(folder)]
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        yield LeftOut(_name(folder) + "/", f"can't be read ({error.strerror})")
        return
    for entry in entries:
        path = folder / entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        name = _name(path) + "/" * is_folder
        if next(budget, None) is None:
            yield LeftOut(name, f"comes after {MAX_FILES} entries, as does what follows it")
            return
        if entry.name.startswith("."):
            yield LeftOut(name, "hidden")
        elif entry.is_symlink():
            yield LeftOut(name, "a symbolic link")
        elif _is_ignored(path, is_folder, rules):
            yield LeftOut(name, "named in .gitignore")
        elif is_folder:
            yield from _walk(path, rules, budget, depth + 1)
        else:
            yield _file(entry, path, name)


def _file(entry: os.DirEntry[str], path: Path, name: str) -> Found | LeftOut:
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
    except OSError as error:  # Of a folder that may be listed, but not entered.
        return LeftOut(name, f"can't be read ({error.strerror})")
    return Found(path, name) if stat.S_ISREG(mode) else LeftOut(name, "no regular file")


class Rules(NamedTuple):
    """What the .gitignore of one folder says."""

    folder: Path
    spec: Any


def _rules_of(folder: Path) -> list[Rules]:
    path = folder / ".gitignore"
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_IGNORE_BYTES:
            return []
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    try:
        from pathspec import GitIgnoreSpec
    except ImportError:
        raise missing_extra("pathspec", f"Reading {path}", "documents") from None
    return [Rules(folder.absolute(), GitIgnoreSpec.from_lines(lines))]


def _ignored_above(folder: Path) -> list[Rules]:
    """The rules of the folders above, up to that of the repository; none outside of one."""
    rules: list[Rules] = []
    above = folder.absolute()
    while not (above / ".git").exists():
        if above == above.parent:
            return []
        above = above.parent
        rules = [*_rules_of(above), *rules]
    return rules


def _is_ignored(path: Path, is_folder: bool, rules: list[Rules]) -> bool:
    """The innermost .gitignore that says something decides."""
    for folder, spec in reversed(rules):
        relative = os.path.relpath(path.absolute(), folder) + "/" * is_folder
        said = spec.check_file(relative).include
        if said is not None:
            return bool(said)
    return False
