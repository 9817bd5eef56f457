"""What the routers of a mixture-of-experts model chose, and what can be learned from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from gemloupe.errors import format_bytes, format_shape, quoted
from gemloupe.routing_drift import RouterDrift, jaccard, js_divergence
from gemloupe.routing_stats import (
    entropy,
    expert_counts,
    layer_index,
    load_columns,
    pair_counts,
    shares,
)
from gemloupe.table import Table
from gemloupe.token_classes import CLASSES, classify

_ROWS = ("experts", "weights", "weights_norm", "logits", "probs", "output_norms")
"""Fields [L, T, …]."""


class RoutedToken(NamedTuple):
    """One token that an expert handled; see `RouterTrace.tokens`."""

    row: int
    """Its row in the trace, 0 … T−1."""
    position: int
    """Its absolute position in its sequence."""
    id: int
    token: str
    choice: int
    """0 where the expert was the router's first choice."""
    weight: float
    """What its output was multiplied by."""


class _Load:
    """Two contracts meet in one name: an object's `load` is a figure, the class's reads a file."""

    @overload
    def __get__(self, trace: None, owner: type) -> Callable[[str | Path], RouterTrace]: ...
    @overload
    def __get__(self, trace: RouterTrace, owner: type) -> Callable[[], np.ndarray]: ...
    def __get__(self, trace: RouterTrace | None, owner: type) -> Callable[..., Any]:
        def read(path: str | Path) -> RouterTrace:
            """Reads what `save` wrote; ValueError for other files, FileNotFoundError for none."""
            from gemloupe import routing_files

            return routing_files.load(Path(path))

        def load() -> np.ndarray:
            """Share of the T · k choices that each expert got, float64 [L, E]; rows sum to 1."""
            assert trace is not None
            return shares(expert_counts(trace.experts, trace.num_experts))

        return read if trace is None else load


