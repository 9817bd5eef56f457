"""Walks the hook points in model order and says of each why both sides differ there.

At a point, got - expected = (got - f(got's inputs)) + (f(got's inputs) - f(expected's inputs)) +
(f(expected's inputs) - expected), where f is the point's operation in float64 with the model's
weights. The first and the last term are one side's own doing and have a bound; the middle one is
what came in. So an operation can be judged whatever happened before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from gemloupe.comparison.bounded import Bounded
from gemloupe.comparison.engines import PLAIN
from gemloupe.comparison.operations import (
    Captured,
    Context,
    NotCaptured,
    operation_of,
    split_name,
    tensors_of,
)
from gemloupe.comparison.sides import Values, check_values
from gemloupe.comparison.tensors import Tensors
from gemloupe.comparison.weights_difference import WeightsDifference, compare_tensor
from gemloupe.embed_scale import embed_scale

if TYPE_CHECKING:
    from gemloupe.config import TextConfig

# Independent roundings of equal size differ by √2 of either; more than this is something else.
RATIO = 1.5
# Where an operation's inputs are not known: float32 against float32, relative to the largest value.
TOLERANCE = 1e-4
# Probabilities closer than this are a tie between two float32 engines.
TIE_GAP = 1e-5

EQUAL, NOISE, AMPLIFIED = "equal", "noise", "amplified"
ROUNDING, UNCHECKED, TIE, DIVERGES = "rounding", "unchecked", "near tie", "diverges"
TOWERS = ("vision.", "audio.")
_SEVERITY = (EQUAL, NOISE, UNCHECKED, TIE, AMPLIFIED, ROUNDING, DIVERGES)
MEANING = {
    EQUAL: "both sides agree to the last rounding",
    NOISE: "float noise of this and earlier operations explains the difference",
    AMPLIFIED: "each side agrees with its own operation in float64; what came in had grown",
    ROUNDING: "the model's weights are rounded",
    UNCHECKED: "inputs were not captured; the difference is small",
    TIE: "the reference's probabilities of the experts in question are nearly equal",
    DIVERGES: "more than noise explains",
}


@dataclass(frozen=True)
class PointError:
    """One hook point. Errors are of the model minus the reference."""

    name: str
    layer: int
    """-1 outside the layers."""
    point: str
    """The name within its layer."""
    verdict: str
    """A key of `MEANING`."""
    error: float
    """Largest absolute difference."""
    rms: float
    size: float
    """Root mean square of the reference's values."""
    bound: float | None
    """What rounding in this one operation allows at the element of `index`, both sides together."""
    prompt: int
    position: int
    index: tuple[int, ...]
    """The element shown: where it diverges, else the largest difference."""
    got: float
    expected: float
    side: str = ""
    """Which side is off its own operation: "model", "reference", or ""."""
    tensors: tuple[str, ...] = ()
    """Weights that differ, or that may."""
    why: str = ""
    own: float | None = None
    """rms of the reference's own |its dtype - float32|."""
    ratio: float | None = None
    """rms / own: above 1.5 is more than two roundings explain."""
    output_error: float | None = None
    """|the model's weights on the reference's inputs - the reference's output|, relative norm."""
    elements: int = 0

    @property
    def relative(self) -> float:
        """rms over size; 0 for equal values."""
        return self.rms / self.size if self.size else float(self.rms > 0)


@dataclass(frozen=True, eq=False)
class Pair:
    """What both sides gave for one prompt, and what the reference gave in float32."""

    model: Captured
    reference: Captured
    baseline: Values | None
    prompt: int
    flips: Mapping[int, int] = field(default_factory=dict)
    """Layer -> first row that took other experts on both sides."""
    forced: str = ""
    """The side whose experts are the other's: "model", "reference" or ""."""

    def same_rows(self, layer: int, point: str) -> slice:
        """The rows whose values no other choice of experts has reached."""
        reached = [row for at, row in self.flips.items() if self._is_after(at, layer, point)]
        return slice(0, min(reached, default=None))

    @staticmethod
    def _is_after(flip: int, layer: int, point: str) -> bool:
        if layer < 0:
            return point.startswith(("final_norm", "logits"))
        late = ("experts.", "ffn.", "resid_ffn", "resid_unscaled", "resid_post", "router.weights")
        return flip < layer or (flip == layer and point.startswith(late))


