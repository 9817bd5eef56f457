"""Which dtype each weight gets: the recipes behind `dtype="int4"` and `dtype="int8"`.

A recipe maps name patterns to dtypes; "default" is a preset, and a later pattern wins. Norms and
other vectors are float32 in the engine whatever the recipe says.

| tensor | "int4" | "int8" |
| --- | --- | --- |
| attention, MLP and expert matrices | int4 (4.5 bits a weight) | int8 (8.5) |
| embed_tokens, which is also the output matrix | int6 (6.5) | int8 |
| per-layer gates and projections, router | int8 (8.5) | int8 |
| embed_tokens_per_layer, a table of which only rows are read | q8_0 (8.5) | q8_0 |

All of these are symmetric integers in groups of 32 along a row with one float16 scale a group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from gemloupe import _core
from gemloupe.errors import close_matches, did_you_mean, one_of, quoted

TABLE = "embed_tokens_per_layer.weight"
"""The one tensor of which a pass reads single rows only."""

PRESETS: dict[str, dict[str, str]] = {
    "auto": {},
    "float32": {"*": "float32"},
    "bfloat16": {"*": "bfloat16"},
    "int8": {"*": "int8"},
    "int4": {
        "*": "int4",
        "embed_tokens.weight": "int6",
        TABLE: "int8",
        "per_layer_model_projection.weight": "int8",
        "*.per_layer_input_gate.weight": "int8",
        "*.per_layer_projection.weight": "int8",
        "*.router.proj.weight": "int8",
    },
}
DTYPES = ("auto", "float32", "float16", "bfloat16", "int8", "int6", "int4")
"""What a pattern may ask for; "auto" is as stored."""

# Bits of one weight.
BITS: dict[str, float] = {
    "float32": 32, "float16": 16, "bfloat16": 16, "int8": 8.5, "int6": 6.5, "int4": 4.5,
    "q8_0": 8.5, "q4_0": 4.5, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "int4_k": 4.625,
    "int5_k": 5.625, "int6_k": 6.625, "w4a16": 4.5,
}  # fmt: skip
PLAIN = ("float32", "float16", "bfloat16")
# The engine's order of the same values: panels of 16 rows, which its kernels read.
LOSSLESS = {
    "q4_0": "int4", "q8_0": "int8", "q4_k": "int4_k", "q5_k": "int5_k", "q6_k": "int6_k",
    "w4a16": "int4",
}  # fmt: skip
# Single rows are read from whole rows: what stands for a packed dtype in the table.
_ROWS = {"int8": "q8_0", "int6": "q8_0", "int4": "q4_0"}
_GROUP = 32

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype as stored, shape)."""
Dtype = str | Mapping[str, str]
"""A preset, or patterns: {"default": "int4", "*.mlp.down_proj.weight": "int8"}."""


def name_of(dtype: Dtype) -> str:
    """The preset: `dtype` itself, or the "default" of its patterns."""
    return dtype if isinstance(dtype, str) else dtype.get("default", "auto")


def targets(dtype: Dtype, tensors: Tensors, prefix: str = "") -> dict[str, str]:
    """Returns the dtype in which the engine is to hold each matrix (vectors are left out).

    A tensor whose target is its stored dtype is used as it lies in its file. `prefix` may stand
    before the names in patterns. ValueError for an unknown dtype, and for a pattern that matches
    nothing, with close matches.
    """
    asked = _asked(_patterns(dtype), tensors, prefix)
    return {
        name: _target(name, asked.get(name, "auto"), stored, shape)
        for name, (stored, shape) in tensors.items()
        if len(shape) > 1
    }


def check(dtype: Any) -> None:
    """Raises ValueError unless `dtype` is a preset or a mapping of patterns to dtypes."""
    _patterns(dtype)


def _patterns(dtype: Dtype) -> list[tuple[str, str, bool]]:
    """Returns (pattern, dtype, must it match something?) in the order in which they apply."""
    if isinstance(dtype, str):
        dtype = {"default": dtype}
    if not isinstance(dtype, Mapping) or not all(
        isinstance(text, str) for item in dtype.items() for text in item
    ):
        raise ValueError(
            f"dtype is {quoted(dtype)}; expected {one_of(list(PRESETS))}, or a mapping of name "
            'patterns to dtypes, such as {"default": "int4", "*.mlp.down_proj.weight": "int8"}'
        )
    default = dtype.get("default", "auto")
    if default not in PRESETS:
        hint = did_you_mean(default, PRESETS)
        raise ValueError(
            f"dtype is {quoted(default)}; expected {one_of(list(PRESETS))}. {hint}".rstrip()
        )
    found = [(pattern, value, False) for pattern, value in PRESETS[default].items()]
    for pattern, value in dtype.items():
        if pattern == "default":
            continue
        if value not in DTYPES:
            hint = did_you_mean(value, DTYPES)
            raise ValueError(
                f"dtype of {quoted(pattern)} is {quoted(value)}; expected "
                f"{one_of(list(DTYPES))}. {hint}".rstrip()
            )
        found.append((pattern, value, True))
    return found


def _asked(patterns: list[tuple[str, str, bool]], tensors: Tensors, prefix: str) -> dict[str, str]:
    asked: dict[str, str] = {}
    for pattern, value, must_match in patterns:
        short = pattern.removeprefix(prefix)
        # With a wildcard in front a pattern may reach into the prefix: "*.layers.0.*".
        matches = [
            name
            for name in tensors
            if fnmatchcase(name, short) or (must_match and fnmatchcase(prefix + name, pattern))
        ]
        matrices = [name for name in matches if len(tensors[name][1]) > 1]
        if must_match and not matrices:
            raise _no_match(pattern, short, matches, tensors)
        asked.update(dict.fromkeys(matrices, value))
    return asked


def _no_match(pattern: str, short: str, vectors: list[str], tensors: Tensors) -> ValueError:
    if vectors:
        return ValueError(
            f"dtype: the pattern {quoted(pattern)} matches only vectors, such as "
            f"{quoted(vectors[0])}; expected matrices. Vectors are float32 always: leave it out."
        )
    # Layers differ in their number only.
    names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in tensors)
    matches = close_matches(re.sub(r"\.\d+\.", ".*.", short), names)
    advice = f"Did you mean {one_of(matches)}?" if matches else "gemloupe inspect lists the names."
    return ValueError(f"dtype: the pattern {quoted(pattern)} matches no tensor. {advice}")


def _target(name: str, asked: str, stored: str, shape: tuple[int, ...]) -> str:
    is_table = name == TABLE
    if is_table:  # Rows are read where they are stored, plain or in whole blocks.
        kept = "q4_0" if stored == "w4a16" else stored
    else:
        kept = LOSSLESS.get(stored, stored)
    if asked == "auto":
        return kept
    if stored in PLAIN and asked == "float32":
        return stored  # Reading narrower floats as float32 is exact.
    if stored not in PLAIN and asked not in PLAIN and BITS[stored] <= BITS[asked]:
        return kept  # Already as small: rounding again would only lose.
    if is_table:
        asked = _ROWS.get(asked, asked)
        if asked not in PLAIN and shape[-1] % _GROUP:
            return kept  # Rows of the table are whole blocks.
    return asked


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a dtype of the engine, or in "w4a16"."""
    if dtype == "w4a16":
        dtype = "q4_0"
    return _core.tensor_bytes(dtype, shape)
