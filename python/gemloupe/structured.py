"""Answers of a given form: `response_format=` to a grammar, checked and compiled by llguidance."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemloupe.errors import missing_extra, quoted

if TYPE_CHECKING:
    from gemloupe.tokenizer import Tokenizer

_EXPECTED = (
    'expected a JSON schema, "json", {"type": "json_schema", "json_schema": {"schema": ...}}, '
    '{"regex": ...}, {"grammar": ...} or {"choices": [...]}'
)
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 64
_MAX_PARTS = 100_000
_MAX_CHOICES = 10_000
_MAX_CHOICE_BYTES = 1 << 18
# One space, or a new line and its indentation: where any amount may come, some models write no end.
_WHITE_SPACE = r"( |\n[ ]{0,40})?"
# A state takes about 2 kB.
_MAX_LEXER_STATES = 50_000
# Sub-schemas that are compiled alone to find the one that an error is about.
_MAX_PROBES = 200
_NOTHING = "no text satisfies it"
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains")


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like, in llguidance's own form."""

    source: str
    schema: Any = None
    """The JSON schema that it comes from, None for others."""


def parse_response_format(value: Any) -> Grammar | None:
    """Returns the grammar of a `response_format`, None where any text will do.

    A JSON schema (alone, or in OpenAI's {"type": "json_schema", …}); "json" or {"type":
    "json_object"} for any object; {"regex": text} in Rust's syntax, {"grammar": text} in
    llguidance's Lark dialect, {"choices": [text, …]}. TypeError and ValueError for anything else,
    and beyond 1 MiB or 64 levels; ImportError without llguidance.
    """
    if value is None or value == {"type": "text"}:
        return None
    matchers = _llguidance().LLMatcher
    if value in ("json", {"type": "json_object"}):
        return _schema_grammar({"type": "object"})
    if not isinstance(value, Mapping):
        raise TypeError(f"response_format is {quoted(value)}; {_EXPECTED}")
    if value.get("type") == "json_schema":
        body = value.get("json_schema", value)
        if not isinstance(body, Mapping) or "schema" not in body:
            raise ValueError(
                'response_format has type "json_schema" but no schema; expected '
                '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
            )
        return _schema_grammar(body["schema"])
    if "regex" in value and len(value) == 1:
        return Grammar(matchers.grammar_from_regex(_text(value["regex"], "regex")))
    if "grammar" in value and len(value) == 1:
        return Grammar(matchers.grammar_from_lark(_text(value["grammar"], "grammar")))
    if "choices" in value and len(value) == 1:
        return Grammar(matchers.grammar_from_lark(_choices(value["choices"])))
    return _schema_grammar(value)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise missing_extra("llguidance", "response_format=", "structured") from None
    return llguidance


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"response_format: {what} is {quoted(value)}; expected a str")
    if not value:
        raise ValueError(f"response_format: {what} is empty; leave response_format out instead")
    if len(value) > _MAX_BYTES:
        raise ValueError(
            f"response_format: {what} has {len(value)} characters; expected at most {_MAX_BYTES}"
        )
    return value


def _choices(choices: Any) -> str:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise TypeError(
            f"response_format: choices is {quoted(choices)}; expected a list of strings"
        )
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise TypeError(
                f"response_format: choices[{index}] is {quoted(choice)}; expected a str of at "
                "least one character"
            )
    size = sum(len(choice.encode(errors="replace")) for choice in choices)
    if len(choices) > _MAX_CHOICES or size > _MAX_CHOICE_BYTES:
        raise ValueError(
            f"response_format: {len(choices)} choices of {size} bytes together; expected at most "
            f"{_MAX_CHOICES} and {_MAX_CHOICE_BYTES}"
        )
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _schema_grammar(schema: Any) -> Grammar:
    if not isinstance(schema, (Mapping, bool)):
        raise TypeError(f"response_format: the JSON schema is {quoted(schema)}; expected a dict")
    if isinstance(schema, bool):
        # What every value and no value follows.
        schema = {} if schema else {"anyOf": [False]}
    _check_size(schema)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"response_format: the JSON schema is not JSON: {error}") from error
    if len(text) > _MAX_BYTES:
        raise ValueError(
            f"response_format: the JSON schema has {len(text)} bytes; expected at most {_MAX_BYTES}"
        )
    return Grammar(_compile_schema(text), json.loads(text))