class Walk:
    """The judge: knows the model's weights and, where there are any, the reference's."""

    def __init__(self, config: TextConfig, model: Tensors, reference: Tensors | None) -> None:
        self._config = config
        self._model = model
        self._reference = reference
        self._differences: dict[str, WeightsDifference] = {}
        # A quantised model is off by more than its reference's rounding: ratios say nothing.
        names = [t for layer in range(config.num_hidden_layers) for t in _products(layer)]
        names.append("embed_tokens.weight")
        self._quantised = any(model.dtype(t) not in PLAIN for t in names)

    def points(self, pair: Pair, names: Sequence[str]) -> Iterator[PointError]:
        """Yields each point that both sides have, in the order of `names`."""
        for name in names:
            if name in pair.model.values and name in pair.reference.values:
                yield self._point(pair, name)

    def _point(self, pair: Pair, name: str) -> PointError:
        got, expected = pair.model.values[name], pair.reference.values[name]
        check_values(name, got, expected)
        if name.endswith("router.experts"):
            return self._experts(pair, name)
        measured = _measure(pair, name)
        unit = pair.model.engine.roundings.unit + pair.reference.engine.roundings.unit
        difference = _difference(got, expected)
        size = np.where(np.isfinite(expected), np.abs(expected), 0)
        if (difference <= unit * size).all():
            return measured
        if measured.ratio is not None and not self._quantised:
            if measured.ratio <= RATIO:
                return replace(measured, verdict=NOISE)
            return self._over_ratio(pair, measured)
        return self._judge(pair, measured)

    def _over_ratio(self, pair: Pair, measured: PointError) -> PointError:
        found = self._judge(pair, measured)
        text = (
            f"{measured.rms:.3g} rms is {measured.ratio:.3g} times the reference's own error in "
            f"{pair.reference.engine.dtype} ({measured.own:.3g}); 1.5 is what two roundings explain"
        )
        if found.verdict in (DIVERGES, ROUNDING):
            return replace(found, why=f"{text}. {found.why}")
        explained = (
            "each side agrees with its own operation in float64, so what came in differs: by less "
            "than this dtype's noise in every point before"
        )
        return replace(measured, verdict=DIVERGES, why=f"{text}; {explained}")

    def _judge(self, pair: Pair, measured: PointError) -> PointError:
        """Re-runs the operation in float64 from the inputs of both sides."""
        name = measured.name
        if name.startswith(TOWERS):
            return _of_tower(pair, measured)
        try:
            ours = self._operation(pair.model, self._model, name)
            theirs = self._operation(pair.reference, self._model, name)
        except NotCaptured as missing:
            return _without_inputs(measured, str(missing))
        if ours is None or theirs is None:
            return _without_inputs(measured, "the operation")
        got, expected = pair.model.values[name], pair.reference.values[name]
        bound = _broad(ours) + _broad(theirs)
        measured = replace(
            measured,
            bound=float(bound[measured.index]),
            output_error=_relative(theirs.value, expected),
        )
        off = _worst_excess(got, ours)
        if off is not None:
            return self._own_fault(pair, measured, off, bound, "model", ours)
        off = _worst_excess(expected, theirs)
        if off is not None:
            found = self._own_fault(pair, measured, off, bound, "reference", theirs)
            return self._weights(pair, found)
        scales = (pair.model.embed_scale, pair.reference.embed_scale)
        if name in ("embed", "per_layer_inputs.token") and scales[0] != scales[1]:
            size = self._config.hidden_size
            got_scale, expected_scale = (embed_scale(dtype, size) for dtype in scales)
            why = (
                f"the embedding is multiplied with √hidden_size, rounded to {scales[0]} in the "
                f"model ({got_scale:.7g}) and to {scales[1]} in the reference "
                f"({expected_scale:.7g})"
            )
            return replace(measured, verdict=DIVERGES, why=why)
        small = measured.error <= TOLERANCE * max(1.0, _largest(expected))
        return replace(measured, verdict=NOISE if small else AMPLIFIED)

    def _own_fault(
        self,
        pair: Pair,
        measured: PointError,
        index: tuple[int, ...],
        bound: np.ndarray,
        side: str,
        operation: Bounded,
    ) -> PointError:
        name = measured.name
        captured = pair.model if side == "model" else pair.reference
        value = float(captured.values[name][index])
        computed = float(operation.value[index])
        allowed = float(_broad(operation)[index])
        table = operation_of(name)
        source = table.reads if table else "its inputs"
        weights = "its own weights" if side == "model" else "the model's weights"
        why = (
            f"the {side}'s value {value:.7g} is {abs(value - computed):.3g} off the operation in "
            f"float64 from {source} with {weights} ({computed:.7g}); rounding explains "
            f"{allowed:.2g}"
        )
        return replace(
            _at(measured, pair, index),
            verdict=DIVERGES,
            bound=float(bound[index]),
            side=side,
            tensors=tuple(tensors_of(name, self._config)),
            why=why,
        )

    def _weights(self, pair: Pair, found: PointError) -> PointError:
        """The reference is not the operation with the model's weights: are its weights others?"""
        names = tensors_of(found.name, self._config)
        if self._reference is None:
            if self._rounded(found.name):
                return replace(
                    found,
                    verdict=ROUNDING,
                    why=f"{_listed(names)} rounded to {self._model.dtype(names[0])}; the reference "
                    "has no weights here to check that against",
                )
            hint = f": {_listed(names)} differ, or the reference computes it otherwise"
            return replace(found, why=found.why + (hint if names else ""))
        differences = [self.difference(name) for name in names]
        others = [d for d in differences if d.kind == "other"]
        if others:
            return replace(
                found,
                tensors=tuple(d.name for d in others),
                why="; ".join(d.text for d in others) + f". Seen where {found.why}",
            )
        rounded = [d for d in differences if d.kind == "rounding"]
        if rounded:
            again = self._operation(pair.reference, self._reference, found.name)
            expected = pair.reference.values[found.name]
            if again is not None and _worst_excess(expected, again) is None:
                return replace(
                    found,
                    verdict=ROUNDING,
                    side="",
                    tensors=tuple(d.name for d in rounded),
                    why="; ".join(d.text for d in rounded),
                )
        same = f" {_listed(names)} is the same on both sides:" if names else ""
        return replace(
            found,
            tensors=(),
            why=f"{found.why}.{same} the reference computes something else here",
        )

    def difference(self, name: str) -> WeightsDifference:
        """How a tensor differs between both sides; ValueError where the reference has none."""
        if self._reference is None:
            raise ValueError("the reference is a recording, which holds no weights")
        if name not in self._differences:
            self._differences[name] = compare_tensor(name, self._model, self._reference)
        return self._differences[name]

    def weight_error(self, name: str) -> float | None:
        """Norm of a tensor's difference relative to the reference's; None without its weights."""
        return None if self._reference is None else self.difference(name).relative

    def _rounded(self, name: str) -> bool:
        return any(self._model.dtype(t) not in PLAIN for t in tensors_of(name, self._config))

    def _operation(self, captured: Captured, tensors: Tensors, name: str) -> Bounded | None:
        operation = operation_of(name)
        if operation is None:
            return None
        layer, _ = split_name(name)
        return operation.compute(Context(captured, tensors, self._config, layer))

    def _experts(self, pair: Pair, name: str) -> PointError:
        """Chosen experts: either side must have taken its own most probable ones."""
        choices = other_choices(pair, split_name(name)[0])
        measured = _measure(pair, name)
        if not choices:
            return measured
        probs_name = name.replace("experts", "probs")
        for side, captured in (("model", pair.model), ("reference", pair.reference)):
            probs = captured.values.get(probs_name)
            if probs is None or pair.forced == side:
                continue
            row = _not_its_own(probs, captured.values[name])
            if row is not None:
                chosen = captured.values[name][row].tolist()
                return replace(
                    _at(measured, pair, (row, 0)),
                    verdict=DIVERGES,
                    side=side,
                    why=f"the {side} chose experts {chosen}, which are not those of its highest "
                    "probabilities",
                )
        first = max(choices, key=lambda choice: choice.gap)
        verdict = TIE if all(choice.is_tie for choice in choices) else AMPLIFIED
        found = _at(measured, pair, (first.position, 0))
        return replace(found, verdict=verdict, why=str(first))


