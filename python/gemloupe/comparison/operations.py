"""Each hook point as the operation that makes it, in float64, from the points that it reads.

One line a point, in the order of the layer; the formulas are those of transformers 5.23's
`modeling_gemma4.py`. Inputs are the numbers that one engine captured, so a result that lies
outside the bound is that engine's own doing, and not its inputs'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemloupe.comparison import tensors as weights
from gemloupe.comparison.bounded import FLOAT32, Bounded, exact
from gemloupe.comparison.engines import Engine
from gemloupe.comparison.tensors import Tensors
from gemloupe.embed_scale import embed_scale

if TYPE_CHECKING:
    from gemloupe.comparison.media import MediaRows
    from gemloupe.config import LayerConfig, TextConfig


class NotCaptured(Exception):
    """A point that the operation reads was not captured; the message is its name."""


@dataclass(frozen=True, eq=False)
class Captured:
    """What one engine gave for one prompt."""

    values: Mapping[str, np.ndarray]
    ids: np.ndarray
    engine: Engine
    embed_scale: str
    """The dtype that √hidden_size was rounded to."""
    media: MediaRows | None = None
    """What stands beside words."""

    @property
    def looked_up(self) -> np.ndarray:
        """The ids whose embeddings are read: padding where media stand."""
        if self.media is None:
            return self.ids
        ids = self.ids.copy()
        ids[self.media.rows] = self.media.padding_id
        return ids


@dataclass(frozen=True, eq=False)
class Context:
    """One layer (-1 outside) of one engine's captures, with the weights to apply."""

    captured: Captured
    tensors: Tensors
    config: TextConfig
    layer: int

    @property
    def spec(self) -> LayerConfig:
        return self.config.layers[self.layer]

    def full(self, name: str) -> str:
        return f"layers.{self.layer}.{name}"

    def at(self, name: str) -> Bounded:
        """A captured point of the whole model."""
        try:
            return exact(self.captured.values[name])
        except KeyError:
            raise NotCaptured(name) from None

    def __call__(self, name: str) -> Bounded:
        """A captured point of this layer."""
        return self.at(self.full(name))

    def indices(self, name: str) -> np.ndarray:
        return self.at(self.full(name)).value.astype(np.int64)

    def vector(self, name: str) -> np.ndarray:
        return weights.vector(self.tensors, self.full(name))

    def norm(self, x: Bounded, name: str | None) -> Bounded:
        weight = None if name is None else weights.vector(self.tensors, name)
        return self.captured.engine.roundings.rms_norm(x, weight, self.config.rms_norm_eps)

    def product(self, x: Bounded, name: str, begin: int = 0, end: int | None = None) -> Bounded:
        """x times rows begin…end of a matrix, transposed."""
        engine = self.captured.engine
        read = engine.product_input(x, self.tensors.dtype(name))
        return engine.roundings.linear(read, lambda: weights.blocks(self.tensors, name, begin, end))


@dataclass(frozen=True)
class Operation:
    """How a point is made; `tensors` are the weights that it applies, by name within the layer."""

    compute: Callable[[Context], Bounded]
    tensors: tuple[str, ...] = ()
    reads: str = ""
    """The point before it, for texts."""


def _norm(source: str, tensor: str) -> Operation:
    return Operation(lambda c: c.norm(c(source), c.full(tensor)), (tensor,), source)


def _product(source: str, tensor: str) -> Operation:
    return Operation(lambda c: c.product(c(source), c.full(tensor)), (tensor,), source)


def _heads(source: str, tensor: str) -> Operation:
    def compute(c: Context) -> Bounded:
        flat = c.product(c(source), c.full(tensor))
        return flat.reshape(len(flat.value), -1, c.spec.head_dim)

    return Operation(compute, (tensor,), source)


def _sum(first: str, second: str) -> Operation:
    return Operation(
        lambda c: c.captured.engine.roundings.add(c(first), c(second)), (), f"{first} and {second}"
    )


def _gelu_times(gate: str, up: str) -> Operation:
    return Operation(
        lambda c: c.captured.engine.roundings.gelu_times(c(gate), c(up)), (), f"{gate} and {up}"
    )


def _embed(c: Context) -> Bounded:
    rows = weights.gather(c.tensors, "embed_tokens.weight", c.captured.looked_up)
    factor = embed_scale(c.captured.embed_scale, c.config.hidden_size)
    scaled = c.captured.engine.roundings.scale(exact(rows), factor)
    media = c.captured.media
    if media is None:
        return scaled
    value, error = scaled.value.copy(), np.broadcast_to(scaled.error, scaled.value.shape).copy()
    value[media.rows], error[media.rows] = media.soft_tokens, 0.0
    return Bounded(value, error)