def _compile_schema(text: str) -> str:
    return _llguidance().LLMatcher.grammar_from_json_schema(
        text, defaults={"whitespace_pattern": _WHITE_SPACE}
    )


def _check_size(schema: Any) -> None:
    """Refuses what is nested too deeply, or contains itself, without recursion."""
    level, parts = [schema], 0
    for _ in range(_MAX_DEPTH + 1):
        inner = []
        for value in level:
            inner += [item for _, item in _items(value)]
            parts += 1
            if parts + len(inner) > _MAX_PARTS:
                raise ValueError(
                    f"response_format: the JSON schema has more than {_MAX_PARTS} parts; give "
                    "those that occur often names in $defs"
                )
        if not inner:
            return
        level = inner
    raise ValueError(
        f"response_format: the JSON schema is nested deeper than {_MAX_DEPTH} levels; give its "
        "inner parts names in $defs"
    )


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


class Compiler:
    """Compiles grammars for one tokenizer. An answer ends with one of `end_ids`."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._llguidance = _llguidance()
        self._limits = self._llguidance.LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False
        )
        try:
            self._tokenizer = self._llguidance.LLTokenizer(
                tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=[*end_ids]
            )
        except Exception as error:  # The library raises what its parts raise.
            raise ValueError(
                f"response_format: llguidance can't use the tokenizer of {tokenizer.folder}: "
                f"{error}"
            ) from error

    def compile(self, grammar: Grammar) -> Any:
        """Returns an `LLMatcher` at the grammar's start.

        ValueError, with the reason and the place, for what nothing satisfies, what llguidance
        does not know, and what is too large for it.
        """
        matcher = self._matcher(grammar.source)
        if reason := self._problem(matcher):
            path = ""
            if grammar.schema is not None:
                path, reason = self._place(grammar.schema, reason)
            where = f" at {path}" if path else ""
            raise ValueError(f"response_format{where}: {reason}")
        return matcher

    def _matcher(self, source: str) -> Any:
        return self._llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)

    def _problem(self, matcher: Any) -> str:
        if not matcher.is_error():
            first = matcher.deep_copy()
            first.compute_bitmask()
            if not first.is_error():
                stuck = first.is_stopped() and not first.is_accepting()
                return _NOTHING if stuck else ""
            matcher = first
        reason = _one_line(matcher.get_error())
        return _NOTHING if reason.startswith("NoExtension") else reason

    def _place(self, schema: Any, reason: str) -> tuple[str, str]:
        """Returns the JSON pointer of the innermost part that is wrong by itself, and why it is."""
        definitions = {}
        if isinstance(schema, Mapping):
            definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        path, current, probes = "", schema, 0
        while True:
            for key, part in _parts(current):
                if not isinstance(part, Mapping):
                    continue
                probes += 1
                if probes > _MAX_PROBES:
                    return path, reason
                source = _compile_schema(json.dumps({**definitions, **part}))
                if problem := self._problem(self._matcher(source)):
                    path, current, reason = f"{path}/{key}", part, problem
                    break
            else:
                return path, reason


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside a schema, with their place in it."""
    if not isinstance(schema, Mapping):
        return
    for name in _SCHEMA_MAPS + _SCHEMA_LISTS:
        for key, part in _items(schema.get(name)):
            yield f"{name}/{str(key).replace('~', '~0').replace('/', '~1')}", part
    for name in _SCHEMAS:
        if isinstance(schema.get(name), Mapping):
            yield name, schema[name]


def _one_line(text: str) -> str:
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= 400 else f"{line[:300]} … {line[-80:]}"


_compilers: weakref.WeakKeyDictionary[Tokenizer, dict[Any, Compiler]] = weakref.WeakKeyDictionary()


def compiler(tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> Compiler:
    """Returns the compiler of a tokenizer; the first takes a second for a full vocabulary."""
    made = _compilers.setdefault(tokenizer, {})
    key = (vocab_size, tuple(end_ids))
    if key not in made:
        made[key] = Compiler(tokenizer, vocab_size, end_ids)
    return made[key]
