"""Captures and edits inside the vision tower: hook points that begin with "vision."."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core, capturing, edits, hooks
from gemloupe.adapters import deltas
from gemloupe.adapters.selection import Selection
from gemloupe.config import TextConfig
from gemloupe.errors import close_matches, format_bytes, one_of, quoted
from gemloupe.media.content import Medium
from gemloupe.media.images import Image
from gemloupe.media.videos import Video
from gemloupe.media.vision import Vision
from gemloupe.positions import Span, resolve
from gemloupe.prompt import Prompt
from gemloupe.vision_config import VisionConfig

if TYPE_CHECKING:
    from gemloupe.media.tower_hooks import TowerModel

PREFIX = "vision."
_CELLS = ("vision.pooled", "vision.standardized", "vision.soft_tokens")


@functools.lru_cache(maxsize=16)
def vision_points(config: VisionConfig) -> dict[str, hooks.HookPoint]:
    """Every hook point of a vision tower by name, in model order.

    T counts the patches of all images of a prompt, one image after the other; of vision.pooled,
    vision.standardized and vision.soft_tokens their soft tokens. Scores and patterns are [N, T, T]
    of one image.
    """
    points: dict[str, hooks.HookPoint] = {}
    table = _core.vision_hook_points()

    def add(row: tuple[int, str, bool, str, bool, str], layer: int) -> None:
        index, name, _per_layer, shape, editable, path = row
        full = f"{PREFIX}layers.{layer}.{name}" if layer >= 0 else name
        path = path.replace("{i}", str(layer))
        theirs = f"vision_tower.encoder.{path}" if layer >= 0 and path else path
        tail = _row_shape(shape, name, config)
        points[full] = hooks.HookPoint(full, shape, index, layer, editable, theirs, row_shape=tail)

    outside = [row for row in table if not row[2]]
    add(outside[0], -1)
    for layer in range(config.num_hidden_layers):
        for row in table:
            if row[2]:
                add(row, layer)
    for row in outside[1:]:
        if row[1] == "vision.soft_tokens" or (
            config.has_encoder and (row[1] != "vision.standardized" or config.standardize)
        ):
            add(row, -1)
    return points


def _row_shape(shape: str, name: str, config: VisionConfig) -> tuple[int, ...]:
    if "N, T, S" in shape:
        return (-1,)
    width = config.hidden_size if config.has_encoder else config.mm_embed_dim
    sizes = {
        "1": 1,
        "D": config.text_hidden_size if name == "vision.soft_tokens" else width,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
    }
    return tuple(sizes[letter] for letter in shape.strip("[]").split(", ")[1:])


def split_capture(capture: Any, prefix: str = PREFIX) -> tuple[Any, dict[str, Any]]:
    """Returns `capture` without the points of the tower whose prefix it is, and these alone."""
    if isinstance(capture, str):
        capture = [capture]
    if isinstance(capture, Mapping):
        seen = {name: how for name, how in capture.items() if _begins(name, prefix)}
        return {name: how for name, how in capture.items() if name not in seen}, seen
    if not isinstance(capture, Iterable):
        return capture, {}
    names = list(capture)
    return [n for n in names if not _begins(n, prefix)], {
        n: None for n in names if _begins(n, prefix)
    }


def split_edit(edit: Any, prefix: str = PREFIX) -> tuple[Any, list[tuple[str, Any]]]:
    """Returns `edit` without the points of this tower, and these alone, in order."""
    mappings = [edit] if isinstance(edit, Mapping) else edit
    if not isinstance(mappings, (list, tuple)) or not all(isinstance(m, Mapping) for m in mappings):
        return edit, []
    seen = [(name, value) for m in mappings for name, value in m.items() if _begins(name, prefix)]
    if not seen:
        return edit, []
    return [{n: v for n, v in m.items() if not _begins(n, prefix)} for m in mappings], seen


def _begins(name: Any, prefix: str) -> bool:
    """Whether a name is of a tower's point, or of what an adapter adds in that tower."""
    if not isinstance(name, str):
        return False
    return name.startswith(prefix) or (name.startswith(deltas.PREFIX) and f".{prefix}" in name)


@dataclass(frozen=True)
class VisionRequest:
    """The captures and edits of one call inside the vision tower."""

    wanted: tuple[capturing.Wanted, ...]
    edits: tuple[tuple[hooks.HookPoint, edits.Edit], ...]
    check_finite: bool

    def __bool__(self) -> bool:
        return bool(self.wanted or self.edits)


def parse(
    model: TowerModel,
    capture: Mapping[str, Any],
    edit: Sequence[tuple[str, Any]],
    check_finite: bool,
    adapters: Selection,
) -> VisionRequest:
    """Returns the request of a row that runs under `adapters`.

    KeyError with close matches for a pattern that matches nothing.
    """
    if not capture and not edit:
        return VisionRequest((), (), check_finite)
    vision = model.vision
    if vision is None:
        name = next(iter(capture), edit[0][0] if edit else "")
        raise KeyError(f"{quoted(name)} matches no hook point: this checkpoint has no vision part")
    points = vision_points(vision.config)
    wanted = []
    for pattern, how in capture.items():
        plain, is_before = hooks.split_before(pattern)
        at = how if isinstance(how, capturing.At) else capturing.At(how)
        if at.reduce is not None:
            raise ValueError(f"{quoted(pattern)}: reduce= is not for points of the vision tower")
        if pattern.startswith(deltas.PREFIX):
            wanted += [
                capturing.Wanted(name, points[delta.point], False, at, delta)
                for name, delta in deltas.match(pattern, adapters, "vision").items()
            ]
            continue
        for name in _match(plain, points):
            key = hooks.before(name) if is_before else name
            wanted.append(capturing.Wanted(key, points[name], is_before, at))
    changes = [
        (points[name], one)
        for pattern, value in edit
        for one in edits.as_edits(value, pattern)
        for name in _match(pattern, points)
    ]
    return VisionRequest(tuple(wanted), tuple(changes), check_finite)


