"""Reads a request's JSON: every field has its type, and what is not known is said."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from gemloupe.errors import did_you_mean, quoted
from gemloupe.serving.failure import ApiError

_MAX_DEPTH = 100
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def parse_body(data: bytes) -> dict[str, Any]:
    """Returns the JSON object of a body. ApiError 400 for anything else."""

    def refuse(text: str) -> Any:
        raise ValueError(f"{text} is no JSON number")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [item for each in level for item in _items(each)]
    if level:
        raise ApiError(400, f"the body is nested deeper than {_MAX_DEPTH} levels")
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {quoted(value)}; expected a JSON object")
    return value


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class Fields:
    """The fields of one object. What nobody asks for is reported by `finish`."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()
        self.option_warnings: list[str] = []
        """Warnings on an inner object, kept for the answer."""

    def name(self, key: str) -> str:
        return f"{self._where}{key}"

    def get(self, key: str, *kinds: type, default: Any = None) -> Any:
        """The value of a field, `default` where it is missing or null. ApiError for other types."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            return default
        if not kinds or _is_one_of(value, kinds):
            return value
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise ApiError(
            400,
            f"{self.name(key)} is {quoted(value)}; expected {expected}",
            param=self.name(key),
        )

    def number(self, key: str, low: float, high: float, default: Any = None) -> Any:
        value = self.get(key, float)
        return default if value is None else float(self._inside(key, value, low, high))

    def integer(self, key: str, low: int, high: int, default: Any = None) -> Any:
        value = self.get(key, int)
        return default if value is None else self._inside(key, value, low, high)

    def _inside(self, key: str, value: Any, low: float, high: float) -> Any:
        # Not made a float before: an integer of 400 digits is none.
        if not low <= value <= high:
            raise ApiError(
                400,
                f"{self.name(key)} is {quoted(value)}; expected {low:g} to {high:g}",
                param=self.name(key),
            )
        return value

    def choice(self, key: str, choices: Collection[Any], default: Any = None) -> Any:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, (list, dict)) or value not in choices:
            expected = ", ".join(map(json.dumps, choices))
            raise ApiError(
                400,
                f"{self.name(key)} is {quoted(value)}; expected one of {expected}",
                param=self.name(key),
            )
        return value

    def refuse(self, key: str, *nothing: Any, reason: str) -> None:
        """ApiError where a field asks for something that is not there."""
        value = self.get(key)
        if value is not None and value not in nothing:
            raise ApiError(400, f"{self.name(key)} {reason}", param=self.name(key))

    def finish(self, without_effect: Collection[str] = ()) -> list[str]:
        """Returns warnings on fields that have no effect.

        ApiError for a name that nothing knows but that resembles one that is known.
        """
        unknown = [key for key in self._values if key not in self._read]
        for key in unknown:
            hint = did_you_mean(key, self._read) if key not in without_effect else ""
            if hint:
                raise ApiError(
                    400, f"unknown field {quoted(self.name(key))}. {hint}", param=self.name(key)
                )
        return [f"{quoted(self.name(key))} has no effect" for key in unknown[:20]]


def _is_one_of(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)
