"""What the functions of this package are given: a run or an input, tokens, positions."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import hooks
from gemloupe.errors import did_you_mean, quoted
from gemloupe.run import Run

if TYPE_CHECKING:
    from gemloupe.model import Model


def model_of(run: Any, model: Model | None, function: str) -> Model:
    """Returns `model`, or the model that made `run`; ValueError where neither is known."""
    found = model if model is not None else getattr(run, "model", None)
    if found is None:
        raise ValueError(
            f"{function} has no model: got {type(run).__name__} and model=None; pass model=, the "
            "gemloupe model that the activations come from"
        )
    return found


def recorded(x: Any, model: Model, patterns: Sequence[str]) -> Run:
    """Returns `x` where it is a run, else a run over `x` (as `model.run` takes it)."""
    if isinstance(x, Run):
        return x
    made = model.run(x, capture=list(patterns), logits=None)
    if isinstance(made, list):
        raise ValueError(f"got a batch of {len(made)}; expected one input: call once for each")
    return made


def captured(run: Run, name: str, patterns: Iterable[str], function: str) -> np.ndarray:
    """Returns run[name]; KeyError saying what to capture where it is missing."""
    if name not in run.captured:
        raise KeyError(
            f"{function} needs {quoted(name)}, which this run did not capture; run with "
            f"capture={list(patterns)!r}"
        )
    return run.captured[name]


def token_id(token: Any, model: Model) -> int:
    """Returns the id of a token given as id or as text of exactly one token, such as " Paris".

    ValueError for an id outside the vocabulary and for a text of several tokens.
    """
    if isinstance(token, str):
        return _text_id(token, model)
    try:
        index = operator.index(token)
    except TypeError:
        raise ValueError(f"token is {quoted(token)}; expected an id or a text") from None
    size = model.config.text.vocab_size
    if not 0 <= index < size:
        raise ValueError(f"token id {index} is not in the vocabulary; expected 0 to {size - 1}")
    return index


def _text_id(text: str, model: Model) -> int:
    whole = model.tokenizer.id(text.replace(" ", "\u2581"))
    if whole is not None:
        return whole
    ids = model.tokenizer.encode(text, bos=False)
    if len(ids) != 1:
        raise ValueError(
            f"{quoted(text)} is {len(ids)} tokens, {quoted(model.tokenizer.tokens(ids))}; expected "
            "one: pass one of them, or an id (a word inside a text begins with a space)"
        )
    return ids[0]


def token_text(index: int, model: Model) -> str:
    """Returns the vocabulary's piece of an id, or the id where the model has no tokenizer."""
    return model.tokenizer.tokens([index])[0] if model.tokenizer.exists else str(index)


def row_numbers(positions: Any, count: int) -> np.ndarray:
    """Returns rows [n] out of `count`: None for all, or an int, a slice, ints, booleans [count].

    Negative ones count from the end. ValueError for a row outside and for none at all.
    """
    if positions is None:
        return np.arange(count)
    if isinstance(positions, slice):
        rows = np.arange(count)[positions]
    else:
        given = np.atleast_1d(np.asarray(positions))
        if given.dtype == bool:
            if given.shape != (count,):
                raise ValueError(f"positions is a mask {list(given.shape)}; expected [{count}]")
            rows = np.flatnonzero(given)
        elif given.ndim == 1 and (given.size == 0 or np.issubdtype(given.dtype, np.integer)):
            outside = given[(given < -count) | (given >= count)]
            if outside.size:
                raise ValueError(f"position {outside[0]} is outside the input of {count} tokens")
            rows = given.astype(np.int64) % count
        else:
            raise ValueError(
                f"positions is {quoted(positions)}; expected None, an int, a slice, ints or "
                "booleans"
            )
    if not len(rows):
        raise ValueError(f"positions {quoted(positions)} choose no row of {count}; expected one")
    return rows


def layer_numbers(layers: Any, count: int) -> np.ndarray:
    """Returns layers [n] out of `count`: None for all, or an int, a slice or ints, as given."""
    if isinstance(layers, slice) or layers is None:
        chosen = np.arange(count)[layers or slice(None)]
    else:
        try:
            given = [operator.index(layer) for layer in np.atleast_1d(np.asarray(layers))]
        except TypeError:
            raise ValueError(
                f"layers is {quoted(layers)}; expected None, an int, a slice or ints"
            ) from None
        for layer in given:
            if not -count <= layer < count:
                raise ValueError(f"layer {layer} is outside; expected 0 to {count - 1}")
        chosen = np.array(given, np.int64) % count
    if not len(chosen):
        raise ValueError(f"layers {quoted(layers)} choose none of {count}; expected at least one")
    return chosen


def vector_of(v: Any, shape: Sequence[int], what: str) -> np.ndarray:
    """Returns float32 of `shape`; ValueError with both shapes for anything else."""
    array = np.asarray(v, np.float32)
    if array.shape != tuple(shape):
        raise ValueError(f"{what} has shape {list(array.shape)}; expected {list(shape)}")
    return array


def row_shape(name: str, model: Model) -> list[int]:
    """Returns the shape that one position has at a hook point, such as [D] or [N, H].

    KeyError, with close matches, for no hook point of the model; ValueError for a point that does
    not have one row for each position.
    """
    text = model.config.text
    points = hooks.hook_points(text)
    if name not in points:
        hint = did_you_mean(str(name), points) or "gl.hook_points(model) lists them all."
        raise KeyError(f"{quoted(name)} is no hook point of this model. {hint}")
    point = points[name]
    letters = point.shape.strip("[]").split(", ")
    if letters[0] != "T":
        raise ValueError(f"{name} has shape {point.shape}; expected one row for each position")
    layer = text.layers[max(point.layer, 0)]
    sizes = {
        "D": text.hidden_size, "N": text.num_attention_heads, "K": layer.num_kv_heads,
        "H": layer.head_dim, "F": layer.intermediate_size, "E": text.num_experts,
        "k": text.top_k_experts, "P": text.hidden_size_per_layer_input,
        "L": text.num_hidden_layers, "V": text.vocab_size,
    }  # fmt: skip
    if name.endswith("experts.hidden"):
        sizes["F"] = text.moe_intermediate_size
    return [sizes[letter] for letter in letters[1:]]
