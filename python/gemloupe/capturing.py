"""What `capture=` and `edit=` mean: from names and patterns to the engine's hooks, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemloupe import _core, edits, hooks, routing
from gemloupe.adapters import deltas
from gemloupe.adapters.deltas import Delta
from gemloupe.adapters.selection import NO_ADAPTERS, Selection
from gemloupe.config import TextConfig
from gemloupe.errors import did_you_mean, format_bytes, one_of, quoted
from gemloupe.positions import Positions, Span, resolve
from gemloupe.router_trace import RouterTrace

REDUCES = ("mean", "norm", "last")


@dataclass(frozen=True)
class At:
    """Of which positions a point is captured, and what is kept of them; made by `at`."""

    positions: Any = None
    reduce: str | None = None


def at(positions: Any = None, *, reduce: str | None = None) -> At:
    """A value of `capture={name: gl.at(-1)}`: positions as in `gemloupe.positions.resolve`.

    `reduce` keeps less: "mean" (one row, the mean over positions), "last" (one row), "norm" (the
    Euclidean norm of each row, or of each head or expert of it). ValueError for another word.
    """
    if reduce is not None and reduce not in REDUCES:
        raise ValueError(f"reduce is {quoted(reduce)}; expected None or {one_of(REDUCES)}")
    return At(positions, reduce)


@dataclass(frozen=True)
class Wanted:
    """One point to be captured."""

    key: str
    point: hooks.HookPoint
    before: bool
    at: At
    delta: Delta | None = None
    """Instead of the point's value, what an adapter adds to a module by then."""

    def shape(self, config: hooks.Config) -> tuple[int, ...]:
        """Of one position's value."""
        return (self.delta.width,) if self.delta else hooks.point_shape(self.point, config)


@dataclass(frozen=True)
class Request:
    """The captures and edits of one call, before they are bound to its rows."""

    wanted: tuple[Wanted, ...]
    edits: tuple[tuple[hooks.HookPoint, edits.Edit], ...]
    skipped: tuple[str, ...]
    check_finite: bool = False
    routing: str | None = None
    """The level of the router trace that is made (gemloupe.routing), or None."""

    def __bool__(self) -> bool:
        return bool(self.wanted or self.edits)

    @property
    def asked(self) -> list[str]:
        """The captures that the caller asked for, without those that a router trace needs."""
        return [wanted.key for wanted in self.wanted if not wanted.key.startswith(_TRACE)]


_TRACE = "trace/"  # Begins the keys of what a router trace is made from.
_EXPERTS = ".router.experts"


def parse_capture(
    capture: str | Iterable[str] | Mapping[str, Any],
    config: hooks.Config,
    adapters: Selection = NO_ADAPTERS,
) -> tuple[list[Wanted], list[str]]:
    """Returns the points that `capture` names, in model order, and those that layers lack.

    KeyError with close matches for a pattern that matches nothing.
    """
    if isinstance(capture, str):
        capture = [capture]
    items = capture.items() if isinstance(capture, Mapping) else ((name, None) for name in capture)
    points = hooks.hook_points(config)
    order = {name: i for i, name in enumerate(points)}
    found: dict[str, Wanted] = {}
    skipped: list[str] = []
    for pattern, how in items:
        if not isinstance(pattern, str):
            raise TypeError(f"capture has {quoted(pattern)}; expected names or patterns")
        spec = how if isinstance(how, At) else At(how)
        if pattern.startswith(deltas.PREFIX):
            tower = getattr(config, "tower", "")
            for key, delta in deltas.match(pattern, adapters, tower).items():
                found[key] = Wanted(key, points[delta.point], False, spec, delta)
            continue
        plain, before = hooks.split_before(pattern)
        names, lacking = hooks.match(plain, config)
        skipped += lacking
        for name in names:
            key = hooks.before(name) if before else name
            found[key] = Wanted(key, points[name], before, spec)
    ordered = sorted(found.values(), key=lambda wanted: (order[wanted.point.name], wanted.before))
    return ordered, sorted({*skipped})


def parse_edit(
    edit: Any, config: hooks.Config
) -> tuple[list[tuple[hooks.HookPoint, edits.Edit]], list[str]]:
    """Returns (point, edit) in the order written, and the points that layers lack.

    `edit` is None, a mapping from names or patterns to edits, or a list of mappings.
    """
    if edit is None:
        return [], []
    mappings = [edit] if isinstance(edit, Mapping) else edit
    if not isinstance(mappings, (list, tuple)) or not all(
        isinstance(one, Mapping) for one in mappings
    ):
        raise TypeError(
            f"edit is {quoted(edit)}; expected a mapping from hook points to edits, or a list of "
            "mappings"
        )
    points = hooks.hook_points(config)
    found: list[tuple[hooks.HookPoint, edits.Edit]] = []
    skipped: list[str] = []
    for mapping in mappings:
        for pattern, value in mapping.items():
            names, lacking = hooks.match(pattern, config)
            skipped += lacking
            for one in edits.as_edits(value, pattern):
                found += [(points[name], one) for name in names]
    return found, sorted({*skipped})


