"""Texts that users see, kept in tests/snapshots: a changed wording shows in the diff.

GEMLOUPE_UPDATE_SNAPSHOTS=1 writes what the tests see instead of comparing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_FOLDER = Path(__file__).parent / "snapshots"
_HEADING = "== "


def assert_is_snapshot(group: str, name: str, text: str, *, folder: Path | None = None) -> None:
    """Compares `text`, with <folder> for `folder`, to section `name` of snapshots/{group}.txt."""
    if folder is not None:
        text = text.replace(str(folder), "<folder>")
    path = _FOLDER / f"{group}.txt"
    sections = _read(path)
    if os.environ.get("GEMLOUPE_UPDATE_SNAPSHOTS") == "1":
        sections[name] = text
        _FOLDER.mkdir(exist_ok=True)
        parts = [f"{_HEADING}{key}\n{value}\n" for key, value in sorted(sections.items())]
        path.write_text("\n".join(parts), encoding="utf-8")
    assert name in sections, f"{path} has no section {name!r}; see this module's docstring"
    assert text == sections[name]


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    parts = re.split(rf"^{_HEADING}(.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: body.rstrip("\n") for name, body in zip(parts[1::2], parts[2::2], strict=True)}
