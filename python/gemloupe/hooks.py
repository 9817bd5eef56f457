"""Names of hook points, and the patterns that choose them."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable
from dataclasses import dataclass

from gemloupe import _core
from gemloupe.config import TextConfig
from gemloupe.errors import close_matches, one_of, quoted


@dataclass(frozen=True)
class HookPoint:
    """One place of a model that a run can show.

    `shape` in the letters T rows, D hidden size, N query heads, K key-value heads, H head size,
    F feed-forward size, E experts, k experts per token, P per-layer input, L layers, V vocabulary.
    """

    name: str
    shape: str
    index: int
    """Its row in the engine's table."""
    layer: int
    """-1 outside the layers."""


def hook_points(config: TextConfig) -> dict[str, HookPoint]:
    """Every hook point of a model, by name, in model order."""
    return _hook_points(config)


@functools.lru_cache(maxsize=16)
def _hook_points(config: TextConfig) -> dict[str, HookPoint]:
    table = list(enumerate(_core.hook_points()))
    before = [(i, row) for i, row in table if not row[1] and row[0].startswith(("embed", "per"))]
    inside = [(i, row) for i, row in table if row[1]]
    after = [(i, row) for i, row in table if not row[1] and (i, row) not in before]
    points: dict[str, HookPoint] = {}
    for i, (name, _, shape) in before:
        if name == "embed" or config.hidden_size_per_layer_input:
            points[name] = HookPoint(name, shape, i, -1)
    for layer in range(config.num_hidden_layers):
        for i, (name, _, shape) in inside:
            if _layer_has(config, layer, name):
                full = f"layers.{layer}.{name}"
                points[full] = HookPoint(full, shape, i, layer)
    for i, (name, _, shape) in after:
        points[name] = HookPoint(name, shape, i, -1)
    return points


def _layer_has(config: TextConfig, layer: int, name: str) -> bool:
    spec = config.layers[layer]
    if name in ("attn.k_proj", "attn.v_proj", "attn.k", "attn.v", "attn.rot_k"):
        return spec.kv_source == layer
    if name.startswith(("router.", "experts.")) or name == "mlp.post":
        return spec.has_experts
    if name.startswith("per_layer."):
        return config.hidden_size_per_layer_input > 0
    return True


def select(patterns: str | Iterable[str], config: TextConfig) -> tuple[list[HookPoint], list[str]]:
    """The points that the patterns (`*`, `?`, `[…]`) name, in model order, and what was skipped.

    Skipped are layers of a pattern that lack the point, such as `layers.7.attn.k` of a layer that
    reads another layer's keys. KeyError with close matches for a pattern that matches nothing.
    """
    points = hook_points(config)
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen: set[str] = set()
    skipped: set[str] = set()
    every_layer = [
        f"layers.{layer}.{row[0]}"
        for layer in range(config.num_hidden_layers)
        for row in _core.hook_points()
        if row[1]
    ]
    for pattern in wanted:
        matches = fnmatch.filter(points, pattern)
        lacking = [name for name in fnmatch.filter(every_layer, pattern) if name not in points]
        if not matches:
            raise KeyError(_no_match(pattern, lacking, points, config))
        chosen.update(matches)
        skipped.update(lacking)
    return [point for name, point in points.items() if name in chosen], sorted(skipped)


def _no_match(
    pattern: str, lacking: list[str], points: dict[str, HookPoint], config: TextConfig
) -> str:
    if lacking and ".attn." in lacking[0]:
        layer = int(lacking[0].split(".")[1])
        source = config.layers[layer].kv_source
        if source != layer:
            there = lacking[0].replace(str(layer), str(source), 1)
            return (
                f"{quoted(pattern)}: layer {layer} has no keys and values of its own, it reads "
                f"those of layer {source}; capture {quoted(there)}"
            )
    matches = close_matches(pattern, points)
    hint = f"did you mean {one_of(matches)}?" if matches else "gl.hook_points(model) lists them all"
    return f"{quoted(pattern)} matches no hook point of this model; {hint}"