@dataclass(frozen=True)
class Options:
    """The arguments of `run` and `generate` that are about hooks."""

    capture: Any = ()
    routing: Any = False
    check_finite: bool = False

    def __post_init__(self) -> None:
        if self.capture is None or isinstance(self.capture, (str, Mapping)):
            return
        try:
            names = list(self.capture)  # The rows of a batch each read it; an iterator gives once.
        except TypeError:
            raise TypeError(
                f"capture is {quoted(self.capture)}; expected names or patterns, or a mapping from "
                "them to positions"
            ) from None
        object.__setattr__(self, "capture", names)


def parse(
    options: Options, edit: Any, config: hooks.Config, adapters: Selection = NO_ADAPTERS
) -> Request:
    """Returns the request for one row's `edit`, which runs under `adapters`.

    ValueError and KeyError for what is not understood, naming it.
    """
    wanted, lacking = parse_capture(options.capture or (), config, adapters)
    changes, lacking_edits = parse_edit(edit, config)
    skipped = tuple(sorted({*lacking, *lacking_edits}))
    level = routing.check_level(options.routing)
    points = hooks.hook_points(config)
    if isinstance(config, TextConfig):
        for name, reduce in routing.hook_points(level, config).items():
            wanted.append(Wanted(_TRACE + name, points[name], False, At(None, reduce)))
    return Request(tuple(wanted), tuple(changes), skipped, options.check_finite, level)


def row_edits(edit: Any, rows: int | None) -> list[Any]:
    """One `edit` a row: a batch may have a list with one entry a row. ValueError where not."""
    if rows is None or not isinstance(edit, (list, tuple)):
        return [edit] * (rows or 1)
    if len(edit) != rows:
        raise ValueError(f"edit has {len(edit)} entries for {rows} rows; pass one a row, or one")
    return list(edit)


@dataclass(frozen=True)
class RoutedTokens:
    """Which experts some tokens were given."""

    positions: np.ndarray
    """[T], absolute."""
    experts: np.ndarray
    """int32 [L, T, k], L of the layers that have experts; the weightiest first."""


