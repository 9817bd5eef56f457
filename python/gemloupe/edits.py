"""Changes of activations that need no Python while a pass runs, and edits by Python functions.

Each is a value of `edit=`: {"layers.3.resid_post": gl.edits.add(v, positions=-1)}. All take
`positions` (see `gemloupe.positions.resolve`) and `rows` (of a batch); those of points with heads
take `heads` too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemloupe import _core, hooks
from gemloupe.arrays import as_float32, check_shape
from gemloupe.config import TextConfig
from gemloupe.errors import format_shape, one_of, quoted
from gemloupe.positions import Positions, Span, resolve


@dataclass(frozen=True)
class At:
    """Where an edit function is called: its second argument."""

    name: str
    layer: int
    """-1 outside the layers."""
    positions: np.ndarray
    """int64 [T]: the absolute position of each row of `x` (attn.keys, attn.values: [S])."""
    row: int
    """The row of the batch; 0 for a single prompt."""
    phase: str
    """"prefill" or "decode"."""
    step: int
    """Passes of this sequence before this one, those of a prefix cache's tokens included."""


@dataclass
class Passes:
    """Passes that a row would have had over what a prefix cache has read for it."""

    skipped: int = 0


@dataclass(frozen=True)
class Site:
    """What an edit is bound to: a point of one row of one call."""

    point: hooks.HookPoint
    config: hooks.Config
    span: Span
    row: int
    passes: Passes = field(default_factory=Passes)

    @property
    def text(self) -> TextConfig:
        """The text model's config, for edits of experts; a tower has none."""
        assert isinstance(self.config, TextConfig)
        return self.config

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row of the point's value."""
        return hooks.point_shape(self.point, self.config)

    def sibling(self, name: str) -> Site:
        """The same for another point of the same layer."""
        full = f"layers.{self.point.layer}.{name}"
        return replace(self, point=hooks.hook_points(self.config)[full])


Bound = tuple[hooks.HookPoint, Positions, _core.Edit]


@dataclass(frozen=True)
class Edit:
    """A change of an activation, made by the functions of this module."""

    kind: str
    bind_to: Callable[[Edit, Site, Positions], list[Bound]] = field(repr=False)
    positions: Any = None
    heads: Any = None
    rows: Any = None

    def bind(self, site: Site) -> list[Bound]:
        """Returns the engine's edits for one point of one row; [] if the row is not meant.

        Raises ValueError where the point does not take this edit, naming shapes.
        """
        if self.rows is not None and site.row not in _numbers(self.rows, "rows", 2**31):
            return []
        if not site.point.editable:
            raise ValueError(f"{site.point.name} can't be edited")
        return self.bind_to(self, site, resolve(self.positions, site.span))


def zero(*, positions: Any = None, heads: Any = None, rows: Any = None) -> Edit:
    """x = 0."""
    return _value_edit("set", 0.0, positions, heads, rows, "zero")


def scale(factor: Any, *, positions: Any = None, heads: Any = None, rows: Any = None) -> Edit:
    """x = factor · x, for a number or an array (see `set`)."""
    return _value_edit("scale", factor, positions, heads, rows)


def set(value: Any, *, positions: Any = None, heads: Any = None, rows: Any = None) -> Edit:
    """x = value: a number, an array of one row's shape, or one with a row for each position.

    With `heads`, of the heads' shape: [H] or [len(heads), H]. A value for each position needs
    positions that are listed, or as many rows as the prompt.
    """
    return _value_edit("set", value, positions, heads, rows)


def add(value: Any, *, positions: Any = None, heads: Any = None, rows: Any = None) -> Edit:
    """x = x + value (see `set`): a steering vector, for example."""
    return _value_edit("add", value, positions, heads, rows)


def project_out(v: Any, *, positions: Any = None, heads: Any = None, rows: Any = None) -> Edit:
    """x = x − (x · v̂) v̂, v̂ = v / ‖v‖: takes one direction out. v has one row's shape.

    ValueError if v is zero.
    """
    direction = as_float32(v, "v")
    if not np.any(direction):
        raise ValueError("project_out: v is zero; expected a direction")

    def bind(edit: Edit, site: Site, where: Positions) -> list[Bound]:
        shape, _columns = _targeted(edit.heads, site)
        if len(shape) > direction.ndim:  # Repeated, it would be one direction through all heads.
            check_shape(direction, f"project_out at {site.point.name}: v", shape)
        return _bind_value("project_out", direction, edit, site, where)

    return Edit("project_out", bind, positions, heads, rows)


