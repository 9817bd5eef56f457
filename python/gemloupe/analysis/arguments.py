"""What the functions of this package are given: a run or an input, tokens, positions."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import hooks
from gemloupe.capturing import at
from gemloupe.errors import quoted
from gemloupe.positions import Span, resolve
from gemloupe.run import Run

if TYPE_CHECKING:
    from gemloupe.model import Model
    from gemloupe.prompt import Prompt


def model_of(run: Any, model: Model | None, function: str) -> Model:
    """Returns `model`, or the model that made `run`; ValueError where neither is known."""
    found = model if model is not None else getattr(run, "model", None)
    if found is None:
        raise ValueError(
            f"{function} has no model: got {type(run).__name__} and model=None; pass model=, the "
            "gemloupe model that the activations come from"
        )
    return found


def recorded(x: Any, model: Model, patterns: Iterable[str], positions: Any) -> Run:
    """Returns `x` where it is a run, else a run over `x` that captured these rows of the points."""
    if isinstance(x, Run):
        return x
    prompt = one_prompt(x, model)
    span = Span(prompt, 0)
    choose_rows(positions, np.arange(span.end), span)
    capture = dict.fromkeys(patterns, at(positions))
    return model.run(prompt, capture=capture, logits=None, routing=False)


def one_prompt(x: Any, model: Model) -> Prompt:
    """Returns model.prepare(x); ValueError for a batch."""
    prompt = model.prepare(x)
    if isinstance(prompt, list):
        raise ValueError(f"got a batch of {len(prompt)}; expected one input: call once for each")
    return prompt


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


def choose_rows(positions: Any, held: np.ndarray, span: Span) -> np.ndarray:
    """Returns the rows [n] that hold `positions` (see `gemloupe.positions.resolve`).

    `held` [m]: the absolute position of each row. ValueError for a position that no row holds and
    where none is chosen.
    """
    where = resolve(positions, span)
    absent = sorted(set(where.listed) - set(held.tolist()))
    if absent:
        raise ValueError(f"position {absent[0]} is not there; expected {_ranges(held)}")
    chosen = np.isin(held, where.listed)
    if where.begin is not None:
        chosen |= held >= where.begin
    if not chosen.any():
        raise ValueError(f"positions {quoted(positions)} choose none of {_ranges(held)}")
    return np.flatnonzero(chosen)


def rows_of(run: Run, name: str, positions: Any) -> np.ndarray:
    """Returns which rows [n] of a captured point hold `positions`."""
    return choose_rows(positions, run.positions_of(name), Span(run.prompt, int(run.positions[0])))


def tokens_at(run: Run, positions: np.ndarray, model: Model) -> list[str]:
    """Returns the pieces that a run read at absolute positions."""
    return [token_text(int(run.prompt.ids[p - run.positions[0]]), model) for p in positions]


def _ranges(held: np.ndarray) -> str:
    """Returns "0 to 14", or the first positions where they are not in a row."""
    if len(held) and held[-1] - held[0] == len(held) - 1:
        return f"{held[0]} to {held[-1]}"
    return quoted(held.tolist())


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


def row_shape(name: str, model: Model) -> tuple[int, ...]:
    """Returns the shape that one position has at a hook point, such as (D,) or (N, H).

    KeyError, with close matches, for no hook point of the model; ValueError for a point that does
    not have one row for each position.
    """
    points, _ = hooks.select(name, model.config.text)
    if len(points) != 1:
        raise ValueError(f"{quoted(name)} names {len(points)} hook points; expected one")
    if not points[0].shape.startswith("[T"):
        raise ValueError(
            f"{name} has shape {points[0].shape}; expected one row for each position, [T, …]"
        )
    return hooks.point_shape(points[0], model.config.text)