@dataclass(frozen=True, eq=False)
class RouterTrace:
    """Every choice of the routers in one pass, or in several, joined with `+` or `sum`.

    L layers with experts (their numbers in the model: `layers`), T tokens, E experts, k chosen a
    token, best first. Arrays are read-only. What is written here as a share or a probability lies
    in 0 … 1; entropies and divergences are in nats. Methods that need the probabilities raise
    ValueError at level "experts".
    """

    experts: np.ndarray
    """int32 [L, T, k]: the experts chosen."""
    weights: np.ndarray
    """float32 [L, T, k]: `weights_norm` times per_expert_scale; the outputs' factors."""
    weights_norm: np.ndarray
    """float32 [L, T, k]: the chosen probabilities, divided by their sum."""
    ids: np.ndarray
    """int32 [T]: the token ids."""
    positions: np.ndarray
    """int64 [T]: their absolute positions."""
    layers: np.ndarray
    """int64 [L]: the model's numbers of the layers with experts."""
    num_experts: int
    """E."""
    logits: np.ndarray | None = None
    """float32 [L, T, E], before the softmax; None at level "experts"."""
    probs: np.ndarray | None = None
    """float32 [L, T, E]: softmax over all experts; None at level "experts"."""
    output_norms: np.ndarray | None = None
    """float32 [L, T, k]: L2 norms of the chosen experts' outputs, before their weights; or None."""
    mean_outputs: Mapping[int, np.ndarray] | None = None
    """Layer number -> float32 [E, D]: mean output of each expert where it was chosen, NaN where it
    never was. None before `with_outputs`."""
    token_source: Callable[[], list[str]] | None = field(default=None, repr=False)
    """Gives `token_strings` when they are first asked for."""

    def __post_init__(self) -> None:
        if self.experts.ndim != 3 or self.ids.ndim != 1:
            raise ValueError(
                f"experts are {format_shape(self.experts.shape)} and ids "
                f"{format_shape(self.ids.shape)}; expected [L, T, k] and [T]"
            )
        layers, rows, chosen = self.experts.shape
        expected = {
            name: (layers, rows, self.num_experts if name in ("logits", "probs") else chosen)
            for name in _ROWS
        }
        for name, shape in {
            **expected,
            "ids": (rows,),
            "positions": (rows,),
            "layers": (layers,),
        }.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(
                    f"{name} is {format_shape(array.shape)}; expected {format_shape(shape)}, since "
                    f"experts are {format_shape(self.experts.shape)} of {self.num_experts}"
                )
        if (
            self.experts.size
            and not 0 <= self.experts.min() <= self.experts.max() < self.num_experts
        ):
            raise ValueError(
                f"experts hold {self.experts.min()} … {self.experts.max()}; expected 0 … "
                f"{self.num_experts - 1}"
            )
        for layer, means in (self.mean_outputs or {}).items():
            layer_index(self.layers, layer)
            if means.ndim != 2 or len(means) != self.num_experts:
                raise ValueError(
                    f"mean_outputs of layer {layer} are {format_shape(means.shape)}; expected "
                    f"[{self.num_experts}, D]"
                )
        for array in self._arrays():
            array.flags.writeable = False

    def _arrays(self) -> list[np.ndarray]:
        arrays = [getattr(self, name) for name in (*_ROWS, "ids", "positions", "layers")]
        arrays += (self.mean_outputs or {}).values()
        return [array for array in arrays if array is not None]

    @property
    def level(self) -> str:
        """ "full" or "experts"."""
        return "experts" if self.probs is None else "full"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays())

    def __len__(self) -> int:
        """T."""
        return len(self.ids)

    @cached_property
    def token_strings(self) -> list[str]:
        """The vocabulary's piece of each token [T]; "<id 5>" where there is no tokenizer."""
        try:
            strings = self.token_source() if self.token_source else None
        except FileNotFoundError:  # A checkpoint without a tokenizer works on ids.
            strings = None
        return list(strings) if strings is not None else [f"<id {i}>" for i in self.ids.tolist()]

    @cached_property
    def token_classes(self) -> np.ndarray:
        """The class of each token, str [T]: "digits", "words", … (`token_classes.CLASSES`)."""
        return classify(self.token_strings)

    load = _Load()
    """`trace.load()`: share of the T · k choices that went to each expert, float64 [L, E], rows
    summing to 1. `RouterTrace.load(path)`: reads what `save` wrote."""

    def entropy(self) -> np.ndarray:
        """Entropy of the router's probabilities in nats, float64 [L, T]; ValueError without them.

        ln E where the router finds all experts equally good.
        """
        return np.stack([entropy(probs) for probs in self._needs_probs("entropy()")])

    def coactivation(self, layer: int) -> np.ndarray:
        """Tokens that chose both experts in a layer, int64 [E, E]; the diagonal: chose the expert.

        ValueError where the layer has no experts.
        """
        return pair_counts(self.experts[layer_index(self.layers, layer)], self.num_experts)

    def tokens(self, layer: int, expert: int) -> list[RoutedToken]:
        """The tokens that a layer sent to an expert, in order; ValueError for unknown ones."""
        index = layer_index(self.layers, layer)
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert is {expert!r}; expected 0 … {self.num_experts - 1}")
        rows, choices = np.nonzero(self.experts[index] == expert)
        strings = self.token_strings
        return [
            RoutedToken(
                row=row,
                position=int(self.positions[row]),
                id=int(self.ids[row]),
                token=strings[row],
                choice=choice,
                weight=float(self.weights[index, row, choice]),
            )
            for row, choice in zip(rows.tolist(), choices.tolist(), strict=True)
        ]

    def table(self, by: str | Sequence[str] = "layer", top: int = 3) -> Table:
        """A summary: `by` "layer", by token "class", or by labels [T] of your own.

        By layer: how evenly experts are used, and at level "full" how sure the router is. By
        class: for each layer and class of tokens the `top` experts that handle most of it. There,
        share is the share of the class's choices, load the expert's share of all choices, and
        lift = share / load: above 1 where the expert prefers the class. With few tokens a high
        lift is chance: look at `tokens`.
        """
        if isinstance(by, str) and by == "layer":
            return self._layer_table()
        if isinstance(by, str):
            if by != "class":
                raise ValueError(f'by is {quoted(by)}; expected "layer", "class", or labels [T]')
            return self._class_table(self.token_classes, CLASSES, top)
        labels = np.asarray(by, dtype=str)
        if labels.shape != self.ids.shape:
            raise ValueError(
                f"by has the shape {format_shape(labels.shape)}; expected one label for each of "
                f"the {len(self)} tokens"
            )
        return self._class_table(labels, np.unique(labels).tolist(), top)

    def _layer_table(self) -> Table:
        columns = load_columns(self.layers, self.load())
        if self.probs is not None:
            columns["router entropy"] = _row_means(self.entropy())
        columns["first weight"] = _row_means(self.weights_norm[:, :, 0])
        return Table(columns)

    def _class_table(self, labels: np.ndarray, order: Sequence[str], top: int) -> Table:
        load = self.load()
        counts = {label: int((labels == label).sum()) for label in order}
        parts = {label: self.select(labels == label).load() for label in order if counts[label]}
        rows = []
        for index, layer in enumerate(self.layers.tolist()):
            for label, part in parts.items():
                for expert in np.argsort(-part[index], kind="stable")[:top].tolist():
                    if share := float(part[index, expert]):
                        whole = float(load[index, expert])
                        rows.append(
                            (layer, label, counts[label], expert, share, whole, share / whole)
                        )
        names = ("layer", "class", "tokens", "expert", "share", "load", "lift")
        return Table(
            dict(zip(names, zip(*rows, strict=True), strict=True))
            if rows
            else {n: [] for n in names}
        )

    def select(self, rows: Any) -> RouterTrace:
        """The trace of some tokens: a slice, indices or a boolean mask of rows 0 … T−1.

        `trace.select(trace.token_classes == "digits").load()` is the load of digits alone. Mean
        outputs are left out: they are of all tokens.
        """
        kept = np.arange(len(self))[rows].reshape(-1)
        changed = {
            name: array[:, kept] for name in _ROWS if (array := getattr(self, name)) is not None
        }
        return dataclasses.replace(
            self,
            **changed,
            ids=self.ids[kept],
            positions=self.positions[kept],
            mean_outputs=None,
            token_source=lambda: [self.token_strings[row] for row in kept.tolist()],
        )

    def with_outputs(self, captured: Mapping[str, np.ndarray]) -> RouterTrace:
        """The trace with mean outputs, for `gl.edits.ablate_experts(ids, mode="mean", means=)`.

        `captured` has `layers.{i}.experts.each` [T, k, D] of one or more layers, of these tokens:
        `run.routing.with_outputs(run.captured)`. Traces so made add up. ValueError where it has
        none, or of another shape.
        """
        means: dict[int, np.ndarray] = {}
        for index, layer in enumerate(self.layers.tolist()):
            name = f"layers.{layer}.experts.each"
            if name not in captured:
                continue
            outputs = np.asarray(captured[name], np.float32)
            shape = self.experts.shape[1:]
            if outputs.ndim != 3 or outputs.shape[:2] != shape:
                raise ValueError(
                    f"{name} is {format_shape(outputs.shape)}; expected [{shape[0]}, {shape[1]}, D]"
                )
            means[layer] = _mean_by_expert(outputs, self.experts[index], self.num_experts)
        if not means:
            raise ValueError(
                'no experts.each was captured; run with capture="layers.*.experts.each"'
            )
        return dataclasses.replace(self, mean_outputs=means)

    def __add__(self, other: object) -> RouterTrace:
        """This trace's tokens and then the other's; `sum(traces)` works."""
        return (
            RouterTrace.concatenate([self, other])
            if isinstance(other, RouterTrace)
            else NotImplemented
        )

    def __radd__(self, other: object) -> RouterTrace:
        return self if isinstance(other, int) and other == 0 else NotImplemented

    @staticmethod
    def concatenate(traces: Iterable[RouterTrace]) -> RouterTrace:
        """All traces' tokens in order, at the level that all have; faster than `sum` for many.

        ValueError where there is none, or where layers, experts or experts a token differ.
        """
        parts = list(traces)
        if not parts:
            raise ValueError("there are no traces to join; expected at least one")
        first = parts[0]
        for part in parts[1:]:
            _check_alike(first, part, same_choices=True)
        joined: dict[str, Any] = {}
        for name in _ROWS:
            arrays = [getattr(part, name) for part in parts]
            joined[name] = None if any(a is None for a in arrays) else np.concatenate(arrays, 1)
        return RouterTrace(
            **joined,
            ids=np.concatenate([part.ids for part in parts]),
            positions=np.concatenate([part.positions for part in parts]),
            layers=first.layers,
            num_experts=first.num_experts,
            mean_outputs=_joined_means(parts),
            token_source=lambda: [token for part in parts for token in part.token_strings],
        )

    def drift(self, other: RouterTrace) -> RouterDrift:
        """How differently `other` routed the same tokens, such as under an adapter.

        ValueError where ids, layers or the number of experts differ. For two prompts, compare
        what they share, `a.select(rows).drift(b.select(rows))`, or their loads.
        """
        _check_alike(self, other, same_choices=False)
        _check_same_ids(self.ids, other.ids)
        js = None
        if self.probs is not None and other.probs is not None:
            pairs = zip(self.probs, other.probs, strict=True)
            js = np.stack([js_divergence(p, q) for p, q in pairs])
        return RouterDrift(
            layers=self.layers,
            jaccard=np.stack(
                [jaccard(a, b) for a, b in zip(self.experts, other.experts, strict=True)]
            ),
            js=js,
            load_change=other.load() - self.load(),
            token_strings=self.token_strings,
        )

    def replay(self, positions: Any = None) -> dict[str, Any]:
        """Edits that force these experts and weights: `model.run(ids, edit=trace.replay())`.

        `positions`: absolute ones of this trace (negative ones from its end), a slice of them, or
        a mask [T]; None is all. ValueError for positions that it lacks, and for a trace of several
        sequences, whose positions repeat.
        """
        from gemloupe.edits import set as edit_set

        if len(np.unique(self.positions)) != len(self):
            raise ValueError(
                "the trace holds several sequences: positions repeat; replay the trace of one run"
            )
        rows = np.arange(len(self)) if positions is None else self._rows_at(positions)
        where = self.positions[rows].tolist()
        edits: dict[str, Any] = {}
        for index, layer in enumerate(self.layers.tolist()):
            for name, values in (("experts", self.experts), ("weights", self.weights)):
                edits[f"layers.{layer}.router.{name}"] = edit_set(
                    values[index, rows], positions=where
                )
        return edits

    def _rows_at(self, positions: Any) -> np.ndarray:
        end = int(self.positions[-1]) + 1
        if isinstance(positions, slice):
            first, last, step = positions.indices(end)
            return np.flatnonzero(np.isin(self.positions, np.arange(first, last, step)))
        wanted = np.atleast_1d(np.asarray(positions))
        if wanted.dtype == bool and wanted.shape == self.positions.shape:
            return np.flatnonzero(wanted)
        if wanted.ndim != 1 or not np.issubdtype(wanted.dtype, np.integer):
            raise ValueError(
                f"positions are {quoted(positions)}; expected whole numbers, a slice, or a mask of "
                f"the {len(self)} tokens"
            )
        wanted = np.where(wanted < 0, wanted + end, wanted)
        row_of = {position: row for row, position in enumerate(self.positions.tolist())}
        absent = [position for position in wanted.tolist() if position not in row_of]
        if absent:
            raise ValueError(
                f"positions {absent[:10]} are not in the trace; expected some of "
                f"{self.positions.min()} … {self.positions.max()}"
            )
        return np.array([row_of[position] for position in wanted.tolist()], np.int64)

    def save(self, path: str | Path) -> None:
        """Writes a .parquet (needs the extra `parquet`) or .safetensors file; bits are kept.

        Parquet: one row for each layer, token and choice, with the columns layer, row, position,
        id, token, choice, expert, weight_norm, weight, output_norm; at level "full" choice 0 also
        has the lists logits and probs. Mean outputs need safetensors. An old file is replaced.
        """
        from gemloupe import routing_files

        routing_files.save(self, Path(path))

    def plot(self, layer: int | None = None, ax: Any = None) -> Any:
        """Plots the load, or what one layer chose for each token; see `gl.plot.routing`."""
        from gemloupe.plot.routing import routing

        return routing(self, layer=layer, ax=ax)

    def _needs_probs(self, what: str) -> np.ndarray:
        if self.probs is None:
            raise ValueError(
                f'{what} needs the router\'s probabilities, but this trace has level "experts"; '
                'run again with routing="full"'
            )
        return self.probs

    def _summary(self) -> list[tuple[str, str]]:
        chosen = self.experts.shape[2]
        return [
            ("tokens", str(len(self))),
            ("layers", f"{len(self.layers)} with experts"),
            ("experts", f"{chosen} of {self.num_experts} a token"),
            ("level", f"{self.level}, {format_bytes(self.nbytes)}"),
        ]

    def __repr__(self) -> str:
        lines = [f"  {name:<7}  {value}" for name, value in self._summary()]
        return "\n".join(["RouterTrace", *lines, str(self.table())])

    def _repr_html_(self) -> str:
        text = ", ".join(f"{name} {value}" for name, value in self._summary())
        return f"<p>RouterTrace: {text}</p>{self.table()._repr_html_()}"

    def __getstate__(self) -> dict[str, Any]:
        """Strings instead of the function that would give them, which may hold a tokenizer."""
        strings = self.token_strings
        return {**vars(self), "token_strings": strings, "token_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _row_means(values: np.ndarray) -> list[float]:
    return (values.sum(-1, dtype=np.float64) / max(values.shape[-1], 1)).tolist()


def _check_alike(a: RouterTrace, b: RouterTrace, *, same_choices: bool) -> None:
    if not np.array_equal(a.layers, b.layers) or a.num_experts != b.num_experts:
        raise ValueError(
            f"the traces have {a.num_experts} experts in layers {a.layers.tolist()} and "
            f"{b.num_experts} in {b.layers.tolist()}; expected traces of one architecture"
        )
    if same_choices and a.experts.shape[2] != b.experts.shape[2]:
        raise ValueError(
            f"the traces have {a.experts.shape[2]} and {b.experts.shape[2]} experts a token; "
            "expected equal numbers"
        )


def _check_same_ids(a: np.ndarray, b: np.ndarray) -> None:
    if len(a) != len(b):
        raise ValueError(f"the traces have {len(a)} and {len(b)} tokens; expected the same ids")
    if len(different := np.flatnonzero(a != b)):
        row = int(different[0])
        raise ValueError(
            f"the traces differ in {len(different)} of {len(a)} ids, first in row {row}: {a[row]} "
            f"and {b[row]}; expected the same ids"
        )


def _mean_by_expert(outputs: np.ndarray, experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Mean [E, D] of outputs [T, k, D] by expert [T, k]; NaN for experts that none chose."""
    means = np.full((num_experts, outputs.shape[-1]), np.nan, np.float32)
    for expert in np.unique(experts):
        means[expert] = outputs[experts == expert].mean(0, dtype=np.float64)
    return means


def _joined_means(parts: Sequence[RouterTrace]) -> dict[int, np.ndarray] | None:
    """Means of all parts' outputs in the layers that all have, weighted by their choices."""
    layers = set.intersection(*(set(part.mean_outputs or ()) for part in parts))
    joined: dict[int, np.ndarray] = {}
    for layer in sorted(layers):
        index = layer_index(parts[0].layers, layer)
        total: Any = 0
        count: Any = 0
        for part in parts:
            counts = expert_counts(part.experts[index : index + 1], part.num_experts)[0, :, None]
            assert part.mean_outputs is not None
            total = total + np.where(counts > 0, part.mean_outputs[layer], 0.0) * counts
            count = count + counts
        means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        joined[layer] = means.astype(np.float32)
    return joined or None
