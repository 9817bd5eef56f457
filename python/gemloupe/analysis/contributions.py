"""The residual stream after the last layer as a sum of what each component wrote into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.analysis import arguments
from gemloupe.errors import one_of, quoted

if TYPE_CHECKING:
    from gemloupe.model import Model
    from gemloupe.run import Run

SPLITS = ("head", "expert")
"""Into what attention and feed-forward outputs can be split."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one component added to the residual stream, as it arrives after the last layer."""

    name: str
    """"embed", "layers.3.attn.post", "layers.3.attn.head.2", "layers.3.experts.17", …"""
    kind: str
    """"embed", "attn", "ffn", "per_layer"; split: "head", "mlp", "expert"."""
    layer: int
    """−1 for the embedding."""
    index: int
    """Head or expert; −1 for a whole component."""
    vector: np.ndarray
    """float32 [n, D], times the layer_scalars of its own and all later layers."""


def contribution_points(model: Model, split: str | Iterable[str] = ()) -> list[str]:
    """Returns what to capture for `contributions` and `attribution` of this model."""
    asked = check_split(split, model)
    points = ["embed", "layers.*.attn.post", "layers.*.ffn.post"]
    if model.config.text.hidden_size_per_layer_input:
        points.append("layers.*.per_layer.post")
    if "head" in asked:
        points += ["layers.*.attn.z", "layers.*.attn.out"]
    if "expert" in asked:
        points += [
            "layers.*.mlp.post", "layers.*.experts.each", "layers.*.experts.out",
            "layers.*.router.experts", "layers.*.router.weights", "layers.*.ffn.out",
        ]  # fmt: skip
    return [*points, f"layers.{model.config.text.num_hidden_layers - 1}.resid_post"]


def contributions(
    run: Run,
    *,
    model: Model | None = None,
    positions: Any = None,
    split: str | Iterable[str] = (),
) -> Iterator[Contribution]:
    """Yields the terms whose sum is the last layer's `resid_post`, in model order.

    Each layer computes x ← (x + attn.post + ffn.post + per_layer.post) · layer_scalar, so that a
    term of layer i arrives times the layer_scalars of layers i, i + 1, …, and the embedding times
    all of them.

    `split="head"`: attention by head. `attn.result` where captured, else attn.z times the columns
    of o_proj, through post_attention_layernorm with the divisor that it had (a linear map then).
    `split="expert"`: feed-forward of a mixture-of-experts layer as the dense "mlp" and the experts
    chosen at any of the positions, through both norms with their divisors. Or both, as a tuple.
    With quantised o_proj the products of `attn.z` round differently than the engine's: the heads
    then sum to attn.post up to that rounding. The sum does not hold for a run whose residual
    stream was edited.

    `positions`: which; None for all that were captured. KeyError naming what to capture.
    """
    model = arguments.model_of(run, model, "contributions")
    asked = check_split(split, model)
    reader = _Reader(run, model, positions, asked)
    scalars = [
        float(model.weights[f"layers.{layer}.layer_scalar"][0])
        for layer in range(model.config.text.num_hidden_layers)
    ]
    # after[i]: the product of layer_scalars from layer i on.
    after = np.cumprod(np.array(scalars[::-1]))[::-1].astype(np.float32)
    yield Contribution("embed", "embed", -1, -1, after[0] * reader("embed"))
    for layer, scale in enumerate(after):
        for kind, parts in _layer_parts(layer, reader, model, asked):
            for name, index, vector in parts:
                yield Contribution(f"layers.{layer}.{name}", kind, layer, index, scale * vector)


def check_split(split: str | Iterable[str], model: Model) -> tuple[str, ...]:
    """Returns `split` as a tuple; ValueError for a name that is none or has nothing to split."""
    asked = (split,) if isinstance(split, str) else tuple(split)
    for name in asked:
        if name not in SPLITS:
            raise ValueError(f"split is {quoted(split)}; expected {one_of(SPLITS)}, or both")
        if name == "expert" and not model.config.text.num_experts:
            raise ValueError('split is "expert", but this model has no experts; leave it out')
    return asked


class _Reader:
    """Rows of captured activations at the chosen positions."""

    def __init__(self, run: Run, model: Model, positions: Any, split: tuple[str, ...]) -> None:
        self._run = run
        self._model = model
        self._split = split
        self._positions = positions

    def __call__(self, name: str) -> np.ndarray:
        points = contribution_points(self._model, self._split)
        array = arguments.captured(self._run, name, points, "contributions")
        return array[arguments.rows_of(self._run, name, self._positions)]

    def has(self, name: str) -> bool:
        return name in self._run.captured


_Parts = Iterable[tuple[str, int, np.ndarray]]


def _layer_parts(
    layer: int, reader: _Reader, model: Model, split: tuple[str, ...]
) -> Iterator[tuple[str, _Parts]]:
    prefix = f"layers.{layer}."
    if "head" in split:
        yield "head", _heads(layer, reader, model)
    else:
        yield "attn", [("attn.post", -1, reader(prefix + "attn.post"))]
    if "expert" in split and model.config.text.layers[layer].has_experts:
        out = reader(prefix + "ffn.out")
        through = _frozen_norm(layer, "post_feedforward_layernorm", out, model)
        yield "mlp", [("mlp.post", -1, through(reader(prefix + "mlp.post")))]
        yield "expert", _experts(layer, reader, model, through)
    else:
        yield "ffn", [("ffn.post", -1, reader(prefix + "ffn.post"))]
    if model.config.text.hidden_size_per_layer_input:
        yield "per_layer", [("per_layer.post", -1, reader(prefix + "per_layer.post"))]


def _frozen_norm(
    layer: int, norm: str, normed: np.ndarray, model: Model
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the norm as the linear map that it was on `normed` [n, D]."""
    weight = model.weights[f"layers.{layer}.{norm}.weight"]
    divisor = rms(normed, model.config.text.rms_norm_eps)[:, None]
    return lambda part: part * (weight / divisor)


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    """Returns the divisor of RMSNorm, √(mean(x²) + eps) [n], of rows [n, D]."""
    return np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1) + eps).astype(np.float32)


def _heads(layer: int, reader: _Reader, model: Model) -> _Parts:
    prefix = f"layers.{layer}.attn."
    if reader.has(prefix + "result"):
        results = reader(prefix + "result")  # [n, N, D]
        out = results.sum(axis=1)
    else:
        z = reader(prefix + "z")  # [n, N, H]
        weight = model.weights[f"layers.{layer}.self_attn.o_proj.weight"]
        columns = weight.reshape(len(weight), *z.shape[1:])  # [D, N, H]
        results = np.stack([z[:, n] @ columns[:, n].T for n in range(z.shape[1])], axis=1)
        out = reader(prefix + "out")
    through = _frozen_norm(layer, "post_attention_layernorm", out, model)
    for head in range(results.shape[1]):
        yield f"attn.head.{head}", head, through(results[:, head])


def _experts(
    layer: int, reader: _Reader, model: Model, through: Callable[[np.ndarray], np.ndarray]
) -> _Parts:
    prefix = f"layers.{layer}."
    chosen = reader(prefix + "router.experts")  # [n, k]
    weights = reader(prefix + "router.weights")
    each = reader(prefix + "experts.each")  # [n, k, D]
    out = reader(prefix + "experts.out")
    inner = _frozen_norm(layer, "post_feedforward_layernorm_2", out, model)
    for expert in np.unique(chosen):
        own = np.where(chosen == expert, weights, 0.0)
        written = np.einsum("nk,nkd->nd", own, each)
        yield f"experts.{expert}", int(expert), through(inner(written))