class BoundHooks:
    """A request bound to one row: the engine's hooks, and how to read them afterwards."""

    def __init__(self, request: Request, config: hooks.Config, span: Span, row: int) -> None:
        self.request = request
        self._config = config
        self.core = _core.Hooks()
        self.core.check_finite = request.check_finite
        self._numbers: list[int] = []
        self.needed: list[tuple[hooks.HookPoint, Positions]] = []
        """What captures and edits are about: points with their positions."""
        for wanted in request.wanted:
            shape = wanted.shape(config)
            group = shape[-1] if wanted.at.reduce == "norm" and len(shape) > 1 else 0
            if wanted.at.reduce and _by_pass(wanted.point):
                raise ValueError(
                    f"reduce={wanted.at.reduce!r} at {wanted.point.name}, whose shape changes with "
                    "every pass; capture it whole, or its heads' outputs (attn.z)"
                )
            positions = resolve(wanted.at.positions, span)
            self.needed.append((wanted.point, positions))
            filter_ = positions.core()
            if wanted.delta:
                self._numbers.append(
                    self.core.add_delta_capture(
                        wanted.delta.adapter, wanted.delta.module, wanted.delta.layer, filter_,
                        wanted.at.reduce or "",
                    )
                )  # fmt: skip
                continue
            self._numbers.append(
                self.core.add_capture(
                    wanted.point.index, wanted.point.layer, filter_, wanted.before,
                    wanted.at.reduce or "", group,
                )
            )  # fmt: skip
        # Experts that `new_experts` has handed out, [L, T, k] each: `take` puts them back.
        self._handed_out: list[np.ndarray] = []
        self.edited: list[tuple[hooks.HookPoint, Positions]] = []
        self.passes = edits.Passes()
        for point, edit in request.edits:
            site = edits.Site(point, config, span, row, self.passes)
            for target, where, core in edit.bind(site):
                self.core.add_edit(target.index, target.layer, where.core(), core)
                self.edited.append((target, where))
        self.needed += self.edited

    def first_position(self, span: Span) -> int:
        """The first position of the span that captures or edits are about, at most its last."""
        first = span.end - 1
        for point, where in self.needed:
            # Rows of attn.keys and attn.values are positions of the cache, which every query reads.
            if point.shape.startswith("[S"):
                return span.first
            begins = [p for p in where.listed if p >= span.first]
            if where.begin is not None:
                begins.append(max(span.first, where.begin))
            first = min([first, *begins])
        return first

    @functools.cached_property
    def _expert_captures(self) -> list[int]:
        """Numbers of the captures that a router trace's experts come from, in order of layers."""
        keys = [wanted.key for wanted in self.request.wanted]
        pairs = zip(keys, self._numbers, strict=True)
        return [n for key, n in pairs if key.startswith(_TRACE) and key.endswith(_EXPERTS)]

    def new_experts(self) -> RoutedTokens | None:
        """The experts of the tokens read since the last call; None where there are none.

        Call it between two passes. `take` gives them all the same.
        """
        taken = [self.core.take(number) for number in self._expert_captures]
        if not taken or not taken[0][0].size:
            return None
        # Copies: what was taken has room for all rows to come.
        experts = np.stack([values for values, _, _ in taken])
        self._handed_out.append(experts)
        positions = taken[0][1][-experts.shape[1] :]
        return RoutedTokens(positions, experts.astype(np.int32))

    def take(
        self, ids: np.ndarray, tokens: Callable[[], list[str]], *, joined: bool
    ) -> tuple[Captured, RouterTrace | None]:
        """Returns what was captured, and the router trace; call it once, after the last pass.

        `joined`: scores and patterns of several passes become one array, else a list of them. `ids`
        and `tokens` (their strings) are those of all passes, for the trace; those that a call which
        ended early has not read are left out.
        """
        arrays: dict[str, Any] = {}
        positions: dict[str, np.ndarray] = {}
        expert_layers = iter(range(len(self._expert_captures)))
        for wanted, number in zip(self.request.wanted, self._numbers, strict=True):
            values, at_rows, parts = self.core.take(number)
            if self._handed_out and number in self._expert_captures:
                layer = next(expert_layers)
                before = [experts[layer] for experts in self._handed_out]
                values = np.concatenate([*before, values.reshape(-1, before[0].shape[-1])])
                values.setflags(write=False)
            if _by_pass(wanted.point):
                value = _by_passes(values.ravel(), parts, wanted.point, self._config, joined)
            else:
                value = _shaped(values, wanted, self._config)
            arrays[wanted.key] = value
            positions[wanted.key] = at_rows
        traced = {name: array for name, array in arrays.items() if name.startswith(_TRACE)}
        trace = None
        if traced and isinstance(self._config, TextConfig):
            held = positions[next(iter(traced))]
            points = {name.removeprefix(_TRACE): array for name, array in traced.items()}
            read = len(held)
            trace = routing.make_trace(
                self.request.routing,
                points,
                ids[:read],
                held,
                lambda: tokens()[:read],
                self._config,
            )
        kept = {name: array for name, array in arrays.items() if name not in traced}
        return Captured(kept, positions, self._config), trace


def _by_pass(point: hooks.HookPoint) -> bool:
    return "S" in point.shape


def _by_passes(
    values: np.ndarray,
    parts: Sequence[tuple[int, int, int]],
    point: hooks.HookPoint,
    config: hooks.Config,
    joined: bool,
) -> Any:
    arrays: list[np.ndarray[Any, Any]] = []
    begin = 0
    cached = point.shape.startswith("[S")
    tail = hooks.point_shape(point, config)
    shape: tuple[int, ...]
    for heads, rows, cols in parts:
        size = max(1, heads) * rows * cols
        array = values[begin : begin + size]
        shape = (rows, *tail) if cached else (heads, rows, cols)
        arrays.append(array.reshape(shape))
        begin += size
    if not joined:
        return arrays
    if not arrays:
        shape = (0, *tail) if cached else (config.num_attention_heads, 0, 0)
        return np.zeros(shape, np.float32)
    if cached or len(arrays) == 1:
        return arrays[-1]
    # Keys that an earlier pass did not have yet are keys that its rows do not see.
    length = arrays[-1].shape[-1]
    nothing = -np.inf if point.name.endswith("scores") else 0.0
    padded = [
        np.pad(a, ((0, 0), (0, 0), (0, length - a.shape[-1])), constant_values=nothing)
        for a in arrays
    ]
    array = np.concatenate(padded, axis=1)
    array.setflags(write=False)
    return array