def _token_part(c: Context) -> Bounded:
    rows = weights.gather(c.tensors, "embed_tokens_per_layer.weight", c.captured.looked_up)
    size = c.config.hidden_size_per_layer_input
    rows = rows.reshape(len(rows), c.config.num_hidden_layers, size)
    return c.captured.engine.roundings.scale(exact(rows), embed_scale(c.captured.embed_scale, size))


def _projected_context(c: Context) -> Bounded:
    flat = c.product(c.at("embed"), "per_layer_model_projection.weight")
    shape = (len(flat.value), c.config.num_hidden_layers, c.config.hidden_size_per_layer_input)
    scaled = c.captured.engine.roundings.scale(flat, c.config.hidden_size**-0.5, times=2)
    return scaled.reshape(*shape)


def _context_part(c: Context) -> Bounded:
    return c.norm(_projected_context(c), "per_layer_projection_norm.weight")


def _per_layer_inputs(c: Context) -> Bounded:
    parts = []
    for name, compute in (("token", _token_part), ("context", _context_part)):
        full = f"per_layer_inputs.{name}"
        parts.append(c.at(full) if full in c.captured.values else compute(c))
    rounding = c.captured.engine.roundings
    return rounding.scale(rounding.add(*parts), 2**-0.5, times=2)


def _resid_pre(c: Context) -> Bounded:
    return c.at(f"layers.{c.layer - 1}.resid_post") if c.layer else c.at("embed")