@dataclass(frozen=True)
class OtherChoice:
    """A token that takes other experts on both sides."""

    layer: int
    prompt: int
    position: int
    model: tuple[int, ...]
    reference: tuple[int, ...]
    gap: float
    """How far the reference's probabilities of the experts in question lie apart."""
    noise: float
    """What explains a gap: 1e-5, or twice the error of the reference's own probabilities."""

    @property
    def is_tie(self) -> bool:
        return self.gap <= self.noise

    def __str__(self) -> str:
        kind = "near tie" if self.is_tie else "not a tie"
        return (
            f"layer {self.layer}, position {self.position}: experts {list(self.model)} against "
            f"{list(self.reference)}; the reference's probabilities are {self.gap:.2g} apart "
            f"({kind}: noise reaches {self.noise:.2g})"
        )


def other_choices(pair: Pair, layer: int) -> list[OtherChoice]:
    """The tokens whose experts differ in one layer, order included.

    Of a side that was forced to the other's experts, those count that it would have chosen.
    """
    name = f"layers.{layer}.router.experts"
    got = _own_choice(pair.model, name, pair.forced == "model")
    expected = _own_choice(pair.reference, name, pair.forced == "reference")
    probs = pair.reference.values.get(name.replace("experts", "probs"))
    own = (pair.baseline or {}).get(name.replace("experts", "probs"))
    choices = []
    for row in np.flatnonzero((got != expected).any(axis=-1)):
        gap = noise = float("inf")
        if probs is not None:
            # Of experts in another order the gap is that between neighbours.
            gap = float(np.abs(probs[row][got[row]] - probs[row][expected[row]]).max())
            noise = TIE_GAP
            if own is not None:
                noise = max(noise, 2 * float(np.abs(probs[row] - own[row]).max()))
        choices.append(
            OtherChoice(
                layer,
                pair.prompt,
                int(row),
                tuple(got[row].tolist()),
                tuple(expected[row].tolist()),
                gap,
                noise,
            )
        )
    return choices


