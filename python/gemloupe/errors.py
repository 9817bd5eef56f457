"""Parts of error texts: what was got, what was expected, and what to do.

Every message that a user can see says what is wrong, where, what was got and what was expected,
and ends with a sentence that tells what to do. The functions here keep these parts alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MAX_LISTED = 10
_MAX_QUOTED = 80
_MAX_COMPARED = 200


def quoted(value: object) -> str:
    """Returns `repr(value)`, cut in the middle where it is longer than 80 characters.

    Names in files from strangers may be megabytes long or hold control characters.
    """
    text = repr(value)
    if len(text) <= _MAX_QUOTED:
        return text
    return f"{text[:50]} … {text[-20:]}"


def close_matches(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Returns up to `count` candidates that resemble `name`, the closest first, in any case."""
    if len(name) > _MAX_COMPARED:  # The time grows with the square of the length.
        return []
    by_lower: dict[str, str] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), candidate)
    return [by_lower[low] for low in difflib.get_close_matches(name.lower(), by_lower, count, 0.6)]


def did_you_mean(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Returns "Did you mean 'a' or 'b'?", or "" where nothing resembles `name`."""
    matches = close_matches(name, candidates, count)
    return f"Did you mean {one_of(matches)}?" if matches else ""


def one_of(names: Sequence[str]) -> str:
    """Returns "'a', 'b' or 'c'"."""
    texts = [quoted(name) for name in names]
    if len(texts) < 2:
        return "".join(texts)
    return ", ".join(texts[:-1]) + " or " + texts[-1]


def bullet_list(lines: Sequence[str], limit: int = MAX_LISTED) -> str:
    """Returns the first `limit` lines as an indented list and says how many were left out."""
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  - … and {len(lines) - limit} more")
    return "\n".join(shown)


def sentences(*parts: str) -> str:
    """Joins the parts that are not empty with single spaces."""
    return " ".join(part for part in parts if part)


def format_bytes(count: float) -> str:
    """Returns a byte count in binary units: 1536 -> "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def format_shape(shape: Sequence[int]) -> str:
    """Returns "[2048, 1536]"."""
    return "[" + ", ".join(str(size) for size in shape) + "]"


def missing_extra(module: str, feature: str, extra: str) -> ImportError:
    """Returns the error for `feature`, which needs the optional package `module`."""
    return ImportError(
        f"{feature} needs the Python package {module!r}, which is not installed. "
        f'Install it with: pip install "gemloupe[{extra}]"'
    )


def does_not_fit(
    what: str, needed: int, available: int, fitting: Sequence[tuple[str, int]]
) -> MemoryError:
    """Returns the error for `what`, which needs more memory than there is.

    `fitting` holds the alternatives that would fit, as (what to write, bytes), the best first.
    """
    text = (
        f"{what} needs {format_bytes(needed)} of memory; {format_bytes(available)} are available."
    )
    if fitting:
        option, size = fitting[0]
        return MemoryError(f"{text} Use {option}: it needs {format_bytes(size)}.")
    return MemoryError(f"{text} Load a smaller model, or use a machine with more memory.")