def _match(pattern: str, points: Mapping[str, hooks.HookPoint]) -> list[str]:
    names = [pattern] if pattern in points else fnmatch.filter(points, pattern)
    if not names:
        matches = close_matches(pattern, points)
        hint = f"; did you mean {one_of(matches)}?" if matches else ""
        raise KeyError(f"{quoted(pattern)} matches no hook point of the vision tower{hint}")
    return names


class _Rows:
    """Stands for a prompt where positions number patches or soft tokens."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def positions(self, kind: str) -> np.ndarray:
        raise ValueError(
            f"positions={kind!r} are of the text; at points of the vision tower, positions number "
            "patches (or soft tokens) of the images from 0"
        )


@dataclass
class Seen:
    """What the tower gave while it was watched."""

    soft_tokens: dict[Medium, np.ndarray] = field(default_factory=dict)
    """Of each image, after edits."""
    arrays: dict[str, Any] = field(default_factory=dict)
    positions: dict[str, np.ndarray] = field(default_factory=dict)


def encode(
    vision: Vision, prompt: Prompt, request: VisionRequest, config: TextConfig, row: int
) -> Seen:
    """Encodes a prompt's images anew and returns what `request` asks for.

    ValueError where the prompt has no image, or soft tokens whose image is not known.
    """
    pictures = {m: _pictures(m) for m in prompt.media if m.kind in ("image", "video")}
    if not pictures:
        raise ValueError("capture= or edit= has points of the vision tower, but there is no image")
    cell = vision.config.pooling_kernel_size**2 if vision.config.has_encoder else 1
    lengths = [image.soft_tokens for images in pictures.values() for image in images]
    _check_memory(request, [length * cell for length in lengths], vision.config)
    cells = sum(lengths)
    core = _core.Hooks()
    core.check_finite = request.check_finite
    spans = {name: _span(cells if name in _CELLS else cells * cell) for name in
             vision_points(vision.config)}  # fmt: skip
    numbers = []
    for wanted in request.wanted:
        where = resolve(wanted.at.positions, spans[wanted.point.name]).core()
        point = wanted.point
        if one := wanted.delta:
            number = core.add_delta_capture(one.adapter, one.module, one.layer, where, "")
            numbers.append(number)
            continue
        numbers.append(core.add_capture(point.index, point.layer, where, wanted.before, "", 0))
    for point, edit in request.edits:
        site = edits.Site(point, config, spans[point.name], row)
        for target, positions, change in edit.bind(site):
            core.add_edit(target.index, target.layer, positions.core(), change)
    seen = Seen()
    first = 0
    for medium, images in pictures.items():
        tokens = []
        for image in images:
            tokens.append(vision.encode(image, medium.content.adapters, core, first))
            first += image.soft_tokens * cell
        seen.soft_tokens[medium] = np.concatenate(tokens)
    for wanted, number in zip(request.wanted, numbers, strict=True):
        values, at, parts = core.take(number)
        seen.positions[wanted.key] = at
        seen.arrays[wanted.key] = _shaped(values, parts, _shape_of(wanted))
    return seen


def _pictures(medium: Medium) -> Sequence[Image]:
    medium.content.check_encodes(f"{medium.kind} {medium.index}")
    source = medium.content.source
    if isinstance(source, Image):
        return [source]
    if isinstance(source, Video):
        return source.frames
    raise ValueError(
        f"{medium.kind} {medium.index} was given as soft tokens of an unknown picture, which can't "
        "be encoded anew; pass the picture to look into the vision tower"
    )


def _span(count: int) -> Span:
    rows: Any = _Rows(count)
    return Span(rows, 0)


def _shape_of(wanted: capturing.Wanted) -> tuple[int, ...]:
    """Of one row; (-1,) where it changes with every image."""
    if wanted.delta:
        return (wanted.delta.width,)
    assert wanted.point.row_shape is not None
    return wanted.point.row_shape


def _shaped(
    values: np.ndarray, parts: Sequence[tuple[int, int, int]], row_shape: tuple[int, ...]
) -> Any:
    """One array of all images' rows; of scores and patterns a list with one array an image."""
    if row_shape != (-1,):
        return values.reshape((len(values), *row_shape))
    flat, arrays, begin = values.ravel(), [], 0
    for heads, rows, cols in parts:
        arrays.append(flat[begin : begin + heads * rows * cols].reshape(heads, rows, cols))
        begin += heads * rows * cols
    return arrays


def _check_memory(request: VisionRequest, patches: Sequence[int], config: VisionConfig) -> None:
    total = 0
    shapes = [_shape_of(wanted) for wanted in request.wanted]
    for shape in shapes:
        if shape == (-1,):
            total += 4 * config.num_attention_heads * sum(n * n for n in patches)
        else:
            total += 4 * int(np.prod(shape)) * sum(patches)
    # Scores and pattern of the largest image, while they are shown.
    if (-1,) in shapes:
        total += 8 * config.num_attention_heads * max(patches) ** 2
    available = _core.available_memory()
    if total > available:
        raise MemoryError(
            f"the captures in the vision tower need {format_bytes(total)}, but "
            f"{format_bytes(available)} of memory are available; capture fewer layers or positions"
        )
