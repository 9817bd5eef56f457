"""How each row of a call is sampled and when it ends, from arguments and generation_config.json."""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemloupe.errors import quoted

# Where neither the caller nor generation_config.json says anything: the released values.
_DEFAULTS: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 64,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, in this order of steps."""

    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen before, multiplies negative ones; 1.0 is off."""
    suppress: tuple[int, ...] = ()
    """Ids that are never chosen, not even greedily."""
    temperature: float = 1.0
    """0.0 is greedy."""
    top_k: int = 64
    """0 is off."""
    top_p: float = 0.95
    """1.0 is off."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the best; 0.0 is off."""
    seed: int = 0


@dataclass(frozen=True)
class RowOptions:
    """Everything that a row of a generate call is told beside its prompt."""

    sampling: SamplingOptions
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """End-of-sequence ids and the caller's."""
    stop_strings: tuple[str, ...]
    end_ids: tuple[int, ...] = ()
    """End-of-sequence ids alone."""
    max_thinking_tokens: int | None = None
    logprobs: int = 0
    """How many alternatives are reported beside each chosen token; 0: no log-probabilities."""
    prompt_logprobs: int = 0


def resolve_rows(
    arguments: Mapping[str, Any],
    rows: int | None,
    generation_config: Mapping[str, Any],
    eos_ids: Sequence[int],
    vocab_size: int,
) -> list[RowOptions]:
    """Returns the options of every row; `rows` is None for a single prompt.

    In a batch every argument may be a list with one entry a row. `eos_ids` count where
    generation_config.json has none. Raises TypeError and ValueError naming the argument.
    """
    resolved = []
    for row in range(1 if rows is None else rows):
        chosen = {}
        for name, value in arguments.items():
            split = _split_stop if name == "stop" else _split
            chosen[name] = split(name, value, rows, row)
        resolved.append(_resolve_row(chosen, generation_config, eos_ids, vocab_size))
    return resolved


def _split(name: str, value: Any, rows: int | None, row: int) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    return _row_of(name, value, rows, row)


def _split_stop(name: str, value: Any, rows: int | None, row: int) -> Any:
    """`stop` is itself a list: only a list of lists differs by row."""
    if isinstance(value, (list, tuple)) and any(isinstance(v, (list, tuple)) for v in value):
        return _row_of(name, value, rows, row)
    return value


def _row_of(name: str, value: Sequence[Any], rows: int | None, row: int) -> Any:
    if rows is None:
        raise TypeError(
            f"{name} is a list, which gives one value a row of a batch; x is a single prompt: "
            "pass one value"
        )
    if len(value) != rows:
        raise ValueError(
            f"{name} has {len(value)} values for {rows} rows; pass one value, or one a row"
        )
    return value[row]


def _resolve_row(
    chosen: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    eos_ids: Sequence[int],
    vocab_size: int,
) -> RowOptions:
    stop_ids, stop_strings = _stops(chosen["stop"], vocab_size)
    ends = generation_config.get("eos_token_id")
    if ends is None:
        ends = eos_ids
    ends = [ends] if isinstance(ends, int) else ends
    # The file may name ids of a larger vocabulary, which can't be chosen.
    ends = tuple(i for i in ends if i < vocab_size)
    thinking = chosen.get("max_thinking_tokens")
    if thinking is not None:
        thinking = _integer("max_thinking_tokens", thinking, 0)
    return RowOptions(
        sampling=_sampling(chosen, generation_config, vocab_size),
        max_new_tokens=_integer("max_new_tokens", chosen["max_new_tokens"], 1),
        stop_ids=tuple(dict.fromkeys([*ends, *stop_ids])),
        stop_strings=stop_strings,
        end_ids=ends,
        max_thinking_tokens=thinking,
        logprobs=_integer("logprobs", chosen["logprobs"], 0, vocab_size),
        prompt_logprobs=_integer("prompt_logprobs", chosen["prompt_logprobs"], 0, vocab_size),
    )


def default_sampling(generation_config: Mapping[str, Any], vocab_size: int) -> SamplingOptions:
    """How tokens are chosen where the caller says nothing."""
    unsaid = dict.fromkeys((*_DEFAULTS, "seed"))
    return _sampling(unsaid, generation_config, vocab_size)


def _sampling(
    chosen: Mapping[str, Any], generation_config: Mapping[str, Any], vocab_size: int
) -> SamplingOptions:
    values: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = chosen[name]
        if value is None:
            value = generation_config.get(name)
        values[name] = default if value is None else value
    # do_sample false means greedy, unless the caller says how to sample.
    asked = any(chosen[name] is not None for name in ("temperature", "top_p", "top_k", "min_p"))
    if generation_config.get("do_sample") is False and not asked:
        values["temperature"] = 0.0
    seed = chosen["seed"]
    suppress = generation_config.get("suppress_tokens") or ()
    return SamplingOptions(
        repetition_penalty=_number(
            "repetition_penalty", values["repetition_penalty"], "a number above 0", low=0.0
        ),
        suppress=tuple(i for i in suppress if i < vocab_size),
        temperature=_number(
            "temperature", values["temperature"], "0 (greedy) or more", low=0.0, closed=True
        ),
        top_k=_integer("top_k", values["top_k"], 0),
        top_p=_number("top_p", values["top_p"], "above 0 and at most 1", low=0.0, high=1.0),
        min_p=_number("min_p", values["min_p"], "from 0 to 1", low=0.0, high=1.0, closed=True),
        seed=secrets.randbits(63) if seed is None else _integer("seed", seed, 0, _MAX_SEED),
    )


def _stops(stop: Any, vocab_size: int) -> tuple[list[int], tuple[str, ...]]:
    if isinstance(stop, (str, int)) or not isinstance(stop, Sequence):
        stop = [] if stop is None else [stop]
    ids: list[int] = []
    strings: list[str] = []
    for value in stop:
        if isinstance(value, str):
            if not value:
                raise ValueError("stop has an empty string, which occurs everywhere; leave it out")
            strings.append(value)
        else:
            ids.append(_integer("stop", value, 0, vocab_size - 1))
    return ids, tuple(strings)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        kind = "a str or an int" if name == "stop" else "an int"
        raise TypeError(f"{name} must be {kind}, got {quoted(value)} ({type(value).__name__})")
    if number < low or (high is not None and number > high):
        limits = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {number}; expected {limits}")
    return number


def _number(
    name: str,
    value: Any,
    expected: str,
    *,
    low: float,
    high: float = math.inf,
    closed: bool = False,
) -> float:
    """Returns `value` as a float above `low` (or equal, where `closed`) and at most `high`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number, got {quoted(value)} ({type(value).__name__})")
    right = math.isfinite(number) and low <= number <= high and (closed or number > low)
    if not right:
        raise ValueError(f"{name} is {number:g}; expected {expected}")
    return number


def softcap_value(softcap: Any) -> float | None:
    """Returns the cap as the engine takes it: None for the config's, 0.0 for none."""
    if isinstance(softcap, str) and softcap == "config":
        return None
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 < softcap < 1e30:
        raise ValueError(f'softcap is {softcap!r}; expected "config", None, or a number above 0')
    return float(softcap)