def _own_choice(captured: Captured, name: str, forced: bool) -> np.ndarray:
    chosen = captured.values[name]
    probs = captured.values.get(name.replace("experts", "probs"))
    if not forced or probs is None:
        return chosen
    return np.argsort(-probs, axis=-1, kind="stable")[:, : chosen.shape[-1]]


def _not_its_own(probs: np.ndarray, chosen: np.ndarray) -> int | None:
    """The first row whose experts are not those of its highest probabilities."""
    index = chosen.astype(np.int64)
    left = np.array(probs, np.float64)
    np.put_along_axis(left, index, -np.inf, axis=-1)
    least = np.take_along_axis(probs, index, axis=-1).min(axis=-1)
    wrong = np.flatnonzero(left.max(axis=-1) > least)
    return int(wrong[0]) if len(wrong) else None


def _measure(pair: Pair, name: str) -> PointError:
    got, expected = pair.model.values[name], pair.reference.values[name]
    layer, point = split_name(name)
    difference = _difference(got, expected)
    finite = np.isfinite(expected)
    values = np.where(finite, expected, 0).astype(np.float64)
    index = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
    measured = PointError(
        name=name,
        layer=layer,
        point=point,
        verdict=EQUAL,
        error=float(difference.max(initial=0)),
        rms=_rms(difference),
        size=_rms(values),
        bound=None,
        prompt=pair.prompt,
        position=0,
        index=index,
        got=0.0,
        expected=0.0,
        elements=difference.size,
    )
    measured = _at(measured, pair, index)
    if pair.baseline is None or name not in pair.baseline or name.endswith("router.experts"):
        return measured
    own = _difference(expected, pair.baseline[name])
    rows = pair.same_rows(layer, point)
    noise = pair.model.engine.roundings.unit * measured.size
    own_rms = _rms(own[rows])
    rms = _rms(difference[rows])
    ratio = rms / max(own_rms, noise) if max(own_rms, noise) > 0 else float(rms > 0)
    return replace(measured, own=own_rms, ratio=ratio)