def _angles(c: Context) -> np.ndarray:
    """float32 products of position and inverse frequency, [T, H/2] as float64."""
    spec = c.spec
    exponents = np.arange(0, 2 * spec.rotary_pairs, 2, dtype=np.float32) / np.float32(spec.head_dim)
    frequencies = np.zeros(spec.head_dim // 2, np.float32)
    frequencies[: spec.rotary_pairs] = (
        np.float32(1) / np.float32(spec.rope_theta) ** exponents / np.float32(spec.rope_factor)
    )
    positions = np.arange(len(c.captured.ids), dtype=np.float32)
    return (positions[:, None] * frequencies).astype(np.float64)


def _rotated(source: str) -> Operation:
    return Operation(
        lambda c: c.captured.engine.roundings.rotate(c(source), _angles(c)), (), source
    )


def _v_proj(c: Context) -> Bounded:
    if c.spec.values_are_keys:
        return c("attn.k_proj")
    return _heads("attn.norm", "self_attn.v_proj.weight").compute(c)


def _cached_values(c: Context) -> Bounded:
    return c.captured.engine.cached(c.at(f"layers.{c.spec.kv_source}.attn.v"))


def _cached_keys(c: Context) -> Bounded:
    source = c.spec.kv_source
    keys = c.captured.engine.cached(c.at(f"layers.{source}.attn.rot_k"))
    if not c.spec.values_are_keys or c.captured.engine.kv_dtype in (None, "float32"):
        return keys
    # K = V layers store values and derive most of the keys from them.
    weight = np.abs(weights.vector(c.tensors, f"layers.{source}.self_attn.k_norm.weight"))
    stored = _cached_values(c)
    return Bounded(keys.value, keys.error + weight * stored.error + 4 * FLOAT32 * abs(keys.value))


def _visible(c: Context) -> np.ndarray:
    """bool [T queries, S keys]; a window counts the query itself, or each side's distance."""
    positions = np.arange(len(c.captured.ids))
    distance = positions[:, None] - positions[None, :]
    window = c.spec.window
    if c.config.bidirectional == "all":
        return np.abs(distance) <= window if window else np.full(distance.shape, True)
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    media = c.captured.media
    for begin, end in media.blocks if media is not None and window else ():
        seen[begin:end, begin:end] = distance[begin:end, begin:end] < window
    return seen


def _captured_or(name: str, compute: Callable[[Context], Bounded]) -> Callable[[Context], Bounded]:
    return lambda c: c(name) if c.full(name) in c.captured.values else compute(c)


def _scores(c: Context) -> Bounded:
    keys = _captured_or("attn.keys", _cached_keys)(c)
    scores = c.captured.engine.roundings.scores(c("attn.rot_q"), keys)
    seen = _visible(c)
    return Bounded(np.where(seen, scores.value, -np.inf), np.where(seen, scores.error, 0))


def _pattern(c: Context) -> Bounded:
    scores = _captured_or("attn.scores", _scores)(c)
    return c.captured.engine.roundings.softmax(scores)


def _z(c: Context) -> Bounded:
    pattern = _captured_or("attn.pattern", _pattern)(c)
    values = _captured_or("attn.values", _cached_values)(c)
    return c.captured.engine.roundings.attend(pattern, values)


def _attn_result(c: Context) -> Bounded:
    z, name = c("attn.z"), c.full("self_attn.o_proj.weight")
    engine = c.captured.engine
    head = c.spec.head_dim
    read = engine.product_input(z.reshape(len(z.value), -1), c.tensors.dtype(name))
    read = read.reshape(*z.value.shape)
    parts = []
    for n in range(z.value.shape[1]):

        def columns(n: int = n):  # type: ignore[no-untyped-def]
            for begin, end, rows in weights.blocks(c.tensors, name):
                yield begin, end, rows[:, n * head : (n + 1) * head]

        parts.append(engine.roundings.linear(read[:, n], columns))
    value = np.stack([part.value for part in parts], axis=1)
    return Bounded(value, np.stack([part.error for part in parts], axis=1))


def _attn_out(c: Context) -> Bounded:
    z = c("attn.z")
    return c.product(z.reshape(len(z.value), -1), c.full("self_attn.o_proj.weight"))


def _router_norm(c: Context) -> Bounded:
    unit = c.norm(c("resid_mid"), None)
    rounding = c.captured.engine.roundings
    scaled = rounding.scale(unit, c.vector("router.scale"))
    return rounding.scale(scaled, c.config.hidden_size**-0.5, times=2)


def _router_probs(c: Context) -> Bounded:
    probs = c.captured.engine.roundings.softmax(c("router.logits"))
    return Bounded(probs.value, probs.error)


def _weights_norm(c: Context) -> Bounded:
    probs, experts = c("router.probs"), c.indices("router.experts")
    chosen = np.take_along_axis(probs.value, experts, axis=-1)
    value = chosen / chosen.sum(axis=-1, keepdims=True)
    return Bounded(value, (experts.shape[-1] + 4) * FLOAT32 * value)


def _expert_weights(c: Context) -> Bounded:
    scale = c.vector("router.per_expert_scale")[c.indices("router.experts")]
    if c.full("router.weights_norm") in c.captured.values:
        normalised = c("router.weights_norm")
    else:
        normalised = _weights_norm(c)
    return c.captured.engine.roundings.scale(normalised, scale)


def _expert_rows(c: Context) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Expert -> (rows that chose it, their slots)."""
    experts = c.indices("router.experts")
    return {int(e): np.nonzero(experts == e) for e in np.unique(experts)}  # type: ignore[misc]


def _experts_hidden(c: Context) -> Bounded:
    x, name = c("experts.norm"), c.full("experts.gate_up_proj")
    size = c.config.moe_intermediate_size
    shape = (*c.indices("router.experts").shape, size)
    value, error = np.zeros(shape), np.zeros(shape)
    for expert, (rows, slots) in _expert_rows(c).items():
        begin = 2 * size * expert
        both = c.product(x[rows], name, begin, begin + 2 * size)
        hidden = c.captured.engine.roundings.gelu_times(both[:, :size], both[:, size:])
        value[rows, slots], error[rows, slots] = hidden.value, hidden.error
    return Bounded(value, error)


def _experts_each(c: Context) -> Bounded:
    return _down(c, _captured_or("experts.hidden", _experts_hidden)(c))


def _down(c: Context, hidden: Bounded) -> Bounded:
    name, size = c.full("experts.down_proj"), c.config.hidden_size
    shape = (*hidden.value.shape[:2], size)
    value, error = np.zeros(shape), np.zeros(shape)
    for expert, (rows, slots) in _expert_rows(c).items():
        out = c.product(hidden[rows, slots], name, size * expert, size * (expert + 1))
        value[rows, slots], error[rows, slots] = out.value, out.error
    return Bounded(value, error)


def _experts_out(c: Context) -> Bounded:
    each = _down(c, _experts_hidden(c))
    if c.full("experts.each") in c.captured.values:
        # What is shown of each expert is computed beside what is summed: both have roundings.
        each = Bounded(c("experts.each").value, 2 * each.error)
    factor = c("router.weights").value[..., None]
    engine = c.captured.engine
    value = (factor * each.value).sum(axis=1)
    # Each product and each of the k sums is rounded to the activations' dtype.
    count = factor.shape[1] + 1
    size = np.abs(factor * each.value).sum(axis=1)
    off = (np.abs(factor) * np.broadcast_to(each.error, each.value.shape)).sum(axis=1)
    return engine.roundings.stored(value, off + count * engine.roundings.unit * size)


def _ffn_out(c: Context) -> Bounded:
    if not c.spec.has_experts:
        return c("mlp.out")
    return c.captured.engine.roundings.add(c("mlp.post"), c("experts.post"))


def _resid_unscaled(c: Context) -> Bounded:
    if not c.config.hidden_size_per_layer_input:
        return c("resid_ffn")
    return c.captured.engine.roundings.add(c("resid_ffn"), c("per_layer.post"))


def _resid_post(c: Context) -> Bounded:
    x = _captured_or("resid_unscaled", _resid_unscaled)(c)
    return c.captured.engine.roundings.scale(x, c.vector("layer_scalar"))


def _logits(c: Context) -> Bounded:
    cap = c.config.final_logit_softcapping
    raw = c.at("logits_raw")
    return c.captured.engine.roundings.softcap(raw, cap) if cap else raw


def _last_norm(c: Context) -> Bounded:
    last = c.at(f"layers.{c.config.num_hidden_layers - 1}.resid_post")
    return c.norm(last, "norm.weight")


GATE_UP = "experts.gate_up_proj"
DOWN = "experts.down_proj"

IN_LAYER: dict[str, Operation] = {
    "resid_pre": Operation(_resid_pre, (), "the layer before"),
    "attn.norm": _norm("resid_pre", "input_layernorm.weight"),
    "attn.q_proj": _heads("attn.norm", "self_attn.q_proj.weight"),
    "attn.k_proj": _heads("attn.norm", "self_attn.k_proj.weight"),
    "attn.v_proj": Operation(_v_proj, ("self_attn.v_proj.weight",), "attn.norm"),
    "attn.q": _norm("attn.q_proj", "self_attn.q_norm.weight"),
    "attn.k": _norm("attn.k_proj", "self_attn.k_norm.weight"),
    "attn.v": Operation(lambda c: c.norm(c("attn.v_proj"), None), (), "attn.v_proj"),
    "attn.rot_q": _rotated("attn.q"),
    "attn.rot_k": _rotated("attn.k"),
    "attn.keys": Operation(_cached_keys, (), "attn.rot_k of the layer that it reads"),
    "attn.values": Operation(_cached_values, (), "attn.v of the layer that it reads"),
    "attn.scores": Operation(_scores, (), "attn.rot_q and attn.keys"),
    "attn.pattern": Operation(_pattern, (), "attn.scores"),
    "attn.z": Operation(_z, (), "attn.pattern and attn.values"),
    "attn.result": Operation(_attn_result, ("self_attn.o_proj.weight",), "attn.z"),
    "attn.out": Operation(_attn_out, ("self_attn.o_proj.weight",), "attn.z"),
    "attn.post": _norm("attn.out", "post_attention_layernorm.weight"),
    "resid_mid": _sum("resid_pre", "attn.post"),
    "mlp.norm": _norm("resid_mid", "pre_feedforward_layernorm.weight"),
    "mlp.gate": _product("mlp.norm", "mlp.gate_proj.weight"),
    "mlp.up": _product("mlp.norm", "mlp.up_proj.weight"),
    "mlp.hidden": _gelu_times("mlp.gate", "mlp.up"),
    "mlp.out": _product("mlp.hidden", "mlp.down_proj.weight"),
    "mlp.post": _norm("mlp.out", "post_feedforward_layernorm_1.weight"),
    "router.norm": Operation(_router_norm, ("router.scale",), "resid_mid"),
    "router.logits": _product("router.norm", "router.proj.weight"),
    "router.probs": Operation(_router_probs, (), "router.logits"),
    "router.weights_norm": Operation(_weights_norm, (), "router.probs and router.experts"),
    "router.weights": Operation(
        _expert_weights, ("router.per_expert_scale",), "router.weights_norm"
    ),
    "experts.norm": _norm("resid_mid", "pre_feedforward_layernorm_2.weight"),
    "experts.hidden": Operation(_experts_hidden, (GATE_UP,), "experts.norm"),
    "experts.each": Operation(_experts_each, (DOWN,), "experts.hidden"),
    "experts.out": Operation(_experts_out, (GATE_UP, DOWN), "experts.norm and router.weights"),
    "experts.post": _norm("experts.out", "post_feedforward_layernorm_2.weight"),
    "ffn.out": Operation(_ffn_out, (), "mlp.out or mlp.post and experts.post"),
    "ffn.post": _norm("ffn.out", "post_feedforward_layernorm.weight"),
    "resid_ffn": _sum("resid_mid", "ffn.post"),
    "per_layer.in": Operation(
        lambda c: c.at("per_layer_inputs")[:, c.layer], (), "per_layer_inputs"
    ),
    "per_layer.gate": _product("resid_ffn", "per_layer_input_gate.weight"),
    "per_layer.hidden": _gelu_times("per_layer.gate", "per_layer.in"),
    "per_layer.out": _product("per_layer.hidden", "per_layer_projection.weight"),
    "per_layer.post": _norm("per_layer.out", "post_per_layer_input_norm.weight"),
    "resid_unscaled": Operation(_resid_unscaled, (), "resid_ffn and per_layer.post"),
    "resid_post": Operation(_resid_post, ("layer_scalar",), "resid_unscaled"),
}
OUTSIDE: dict[str, Operation] = {
    "embed": Operation(_embed, ("embed_tokens.weight",), "the ids"),
    "per_layer_inputs.token": Operation(_token_part, ("embed_tokens_per_layer.weight",), "the ids"),
    "per_layer_inputs.context": Operation(
        _context_part,
        ("per_layer_model_projection.weight", "per_layer_projection_norm.weight"),
        "embed",
    ),
    "per_layer_inputs": Operation(
        _per_layer_inputs,
        (
            "embed_tokens_per_layer.weight",
            "per_layer_model_projection.weight",
            "per_layer_projection_norm.weight",
        ),
        "the ids and embed",
    ),
    "final_norm": Operation(_last_norm, ("norm.weight",), "the last layer's resid_post"),
    "logits_raw": Operation(
        lambda c: c.product(c.at("final_norm"), weights.head_name(c.tensors)),
        ("embed_tokens.weight",),
        "final_norm",
    ),
    "logits": Operation(_logits, (), "logits_raw"),
}


# Norms and what they read; each has its divisor at "….scale".
NORMED = {
    "attn.norm": "resid_pre",
    "attn.q": "attn.q_proj",
    "attn.k": "attn.k_proj",
    "attn.v": "attn.v_proj",
    "attn.post": "attn.out",
    "mlp.norm": "resid_mid",
    "mlp.post": "mlp.out",
    "router.norm": "resid_mid",
    "experts.norm": "resid_mid",
    "experts.post": "experts.out",
    "ffn.post": "ffn.out",
    "per_layer.post": "per_layer.out",
}


def _divisor(source: str) -> Operation:
    def compute(c: Context) -> Bounded:
        return c.captured.engine.roundings.divisor(c(source), c.config.rms_norm_eps)

    return Operation(compute, (), source)


def _last_divisor(c: Context) -> Bounded:
    last = c.at(f"layers.{c.config.num_hidden_layers - 1}.resid_post")
    return c.captured.engine.roundings.divisor(last, c.config.rms_norm_eps)


def _context_divisor(c: Context) -> Bounded:
    projected = _projected_context(c)
    exact_part = c.captured.engine.roundings.divisor(projected, c.config.rms_norm_eps)
    off = np.broadcast_to(projected.error, projected.value.shape)
    return Bounded(exact_part.value, exact_part.error + np.sqrt(np.mean(off**2, axis=-1)))


IN_LAYER |= {f"{norm}.scale": _divisor(source) for norm, source in NORMED.items()}
OUTSIDE |= {
    "final_norm.scale": Operation(_last_divisor, (), "the last layer's resid_post"),
    "per_layer_inputs.context.scale": Operation(
        _context_divisor, ("per_layer_model_projection.weight",), "embed"
    ),
}


def split_name(name: str) -> tuple[int, str]:
    """ "layers.3.attn.z" -> (3, "attn.z"); -1 outside the layers."""
    if name.startswith("layers."):
        _, layer, point = name.split(".", 2)
        return int(layer), point
    return -1, name


def operation_of(name: str) -> Operation | None:
    """The operation behind a hook point; None for one that this table lacks."""
    layer, point = split_name(name)
    return (OUTSIDE if layer < 0 else IN_LAYER).get(point)


def tensors_of(name: str, config: TextConfig) -> list[str]:
    """Checkpoint names of the weights that a point applies."""
    layer, point = split_name(name)
    operation = operation_of(name)
    if operation is None:
        return []
    if layer < 0:
        return list(operation.tensors)
    if point == "attn.v_proj" and config.layers[layer].values_are_keys:
        return []
    return [f"layers.{layer}.{tensor}" for tensor in operation.tensors]