def mean(stats: Any, *, positions: Any = None, heads: Any = None, rows: Any = None) -> Edit:
    """x = stats: mean activations, as `capture={name: gl.at(None, reduce="mean")}` gives them.

    `stats` is an array, or a mapping (such as `run.captured`) from the point's name to one.
    """

    def bind(edit: Edit, site: Site, where: Positions) -> list[Bound]:
        value = stats[site.point.name] if isinstance(stats, Mapping) else stats
        return _bind_value("set", value, edit, site, where)

    return Edit("mean", bind, positions, heads, rows)


def patch(
    run: Any,
    source_positions: Any = None,
    *,
    positions: Any = None,
    heads: Any = None,
    rows: Any = None,
) -> Edit:
    """x = what `run` captured at this point: activation patching.

    Without `source_positions` each position gets the value that `run` has there. With it, the
    values of these positions of `run` go to `positions` in order (one value to all of them).
    ValueError where `run` lacks the point or the positions, or where their numbers differ.
    """

    def bind(edit: Edit, site: Site, where: Positions) -> list[Bound]:
        name = site.point.name
        if not hasattr(run, "positions_of"):
            raise TypeError(f"patch: got {type(run).__name__}; expected what model.run returned")
        if site.shape == (-1,):
            raise ValueError(
                f"patch at {name}, whose columns change with every pass; patch attn.z, or use a "
                "function"
            )
        values = np.asarray(run[name])
        held = np.asarray(run.positions_of(name))
        if values.shape != (len(held), *site.shape):
            raise ValueError(
                f"patch: the run has {name} of shape {format_shape(values.shape)}; expected "
                f"{format_shape((len(held), *site.shape))}, captured without reduce="
            )
        source = Span(run.prompt, int(run.positions[0]))
        if source_positions is None:
            wanted = [p for p in held.tolist() if _contains(where, p)]
            targets = wanted
        else:
            wanted = list(resolve(source_positions, source).listed)
            targets = list(where.listed) if where.begin is None else []
            if not targets:
                raise ValueError("patch: with source_positions, positions must be listed numbers")
            if len(wanted) == 1:
                wanted = wanted * len(targets)
            if len(wanted) != len(targets):
                raise ValueError(
                    f"patch: {len(wanted)} source positions for {len(targets)} positions; expected "
                    "as many, or one"
                )
        index = {int(position): i for i, position in enumerate(held)}
        missing = [position for position in wanted if position not in index]
        if missing:
            raise ValueError(
                f"patch: the run has no {name} at positions {quoted(missing)}; it holds "
                f"{quoted(held.tolist())}"
            )
        if not wanted:
            return []
        rows_of = values[[index[position] for position in wanted]]
        if edit.heads is not None:
            rows_of = rows_of[:, _head_list(edit.heads, site)]
        return _bind_value("set", rows_of, edit, site, Positions(tuple(targets), None))

    return Edit("patch", bind, positions, heads, rows)


def _contains(where: Positions, position: int) -> bool:
    return position in where.listed or (where.begin is not None and position >= where.begin)


def mask_edges(queries: Any, keys: Any, *, heads: Any = None, rows: Any = None) -> Edit:
    """Cuts attention from `queries` to `keys` (positions): −inf at attn.scores, 0 at attn.pattern.

    At attn.scores the other keys share the weight, at attn.pattern it is lost.
    """

    def bind(edit: Edit, site: Site, where: Positions) -> list[Bound]:
        if not site.point.name.endswith((".attn.scores", ".attn.pattern")):
            raise ValueError(
                f"mask_edges at {site.point.name}; expected attn.scores or attn.pattern"
            )
        chosen = [] if edit.heads is None else _head_list(edit.heads, site)
        if edit.heads is not None and not chosen:
            return []
        hidden = resolve(keys, site.span).core()
        return [(site.point, where, _core.mask_edges(hidden, chosen))]

    return Edit("mask_edges", bind, queries, heads, rows)