def _difference(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|got - expected| in float64; equal infinities differ by 0, NaN and other ones by infinity."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    difference = np.where(got == expected, 0.0, difference)
    return np.where(np.isnan(difference), np.inf, difference)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x[np.isfinite(x)]).max(initial=0))


def _relative(got: np.ndarray, want: np.ndarray) -> float | None:
    finite = np.isfinite(got) & np.isfinite(want)
    whole = _rms(np.where(finite, want, 0))
    off = np.where(finite, got, 0) - np.where(finite, want, 0)
    return _rms(off) / whole if whole else None


def _broad(x: Bounded) -> np.ndarray:
    return np.broadcast_to(x.error, x.value.shape)


def _worst_excess(got: np.ndarray, operation: Bounded) -> tuple[int, ...] | None:
    """The element furthest outside the bound; None where all lie within."""
    off = _difference(got, operation.value.reshape(got.shape))
    bound = _broad(operation).reshape(got.shape)
    outside = off > bound
    if not outside.any():
        return None
    excess = np.where(outside, off - bound, 0)
    return tuple(int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))


def _at(measured: PointError, pair: Pair, index: tuple[int, ...]) -> PointError:
    """Shows another element. Scores and patterns are [N, T, S]: the position is the query's."""
    scores = measured.point.endswith(("attn.scores", "attn.pattern"))
    got, expected = (s.values[measured.name] for s in (pair.model, pair.reference))
    return replace(
        measured,
        index=index,
        position=index[1] if scores else index[0],
        got=float(got[index]),
        expected=float(expected[index]),
    )


def _without_inputs(measured: PointError, missing: str) -> PointError:
    limit = TOLERANCE * max(1.0, abs(measured.expected), measured.size)
    if measured.error <= limit:
        return replace(measured, verdict=UNCHECKED)
    return replace(
        measured,
        verdict=DIVERGES,
        bound=limit,
        why=f"{missing} was not captured on both sides, so this or an operation before it; the "
        f"allowance is {TOLERANCE} of the largest value",
    )


def _of_tower(pair: Pair, measured: PointError) -> PointError:
    limit = TOLERANCE * max(1.0, _largest(pair.reference.values[measured.name]))
    if measured.error <= limit:
        return replace(measured, verdict=NOISE, bound=limit)
    if pair.model.engine.bfloat16_products or pair.reference.engine.bfloat16_products:
        why = 'products may be in bfloat16; load the model with dtype="float32" to compare towers'
        return replace(measured, verdict=UNCHECKED, bound=limit, why=why)
    return replace(
        measured,
        verdict=DIVERGES,
        bound=limit,
        why="this operation of the tower, or one before it, differs: they are not re-run in "
        f"float64, and the allowance is {TOLERANCE} of the largest value",
    )


def _products(layer: int) -> list[str]:
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    return [f"layers.{layer}.{name}.weight" for name in names]


def merge(first: PointError, second: PointError) -> PointError:
    """One point over two prompts: errors of both, the verdict and place of the worse."""
    worse = max(first, second, key=lambda p: (_SEVERITY.index(p.verdict), p.error))
    count = first.elements + second.elements

    def mean(a: float | None, b: float | None) -> float | None:
        if a is None or b is None:
            return a if b is None else b
        return float(((first.elements * a * a + second.elements * b * b) / count) ** 0.5)

    ratios = [p.ratio for p in (first, second) if p.ratio is not None]
    return replace(
        worse,
        error=max(first.error, second.error),
        rms=mean(first.rms, second.rms) or 0.0,
        size=mean(first.size, second.size) or 0.0,
        own=mean(first.own, second.own),
        ratio=max(ratios, default=None),
        output_error=mean(first.output_error, second.output_error),
        elements=count,
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if names else "no weights"
