"""Bounding boxes in replies: {"box_2d": [y0, x0, y1, x1], "label": "cat"}, in thousandths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gemloupe.errors import quoted

_SIZE = 1000
_MOST_TEXT = 1 << 20


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture, in thousandths of its height and width from the top left."""

    top: float
    left: float
    bottom: float
    right: float
    label: str = ""

    def pixels(self, width: float, height: float) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in a picture of this size."""
        wide, high = width / _SIZE, height / _SIZE
        return self.left * wide, self.top * high, self.right * wide, self.bottom * high


def parse_boxes(reply: str) -> list[Box]:
    """Returns the boxes of a reply, in order; [] where it has none.

    Models answer requests for boxes with JSON objects, alone or in a list, maybe in a code block
    and maybe cut short: every whole object that has "box_2d" is read, and its "label". ValueError,
    quoting it, for a box that is not four numbers from 0 to 1000, each end after its beginning.
    """
    if len(reply) > _MOST_TEXT:
        raise ValueError(f"the reply has {len(reply)} characters; expected at most {_MOST_TEXT}")
    found = []
    decoder = json.JSONDecoder()
    at = reply.find("{")
    while at >= 0:
        end = at + 1
        try:
            value, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and "box_2d" in value:
            found.append(_box(value))
        elif value is not None:
            end = at + 1  # Boxes may stand inside.
        at = reply.find("{", end)
    return found


def _box(value: dict[str, Any]) -> Box:
    numbers = value["box_2d"]
    is_box = (
        isinstance(numbers, list)
        and len(numbers) == 4
        and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)
        and all(0 <= n <= _SIZE for n in numbers)
        and numbers[0] <= numbers[2]
        and numbers[1] <= numbers[3]
    )
    if not is_box:
        raise ValueError(
            f"box_2d is {quoted(numbers)}; expected [top, left, bottom, right] from 0 to {_SIZE}"
        )
    top, left, bottom, right = numbers
    return Box(top, left, bottom, right, str(value.get("label", "")))
