"""Reads JSON written by strangers: limited in size, no key twice, no number that isn't finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from gemloupe.errors import format_bytes, quoted

# Released config files have 5 KB, generation configs 200 bytes, weight maps 200 KB.
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 100_000_000
_MAX_INTEGER_DIGITS = 19  # 2**63 - 1 has 19.

_AGAIN = "Correct the file, or download the checkpoint again."


def read_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Reads the JSON object in `path`.

    Raises FileNotFoundError where there is no such file, and ValueError naming the file where it
    is larger than `max_bytes`, not UTF-8, not JSON, not an object, or breaks a rule above.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path}: {format_bytes(size)} are too many for this file; expected at most "
            f"{format_bytes(max_bytes)}. {_AGAIN}"
        )
    return parse_object(path.read_bytes(), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parses `data`; `where` (a file name) begins every error text."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_parse_integer,
            parse_float=_parse_float,
        )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text at byte {error.start}; expected a JSON object. {_AGAIN}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}. {_AGAIN}"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{where}: nested too deeply; expected a plain JSON object. {_AGAIN}"
        ) from None
    except _Refused as error:
        raise ValueError(f"{where}: {error}. {_AGAIN}") from None
    if isinstance(value, dict):
        return value
    raise ValueError(f"{where}: holds a JSON {type(value).__name__}; expected an object. {_AGAIN}")


class _Refused(Exception):
    """A rule of this module is broken; the message lacks the file."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {quoted(key)} occurs twice; expected it once")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is not JSON; expected a finite number")


def _parse_integer(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_INTEGER_DIGITS:
        raise _Refused(f"the integer {quoted(text)} is too large; expected at most 2^63 - 1")
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise _Refused(f"the integer {text} is too large; expected at most 2^63 - 1")
    return value


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {quoted(text)} is too large; expected a finite number")
    return value
