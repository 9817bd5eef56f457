"""One layer's attention: unscaled scores, q/k/v norms, grouped heads."""

from __future__ import annotations

import numpy as np

from .config import Config, Layer
from .mask import visible
from .rms_norm import rms_norm
from .rope import angles, rotate
from .trace import Trace


def attention(
    x: np.ndarray,
    positions: np.ndarray,
    weights: dict[str, np.ndarray],
    layer: Layer,
    config: Config,
    kv: dict[int, tuple[np.ndarray, np.ndarray]],
    trace: Trace,
) -> np.ndarray:
    """Maps the normed residual [T, D] to the attention's output [T, D].

    `kv` holds the keys and values [S, K, H] of the layers before; this layer adds its own or, if
    it shares, reads those of `layer.kv_source`.
    """
    rows = len(x)
    angle = angles(positions, layer.rope, layer.head_dim)

    q_raw = (x @ weights["q_proj.weight"].T).reshape(rows, config.heads, layer.head_dim)
    q = rms_norm(trace("q_proj", q_raw), weights["q_norm.weight"], config.eps, trace, "q")
    q = trace("rot_q", rotate(q, angle))

    if not layer.shares:
        kv[layer.index] = keys_and_values(x, angle, weights, layer, config, trace)
    keys, values = kv[layer.kv_source]
    trace("keys", keys)
    trace("values", values)

    # Query head n reads key head n // group.
    group = config.heads // layer.kv_heads
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = np.einsum("tnh,snh->nts", q, keys)  # Not divided by sqrt(H): q_norm carries it.
    seen = visible(positions, layer.window, config.bidirectional)
    pattern = softmax(trace("scores", np.where(seen, scores, -np.inf)))
    z = trace("z", np.einsum("nts,snh->tnh", trace("pattern", pattern), values))

    o_proj = weights["o_proj.weight"].reshape(-1, config.heads, layer.head_dim)
    trace("result", np.einsum("tnh,dnh->tnd", z, o_proj))
    return trace("out", z.reshape(rows, -1) @ weights["o_proj.weight"].T)


def keys_and_values(
    x: np.ndarray,
    angle: np.ndarray,
    weights: dict[str, np.ndarray],
    layer: Layer,
    config: Config,
    trace: Trace,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns this layer's rotated keys and its values, both [T, K, H].

    Values have a norm without weights and no rotation. Where values are keys, both start from the
    raw output of k_proj: the value is taken before the key's norm and rotation.
    """
    shape = (len(x), layer.kv_heads, layer.head_dim)
    k_raw = trace("k_proj", (x @ weights["k_proj.weight"].T).reshape(shape))
    v_raw = k_raw if layer.values_are_keys else (x @ weights["v_proj.weight"].T).reshape(shape)
    k = rms_norm(k_raw, weights["k_norm.weight"], config.eps, trace, "k")
    v = rms_norm(trace("v_proj", v_raw), None, config.eps, trace, "v")
    return trace("rot_k", rotate(k, angle)), v


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last dimension; -inf entries get exactly 0."""
    exponentials = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exponentials / np.sum(exponentials, axis=-1, keepdims=True)
