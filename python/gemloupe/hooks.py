"""Names of hook points, their aliases, and the patterns that choose them."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gemloupe import _core
from gemloupe.config import TextConfig
from gemloupe.errors import close_matches, one_of, quoted

_BEFORE = ":before"


@dataclass(frozen=True)
class HookPoint:
    """One place of a model that a run can show and change.

    `shape` in the letters T rows, S positions of the cache, D hidden size, N query heads, K
    key-value heads, H head size, F feed-forward size, E experts, k experts per token, P per-layer
    input, L layers, V vocabulary. Of the audio tower: D its hidden size, F mel frames in front and
    feed-forward size behind, B mel bands, O encoded size, M the text model's hidden size.
    """

    name: str
    shape: str
    index: int
    """Its row in the engine's table."""
    layer: int
    """-1 outside the layers."""
    editable: bool = True
    transformers: str = ""
    """Path of the module from transformers' text model whose output this is (".input": its input,
    ".output.1": the second of several outputs); "" where no module has it."""
    transformer_lens: str = ""
    """TransformerLens's name; "" where it has none."""
    row_shape: tuple[int, ...] | None = None
    """The shape of one row where the text model's config does not tell it."""


def before(name: str) -> str:
    """The name of a point's value before the edits of that point, for `capture` and `run[...]`."""
    return name if name.endswith(_BEFORE) else name + _BEFORE


def split_before(name: str) -> tuple[str, bool]:
    """Returns the name without the mark that `before` adds, and whether it was there."""
    return name.removesuffix(_BEFORE), name.endswith(_BEFORE)


class TowerConfig(Protocol):
    """What is asked of a tower's config; it must be hashable."""

    @property
    def tower(self) -> str:
        """The name before all of its points, such as "audio"."""
        ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def sizes(self) -> dict[str, int]:
        """The letters of its points' shapes."""
        ...

    def __hash__(self) -> int: ...


Config = TextConfig | TowerConfig


def hook_points(config: Config) -> dict[str, HookPoint]:
    """Every hook point of a text model or a tower, by name, in model order."""
    return _hook_points(config)


@functools.lru_cache(maxsize=16)
def _hook_points(config: Config) -> dict[str, HookPoint]:
    if not isinstance(config, TextConfig):
        return _tower_points(config)
    table = list(enumerate(_core.hook_points()))
    first = next(i for i, row in table if row[1])
    points: dict[str, HookPoint] = {}

    def add(index: int, layer: int) -> None:
        name, _, shape, editable, transformers, lens = table[index][1]
        full = f"layers.{layer}.{name}" if layer >= 0 else name
        theirs, lens = (text.replace("{i}", str(layer)) for text in (transformers, lens))
        points[full] = HookPoint(full, shape, index, layer, editable, theirs, lens)

    for i, row in table[:first]:
        if row[0] == "embed" or config.hidden_size_per_layer_input:
            add(i, -1)
    for layer in range(config.num_hidden_layers):
        for i, row in table:
            if row[1] and _layer_has(config, layer, row[0]):
                add(i, layer)
    for i, row in table[first:]:
        if not row[1]:
            add(i, -1)
    return points


# What a tower has whose features are projected as they are.
_WITHOUT_ENCODER = ("mel", "soft_tokens")


def _tower_points(config: TowerConfig) -> dict[str, HookPoint]:
    first = _core.first_hook_point(config.tower)
    table = list(enumerate(_core.hook_points(config.tower), first))
    of_layers = [row for row in table if row[1][1]]
    begin, end = table.index(of_layers[0]), table.index(of_layers[-1])
    places = [(row, -1) for row in table[:begin]]
    places += [(row, layer) for layer in range(config.num_hidden_layers) for row in of_layers]
    places += [(row, -1) for row in table[end + 1 :]]
    points: dict[str, HookPoint] = {}
    for (index, (name, _, shape, editable, transformers, lens)), layer in places:
        if not config.num_hidden_layers and name not in _WITHOUT_ENCODER:
            continue
        full = f"{config.tower}.layers.{layer}.{name}" if layer >= 0 else f"{config.tower}.{name}"
        theirs = transformers.replace("{i}", str(layer))
        points[full] = HookPoint(full, shape, index, layer, editable, theirs, lens)
    return points


_OWN_KV = ("attn.k_proj", "attn.v_proj", "attn.k", "attn.v", "attn.rot_k")


def _layer_has(config: TextConfig, layer: int, name: str) -> bool:
    spec = config.layers[layer]
    name = name.removesuffix(".scale")
    if name in _OWN_KV:
        return spec.kv_source == layer
    if name.startswith(("router.", "experts.")) or name == "mlp.post":
        return spec.has_experts
    if name.startswith("per_layer."):
        return config.hidden_size_per_layer_input > 0
    return True