def sae(
    source: Any, features: Mapping[int, float], *, positions: Any = None, rows: Any = None
) -> Edit:
    """Sets features of a sparse autoencoder: x += Σ (value − f_i(x)) · W_dec[i].

    `source` is a folder with cfg.json and sae_weights.safetensors (as SAELens writes them), or an
    `integrations.saelens.Sae`. What the autoencoder does not explain of x stays as it is.
    ValueError for unknown features, other widths, and files that are no SAE.
    """
    from gemloupe.integrations.saelens import Sae, load_sae

    loaded = source if isinstance(source, Sae) else load_sae(source)
    parts = loaded.feature_parts(list(features))
    if parts is None:  # Features that depend on others: gated, top-k, scaled inputs.
        by_function = function(
            lambda x: loaded.with_features(x, features), positions=positions, rows=rows
        )
        return replace(by_function, kind="sae")
    targets = [float(value) for value in features.values()]

    def bind(edit: Edit, site: Site, where: Positions) -> list[Bound]:
        width = parts.encoder.shape[1]
        if int(np.prod(site.shape, dtype=np.int64)) != width:
            raise ValueError(
                f"sae of width {width} at {site.point.name}, whose rows are "
                f"{format_shape(site.shape)}"
            )
        core = _core.set_features(
            parts.encoder, parts.decoder, parts.bias.tolist(), parts.threshold.tolist(), targets
        )
        return [(site.point, where, core)]

    return Edit("sae", bind, positions, None, rows)


ABLATIONS = ("mask", "zero", "mean")


def ablate_experts(
    ids: Any, mode: str = "mask", *, means: Any = None, positions: Any = None, rows: Any = None
) -> Edit:
    """Takes experts away; put it at any router or experts point of a layer.

    mode "mask": the router's logits of these become −inf, so that the next expert comes in and the
    weights are renormalised. "zero": selection and weights stay, their outputs become 0. "mean":
    their outputs become `means` ([E, D], a mapping layer -> [E, D], or a trace with mean_outputs).
    ValueError where it has no mean of one of `ids`: NaN, as of experts that no token chose.
    """
    if mode not in ABLATIONS:
        raise ValueError(f"mode is {quoted(mode)}; expected {one_of(ABLATIONS)}")
    if mode == "mean" and means is None:
        raise ValueError('ablate_experts(mode="mean") needs means=, the mean output of each expert')

    def bind(edit: Edit, site: Site, where: Positions) -> list[Bound]:
        chosen = _expert_list(ids, site, "ablate_experts")
        if not chosen:
            return []
        if mode == "mask":
            if len({*chosen}) == site.text.num_experts:
                raise ValueError(
                    f'ablate_experts(mode="mask"): got all {site.text.num_experts} experts; '
                    'expected to leave one, or mode="zero"'
                )
            target = site.sibling("router.logits")
            ranges = [(expert, expert + 1) for expert in chosen]
            core = _core.value_edit("set", np.full(1, -np.inf, np.float32), [], ranges, [])
            return [(target.point, where, core)]
        values = np.zeros((0, 0), np.float32)
        if mode == "mean":
            values = _expert_means(means, chosen, site)
        target = site.sibling("experts.each")
        return [(target.point, where, _core.replace_experts(chosen, values))]

    return Edit("ablate_experts", bind, positions, None, rows)


def _expert_means(means: Any, chosen: list[int], site: Site) -> np.ndarray:
    """float32 [len(chosen), D]: the mean outputs of experts in the layer of `site`."""
    layer = site.point.layer
    table = getattr(means, "mean_outputs", means)
    if table is None:
        raise ValueError(
            'ablate_experts(mode="mean"): the trace has no mean outputs; run with '
            'capture="layers.*.experts.each" and pass run.routing.with_outputs(run.captured)'
        )
    if isinstance(table, Mapping):
        if layer not in table:
            raise ValueError(
                f'ablate_experts(mode="mean"): means has no layer {layer}; it has layers '
                f"{sorted(table)}"
            )
        table = table[layer]
    shape = (site.text.num_experts, site.text.hidden_size)
    values = as_float32(table, f"means of layer {layer}", shape)[chosen]
    unknown = [expert for expert, row in zip(chosen, values, strict=True) if np.isnan(row).any()]
    if unknown:
        raise ValueError(
            f'ablate_experts(mode="mean"): means of layer {layer} are NaN for experts {unknown}, '
            "which no token of the trace chose; add traces of more tokens, leave these experts "
            'out, or use mode="zero"'
        )
    return values