def _shaped(values: np.ndarray, wanted: Wanted, config: hooks.Config) -> np.ndarray:
    shape = wanted.shape(config)
    reduce = wanted.at.reduce
    if reduce == "norm":
        return values.reshape((len(values), *shape[:-1]) if len(shape) > 1 else (-1,))
    if reduce in ("mean", "last"):
        return values.reshape(shape) if values.size else values.reshape((0, *shape))
    rows = values.size // max(1, int(np.prod(shape, dtype=np.int64)))
    shaped = values.reshape((rows, *shape))
    if wanted.point.name.endswith("router.experts"):
        shaped = shaped.astype(np.int32)
        shaped.setflags(write=False)
    return shaped


class Captured(Mapping[str, Any]):
    """name -> float32 array, read-only; names of transformers and TransformerLens work too."""

    def __init__(
        self, arrays: Mapping[str, Any], positions: Mapping[str, np.ndarray], config: hooks.Config
    ) -> None:
        self._arrays = dict(arrays)
        self._positions = dict(positions)
        self._config = config

    def __getitem__(self, name: str) -> Any:
        return self._arrays[self._key(name)]

    def positions_of(self, name: str) -> np.ndarray:
        """The absolute positions [T] of the rows captured at a point (of S, for attn.keys)."""
        return self._positions[self._key(name)]

    def only(self, names: Iterable[str]) -> Captured:
        """The same with these names alone."""
        kept = {name: self._arrays[name] for name in names}
        return Captured(kept, {name: self._positions[name] for name in kept}, self._config)

    def with_more(self, arrays: Mapping[str, Any], positions: Mapping[str, np.ndarray]) -> Captured:
        """The same with these captures before its own."""
        if not arrays:
            return self
        return Captured({**arrays, **self._arrays}, {**positions, **self._positions}, self._config)

    def _key(self, name: str) -> str:
        if name in self._arrays:
            return name
        alias = hooks.canonical(name, self._config) if isinstance(name, str) else name
        if alias in self._arrays:
            return alias
        hint = did_you_mean(str(name), self._arrays)
        raise KeyError(f"{quoted(name)} was not captured. {hint}".rstrip())

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Captured({one_of(list(self._arrays)[:8])}, {len(self)} in all)"


def check_memory(
    request: Request, config: hooks.Config, span: Span, new_tokens: int, chunk: int
) -> None:
    """MemoryError, with the figures, where the captures of a call would not fit in memory."""
    rows = len(span.prompt) + max(0, new_tokens - 1)
    length = span.first + rows
    total = 0
    largest = ("", 0)
    scratch = 0
    for wanted in request.wanted:
        count = resolve(wanted.at.positions, span).count(rows, span.first)
        size = _capture_bytes(wanted, config, count, length, len(span.prompt), new_tokens)
        total += size
        largest = max(largest, (wanted.point.name, size), key=lambda pair: pair[1])
        if "N, T, S" in wanted.point.shape:
            width = config.num_attention_heads * min(chunk, rows) * length * 4
            scratch = max(scratch, 2 * width)
    available = _core.available_memory()
    if total + scratch > available:
        raise MemoryError(
            f"the captures of this call need {format_bytes(total + scratch)} (the largest, "
            f"{largest[0]}: {format_bytes(largest[1])}), but {format_bytes(available)} of memory "
            "are available. Capture fewer layers, fewer positions (gl.at(-1)), or reduce them"
        )


def capture_bytes(request: Request, config: TextConfig, span: Span, new_tokens: int) -> int:
    """Returns the bytes that the captures of a call take, those of its router trace included."""
    rows = len(span.prompt) + max(0, new_tokens - 1)
    total = 0
    for wanted in request.wanted:
        count = resolve(wanted.at.positions, span).count(rows, span.first)
        total += _capture_bytes(
            wanted, config, count, span.first + rows, len(span.prompt), new_tokens
        )
    return total


def _capture_bytes(
    wanted: Wanted, config: hooks.Config, count: int, length: int, prompt: int, new: int
) -> int:
    shape = wanted.shape(config)
    if wanted.point.shape.startswith("[S"):
        # Of a prompt its last pass is kept, of generated tokens each.
        return 4 * length * abs(int(np.prod(shape))) * max(1, new)
    if "N, T, S" in wanted.point.shape:
        return 4 * config.num_attention_heads * count * length
    width = int(np.prod(shape, dtype=np.int64))
    if wanted.at.reduce == "norm":
        width //= shape[-1]
    return 4 * width * (1 if wanted.at.reduce in ("mean", "last") else count)


__all__ = ["At", "BoundHooks", "Captured", "Options", "Request", "at", "parse", "row_edits"]
