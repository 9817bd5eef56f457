"""The values of a tool call as Gemma 4 writes them: call:NAME{key:value,…}.

Strings stand between `<|"|>` tokens and have no escapes; keys are bare; the rest is as in JSON.
What models write instead now and then is understood too: JSON's quotes, quoted keys, bare words,
spaces, a comma too many.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemloupe.errors import quoted

STRING = '<|"|>'
_PREFIX = "call:"
_MAX_DEPTH = 64
_LITERALS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
# Python refuses to turn longer digit strings into integers.
_MAX_DIGITS = 4000


class _Bare(str):
    """A value that was written without quotes; what it means may depend on the schema."""


_Token = tuple[str, str]  # (kind, text): a punctuation mark, "string", or "bare"


def parse_call(parts: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Returns (name, arguments) of what stands between `<|tool_call>` and `<tool_call|>`.

    `parts`: that text, cut at every `<|"|>`, so that each second part is a string. Values are
    bare words where they are neither numbers nor literals; `typed` decides about them.
    ValueError says what is wrong and where.
    """
    if len(parts) % 2 == 0:
        raise ValueError(f'the string {quoted(parts[-1])} has no closing <|"|>')
    head = parts[0].lstrip()
    if not head.startswith(_PREFIX):
        raise ValueError(f"it begins with {quoted(head[:20])}; expected call:NAME{{…}}")
    name, brace, rest = head[len(_PREFIX) :].partition("{")
    name = name.strip()
    if not brace:
        raise ValueError("it has no arguments; expected call:NAME{…}")
    if not name:
        raise ValueError("it has no name; expected call:NAME{…}")
    tokens = _tokens(["{" + rest, *parts[1:]])
    value, end = _value(tokens, 0, 0)
    if end < len(tokens):
        raise ValueError(f"{quoted(tokens[end][1])} follows the arguments of {name}")
    return name, value


def typed(value: Any, schema: Any = None) -> Any:
    """Returns `value` in plain JSON types, as `schema` (a JSON schema, or None) declares them.

    Only what the syntax leaves open changes: bare words, and whole numbers such as 3.0.
    """
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, _Bare):
        return _typed_bare(value, _types(schema))
    if isinstance(value, dict):
        inner = schema.get("properties")
        inner = inner if isinstance(inner, Mapping) else {}
        return {str(key): typed(item, inner.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item, schema.get("items")) for item in value]
    return value


def _types(schema: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if not isinstance(kinds, (list, tuple)):
        return ()
    return tuple(kind.lower() for kind in kinds if isinstance(kind, str))


def _typed_bare(text: str, kinds: tuple[str, ...]) -> Any:
    wants_text = "string" in kinds
    if text in _LITERALS:
        value = _LITERALS[text]
        kind = "null" if value is None else "boolean"
        return str(text) if wants_text and kind not in kinds else value
    if wants_text and not {"number", "integer"} & {*kinds}:
        return str(text)
    if len(text) <= _MAX_DIGITS:
        if _INTEGER.fullmatch(text):
            return int(text)
        if _NUMBER.fullmatch(text):
            number = float(text)
            whole = "integer" in kinds and "number" not in kinds and number.is_integer()
            return int(number) if whole else number
    return str(text)


def _tokens(parts: Sequence[str]) -> list[_Token]:
    tokens: list[_Token] = []
    for index, part in enumerate(parts):
        if index % 2:
            tokens.append(("string", part))
        else:
            _read_syntax(part, tokens)
    return tokens


def _read_syntax(text: str, tokens: list[_Token]) -> None:
    at = 0
    while at < len(text):
        character = text[at]
        if character in "{}[]:,":
            tokens.append((character, character))
            at += 1
        elif character.isspace():
            at += 1
        elif character == '"' and (match := _JSON_STRING.match(text, at)):
            try:
                tokens.append(("string", json.loads(match[0], strict=False)))
            except ValueError as error:
                raise ValueError(f"{quoted(match[0])} is not a JSON string: {error}") from None
            at = match.end()
        else:
            end, stops = at, _stops(tokens)
            while end < len(text) and text[end] not in stops:
                end += 1
            end = max(end, at + 1)
            tokens.append(("bare", text[at:end].rstrip()))
            at = end


def _stops(tokens: Sequence[_Token]) -> str:
    """What ends a bare word: a value may hold colons, as in 12:30, a key anything but a colon."""
    return ",}]" if tokens and tokens[-1][0] in (":", "[") else ":,}]"


def _value(tokens: Sequence[_Token], at: int, depth: int) -> tuple[Any, int]:
    """Returns (the value that begins at token `at`, the token after it)."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"its values are nested deeper than {_MAX_DEPTH}")
    kind, text = _token(tokens, at)
    if kind == "string":
        return text, at + 1
    if kind == "bare":
        return _Bare(text), at + 1
    if kind == "{":
        return _object(tokens, at + 1, depth)
    if kind == "[":
        return _array(tokens, at + 1, depth)
    raise ValueError(f"expected a value, got {quoted(text)}")


def _object(tokens: Sequence[_Token], at: int, depth: int) -> tuple[dict[str, Any], int]:
    values: dict[str, Any] = {}
    while _token(tokens, at)[0] != "}":
        kind, key = _token(tokens, at)
        if kind not in ("bare", "string"):
            raise ValueError(f"expected a key or }}, got {quoted(key)}")
        if key in values:
            raise ValueError(f"the key {quoted(key)} occurs twice")
        kind, text = _token(tokens, at + 1)
        if kind != ":":
            raise ValueError(f"expected : after the key {quoted(key)}, got {quoted(text)}")
        values[str(key)], at = _value(tokens, at + 2, depth + 1)
        at = _separated(tokens, at, "}", f"after the value of {quoted(key)}")
    return values, at + 1


def _array(tokens: Sequence[_Token], at: int, depth: int) -> tuple[list[Any], int]:
    values = []
    while _token(tokens, at)[0] != "]":
        value, at = _value(tokens, at, depth + 1)
        values.append(value)
        at = _separated(tokens, at, "]", f"after item {len(values)} of a list")
    return values, at + 1


def _separated(tokens: Sequence[_Token], at: int, close: str, where: str) -> int:
    kind, text = _token(tokens, at)
    if kind == ",":
        return at + 1
    if kind != close:
        raise ValueError(f"expected , or {close} {where}, got {quoted(text)}")
    return at


def _token(tokens: Sequence[_Token], at: int) -> _Token:
    if at >= len(tokens):
        raise ValueError("it ends before its last bracket is closed")
    return tokens[at]