def force_experts(
    ids: Any, weights: Any = None, *, positions: Any = None, rows: Any = None
) -> Edit:
    """Makes the router choose these experts (as many as it chooses itself), in this order.

    Without `weights` theirs come from the router's own probabilities, renormalised; with it
    (one number an expert) these are final. Put it at any router or experts point of a layer.
    """

    def bind(edit: Edit, site: Site, where: Positions) -> list[Bound]:
        chosen = _expert_list(ids, site, "force_experts")
        count = site.text.top_k_experts
        if len(chosen) != count or len({*chosen}) != count:
            raise ValueError(
                f"force_experts: got experts {quoted(chosen)}; expected {count} different ones"
            )
        experts = site.sibling("router.experts")
        bound = _bind_value("set", np.array(chosen, np.float32), edit, experts, where)
        if weights is not None:
            value = as_float32(weights, "weights", (count,))
            bound += _bind_value("set", value, edit, site.sibling("router.weights"), where)
        return bound

    return Edit("force_experts", bind, positions, None, rows)


def function(fn: Callable[..., Any], *, positions: Any = None, rows: Any = None) -> Edit:
    """An edit by a Python function of some positions only; `edit={name: fn}` takes all of them.

    fn(x) or fn(x, at): x is a writable float32 array [T, …] of one row (attn.scores and
    attn.pattern: [N, T, S]), a copy; `at` is an `At`. It returns the new value, or None where x
    was changed in place. Called once a row, point and pass.
    """
    if not callable(fn):
        raise TypeError(
            f"an edit is {quoted(fn)}; expected a function, an array or a gl.edits edit"
        )
    takes_at = _takes_two(fn)

    def bind(edit: Edit, site: Site, where: Positions) -> list[Bound]:
        point = site.point

        def call(x: np.ndarray, positions: np.ndarray, decoding: bool, step: int) -> np.ndarray:
            shape = x.shape  # fn may change that of x, too.
            if takes_at:
                phase = "decode" if decoding else "prefill"
                step += site.passes.skipped
                at = At(point.name, point.layer, positions, site.row, phase, step)
                result = fn(x, at)
            else:
                result = fn(x)
            edited = x if result is None else result
            array = as_float32(edited, f"the value of the edit function of {point.name}")
            if array.shape != shape:
                how = "left" if result is None else "returned"
                raise ValueError(
                    f"edit of {point.name}: the function {how} {format_shape(array.shape)}, "
                    f"expected {format_shape(shape)}"
                )
            return array

        return [(point, where, _core.function_edit(call, list(site.shape)))]

    return Edit("function", bind, positions, None, rows)


