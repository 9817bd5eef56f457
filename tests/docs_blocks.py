"""The code in `python/gemloupe/docs`, which tests and hand-run checks execute."""

from __future__ import annotations

import linecache
import re
from importlib import resources
from pathlib import Path
from typing import Any

DEMO = Path(str(resources.files("gemloupe"))) / "demo" / "edge"


def blocks(page: str, kind: str) -> list[str]:
    """The code of a page's fenced blocks whose info string is `kind`, such as "python theirs"."""
    text = (resources.files("gemloupe") / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{re.escape(kind)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def execute(page: str, kind: str, **names: Any) -> dict[str, Any]:
    """Runs the blocks in order in one namespace, which begins with `names`, and returns it."""
    for number, code in enumerate(blocks(page, kind), 1):
        name = f"{page}.md, {kind} block {number}"
        # Tracebacks, and nnsight, read the source from here.
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        exec(compile(code, name, "exec"), names)
    return names