def point_shape(point: HookPoint, config: Config) -> tuple[int, ...]:
    """The shape of one row: `point.shape` without T; -1 for S, and [S] for scores and patterns."""
    if point.row_shape is not None:
        return point.row_shape
    letters = point.shape.strip("[]").split(", ")
    if "N, T, S" in point.shape:
        return (-1,)
    if not isinstance(config, TextConfig):
        return tuple(config.sizes[letter] for letter in letters[1:])
    sizes = {
        "1": 1,
        "D": config.hidden_size,
        "E": config.num_experts,
        "k": config.top_k_experts,
        "P": config.hidden_size_per_layer_input,
        "L": config.num_hidden_layers,
        "V": config.vocab_size,
    }
    if point.layer >= 0:
        layer = config.layers[point.layer]
        sizes |= {
            "N": config.num_attention_heads,
            "K": config.layers[layer.kv_source].num_kv_heads,
            "H": layer.head_dim,
            "F": layer.intermediate_size,
        }
        if ".experts." in point.name:
            sizes["F"] = config.moe_intermediate_size
    return tuple(sizes[letter] for letter in letters[1:])


@functools.lru_cache(maxsize=16)
def _aliases(config: Config) -> dict[str, str]:
    """Names of transformers (without the text model's prefix) and TransformerLens -> ours."""
    aliases: dict[str, str] = {}
    for point in hook_points(config).values():
        for alias in (point.transformers, point.transformer_lens):
            if alias:
                aliases.setdefault(alias, point.name)
    return aliases


_PREFIXES = re.compile(r"^(model\.)?(language_model\.)?")


def canonical(name: str, config: Config) -> str:
    """Returns our name for an alias (without wildcards), or `name` itself."""
    plain, is_before = split_before(name)
    found = _expand_alias(plain, config)
    full = found[0] if len(found) == 1 else plain
    return before(full) if is_before else full


def _expand_alias(pattern: str, config: Config) -> list[str]:
    aliases = _aliases(config)
    short = _PREFIXES.sub("", pattern)
    for candidate in (pattern, short, re.sub(r"\.output(\.0)?$", "", short)):
        matches = fnmatch.filter(aliases, candidate)
        if matches:
            # "layers.*" of transformers' paths is a whole layer's output, not all points in it.
            depth = candidate.count(".")
            same = [alias for alias in matches if alias.count(".") == depth]
            return [aliases[alias] for alias in same or matches]
    return []


def select(patterns: str | Iterable[str], config: Config) -> tuple[list[HookPoint], list[str]]:
    """The points that the patterns (`*`, `?`, `[…]`) name, in model order, and what was skipped.

    Names of transformers' modules and of TransformerLens's hooks work too. Skipped are layers of a
    pattern that lack the point, such as `layers.7.attn.k` of a layer that reads another layer's
    keys. KeyError with close matches for a pattern that matches nothing.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen: set[str] = set()
    skipped: set[str] = set()
    for pattern in wanted:
        names, lacking = match(pattern, config)
        chosen.update(names)
        skipped.update(lacking)
    points = hook_points(config)
    return [point for name, point in points.items() if name in chosen], sorted(skipped)


def match(pattern: str, config: Config) -> tuple[list[str], list[str]]:
    """Returns the names of the points that one pattern chooses, and of those that layers lack."""
    if not isinstance(pattern, str):
        raise TypeError(f"a hook point is {quoted(pattern)}; expected its name or a pattern")
    points = hook_points(config)
    if pattern in points:
        return [pattern], []
    names = fnmatch.filter(points, pattern)
    lacking = [name for name in fnmatch.filter(_every_layer(config), pattern) if name not in points]
    if not names:
        names = _expand_alias(pattern, config)
    if not names:
        raise KeyError(_no_match(pattern, lacking, points, config))
    return names, lacking


@functools.lru_cache(maxsize=16)
def _every_layer(config: Config) -> list[str]:
    if not isinstance(config, TextConfig):  # All layers of a tower have the same points.
        return []
    return [
        f"layers.{layer}.{row[0]}"
        for layer in range(config.num_hidden_layers)
        for row in _core.hook_points()
        if row[1]
    ]


def _no_match(
    pattern: str, lacking: list[str], points: Mapping[str, HookPoint], config: Config
) -> str:
    if lacking and ".attn." in lacking[0] and isinstance(config, TextConfig):
        layer = int(lacking[0].split(".")[1])
        source = config.layers[layer].kv_source
        if source != layer:
            there = lacking[0].replace(str(layer), str(source), 1)
            return (
                f"{quoted(pattern)}: layer {layer} has no keys and values of its own, it reads "
                f"those of layer {source}; capture {quoted(there)}, or "
                f"{quoted(f'layers.{layer}.attn.keys')} for what it reads"
            )
    if pattern.startswith("vision."):
        return f"{quoted(pattern)} is of the vision tower, into which run and generate look"
    matches = close_matches(pattern, points)
    hint = f"did you mean {one_of(matches)}?" if matches else "gl.hook_points(model) lists them all"
    return f"{quoted(pattern)} matches no hook point of this model; {hint}"