def _takes_two(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # Some built-in functions have no signature.
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return (
        len(required) >= 2
        or (len(positional) >= 2 and positional[1].name == "at")
        or (variadic and not positional)
    )


def as_edits(value: Any, name: str) -> list[Edit]:
    """Returns the edits that a value of `edit=` stands for: one, an array, a function, or a list.

    TypeError for anything else.
    """
    if isinstance(value, Edit):
        return [value]
    if isinstance(value, (list, tuple)):
        # A list without edits and functions is an array.
        if not value or any(isinstance(one, Edit) or callable(one) for one in value):
            return [edit for one in value for edit in as_edits(one, name)]
    if (
        hasattr(value, "__array__")
        or hasattr(value, "__dlpack__")
        or isinstance(value, (list, tuple, float, int))
    ):
        return [set(as_float32(value, f"edit of {name}"))]
    return [function(value)]


# --- what the functions above share ---


def _value_edit(
    op: str, value: Any, positions: Any, heads: Any, rows: Any, kind: str | None = None
) -> Edit:
    def bind(edit: Edit, site: Site, where: Positions) -> list[Bound]:
        return _bind_value(op, value, edit, site, where)

    return Edit(kind or op, bind, positions, heads, rows)


def _bind_value(op: str, value: Any, edit: Edit, site: Site, where: Positions) -> list[Bound]:
    array = as_float32(value, f"edit of {site.point.name}")
    heads = [] if edit.heads is None else _head_list(edit.heads, site)
    if edit.heads is not None and not heads:
        return []
    by_head = site.shape == (-1,)
    if by_head:
        if array.ndim > 0:
            raise ValueError(
                f"edit of {site.point.name}: got an array of {format_shape(array.shape)}, whose "
                "columns change with every pass; expected a number, or a function"
            )
        return [(site.point, where, _core.value_edit(op, array.reshape(1), [], [], heads))]
    shape, columns = _targeted(edit.heads, site)
    rows_at: list[int] = []
    if array.ndim > 0:
        array, rows_at = _fit(array, shape, site, where)
    if rows_at:
        where = Positions(tuple(sorted(rows_at)), None)
        array = array[np.argsort(rows_at, kind="stable")]
        rows_at = sorted(rows_at)
    flat = array.reshape(max(1, len(rows_at)), -1)
    return [(site.point, where, _core.value_edit(op, flat, rows_at, columns, []))]


def _targeted(heads: Any, site: Site) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """The shape of what an edit changes of a row, and its columns ([]: all)."""
    if heads is None:
        return site.shape, []
    chosen = _head_list(heads, site)
    inner = site.shape[1:]
    width = int(np.prod(inner, dtype=np.int64))
    return (len(chosen), *inner), [(head * width, (head + 1) * width) for head in chosen]


def _head_list(heads: Any, site: Site) -> list[int]:
    letters = site.point.shape.strip("[]").split(", ")
    axis = 0 if letters[:2] == ["N", "T"] else 1
    if letters[axis] not in ("N", "K"):
        raise ValueError(f"heads= at {site.point.name} {site.point.shape}, which has no heads")
    count = site.config.num_attention_heads if axis == 0 else site.shape[0]
    chosen = _numbers(heads, f"heads at {site.point.name}", count, negative=True)
    return sorted({head % count for head in chosen})


def _numbers(values: Any, what: str, count: int, *, negative: bool = False) -> list[int]:
    """One index or several, below `count`; a boolean mask is none, as 0 and 1 are numbers too."""
    array = np.atleast_1d(np.asarray(values))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{what}: got {quoted(values)}; expected a number or a list of numbers")
    for number in array.tolist():
        if not (-count if negative else 0) <= number < count:
            raise ValueError(f"{what}: got {number}; expected 0 to {count - 1}")
    return [int(number) for number in array]


def _expert_list(ids: Any, site: Site, what: str) -> list[int]:
    name = site.point.name
    if ".router." not in name and ".experts." not in name:
        raise ValueError(f"{what} at {name}; expected a router or experts point of a layer")
    count = site.text.num_experts
    return _numbers(ids, f"{what}: experts", count)


def _fit(
    array: np.ndarray, shape: tuple[int, ...], site: Site, where: Positions
) -> tuple[np.ndarray, list[int]]:
    """Brings values to [W] or, with a row for each position, [P, W]; and those positions."""
    size = int(np.prod(shape, dtype=np.int64))
    listed = list(where.listed) if where.begin is None else []
    if where.begin == 0 and not where.listed:  # All positions: those of the prompt.
        listed = list(range(site.span.first, site.span.end))
    one_row = array.ndim <= len(shape) and _broadcasts(array.shape, shape)
    by_row = array.ndim == len(shape) + 1 and _broadcasts(array.shape[1:], shape)
    if one_row:
        return np.broadcast_to(array, shape).reshape(1, size), []
    if by_row and len(array) == len(listed):
        return np.broadcast_to(array, (len(array), *shape)).reshape(len(array), size), listed
    many = f", or {format_shape((len(listed), *shape))} with a row for each position"
    raise ValueError(
        f"edit of {site.point.name}: got {format_shape(array.shape)}, expected "
        f"{format_shape(shape)}{many if listed else ''}"
    )


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    # A single number is one already; an axis of 1 would more often be a mistake.
    return len(shape) <= len(to) and tuple(shape) == tuple(to[len(to) - len(shape) :])


__all__ = [
    "ABLATIONS", "At", "Edit", "ablate_experts", "add", "as_edits", "force_experts", "function",
    "mask_edges", "mean", "patch", "project_out", "sae", "scale", "set", "zero",
]  # fmt: skip
