"""Tool calls: what the template writes is read back, whatever the cuts, and nothing is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gemloupe.answer import MARKS, AnswerParser, _MarkSplitter, parse_answer
from gemloupe.chat_template import DEFAULT_PATH, ChatTemplate
from gemloupe.tool_syntax import STRING

TEMPLATE = ChatTemplate({"default": DEFAULT_PATH.read_text("utf-8")}, {"bos_token": "<bos>"})
# All that a string may hold and that means something outside of strings.
DELIMITERS = [
    *"{}[]:,\"'\\ \n\t",
    "<tool_call|>", "<|tool_call>", "<tool_response|>", "<|tool_response>", "<|channel>", "call:f{",
    "<turn|>", "}<tool_call|>", "<|", '|"|', "é", "🙂", "true", "-1.5e3", "null",
]  # fmt: skip


def _text(generator: random.Random) -> str:
    return "".join(generator.choices(DELIMITERS, k=generator.randrange(0, 8)))


def _value(generator: random.Random, depth: int = 0) -> Any:
    kind = generator.randrange(8 if depth < 4 else 6)
    if kind == 0:
        return generator.choice([None, True, False])
    if kind == 1:
        return generator.randrange(-(10**20), 10**20)
    if kind == 2:
        return generator.choice([0.5, -1e-07, 1e22, 3.0, -0.0, generator.random()])
    if kind < 6:
        return _text(generator)
    if kind == 6:
        return [_value(generator, depth + 1) for _ in range(generator.randrange(4))]
    return _arguments(generator, depth + 1)


def _arguments(generator: random.Random, depth: int = 0) -> dict[str, Any]:
    names = ["a", "B", "a_1", "two words", "x-y", "ü", "true", "7", "a.b", "$ref"]
    count = generator.randrange(5)
    return {name: _value(generator, depth) for name in generator.sample(names, count)}


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _written(calls: list[dict[str, Any]], content: str = "") -> str:
    """The model's turn as the template writes it."""
    user = {"role": "user", "content": "x"}
    before = TEMPLATE.render([user], add_generation_prompt=False) + "<|turn>model\n"
    message = {"role": "assistant", "tool_calls": calls, "content": content}
    text = TEMPLATE.render([user, message], add_generation_prompt=False)
    assert text.startswith(before)
    return text[len(before) :].removesuffix("<turn|>\n")


def _in_pieces(text: str, cuts: list[int]) -> AnswerParser:
    parser, splitter = AnswerParser(), _MarkSplitter()
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        for is_mark, piece in splitter.push(text[begin:end]):
            parts.append(parser.mark(piece) if is_mark else parser.feed(piece))
    parts += [parser.feed(piece) for _, piece in splitter.flush()]
    parts.append(parser.finish())
    assert "".join(part.text for part in parts) == parser.text
    assert "".join(part.reasoning for part in parts) == parser.reasoning
    assert [call for part in parts for call in part.tool_calls] == parser.tool_calls
    assert [error for part in parts for error in part.tool_errors] == parser.tool_errors
    return parser


def _functions(parser: AnswerParser) -> list[dict[str, Any]]:
    return [{"type": call["type"], "function": call["function"]} for call in parser.tool_calls]


def _same(a: AnswerParser, b: AnswerParser) -> bool:
    return vars(a).keys() == vars(b).keys() and all(
        getattr(a, name) == getattr(b, name)
        for name in ("text", "reasoning", "tool_calls", "tool_errors")
    )


@pytest.mark.parametrize("seed", range(300))
def test_calls_that_the_template_writes_are_read_back(seed: int) -> None:
    generator = random.Random(seed)
    calls = [
        _call(generator.choice(["f", "get_weather", "a.b", "x-1"]), _arguments(generator))
        for _ in range(generator.randrange(1, 4))
    ]
    text = _written(calls)
    parser = parse_answer(text)
    assert _functions(parser) == calls and parser.tool_errors == [] and parser.text == ""
    assert len({call["id"] for call in parser.tool_calls}) == len(calls)
    cuts = sorted(generator.sample(range(len(text) + 1), min(len(text), 5)))
    assert _same(_in_pieces(text, cuts), parser)


MIXED = (
    "<|channel>thought\nHm: {a}.\n<channel|>Look: "
    '<|tool_call>call:f{a:<|"|>x<tool_call|>}<|"|>,b:[{c:1.5},null]}<tool_call|>'
    "<|tool_call>call:g{<tool_call|>then<|tool_call>call:h{}<tool_call|><|tool_response>"
)


def test_every_split_of_an_answer_reads_the_same() -> None:
    whole = parse_answer(MIXED)
    assert whole.reasoning == "Hm: {a}."
    assert whole.text == "Look: <|tool_call>call:g{<tool_call|>then"
    functions = [call["function"] for call in whole.tool_calls]
    assert functions == [
        {"name": "f", "arguments": {"a": "x<tool_call|>}", "b": [{"c": 1.5}, None]}},
        {"name": "h", "arguments": {}},
    ]
    assert [error["text"] for error in whole.tool_errors] == ["<|tool_call>call:g{<tool_call|>"]
    assert "ends before its last bracket" in whole.tool_errors[0]["error"]
    for first in range(len(MIXED) + 1):
        assert _same(_in_pieces(MIXED, [first]), whole)
    assert _same(_in_pieces(MIXED, list(range(1, len(MIXED)))), whole)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('call:f{"city": "Paris, \\"é\\"", "n": 3}', {"city": 'Paris, "é"', "n": 3}),
        ('call:f{<|"|>a b<|"|>:<|"|>x<|"|>}', {"a b": "x"}),
        ("call:f{city:New York,at:12:30,zip:01234}",
         {"city": "New York", "at": "12:30", "zip": "01234"}),
        (" call: f { a : True , b : None , c : [ 1 , 2 , ] , } ",
         {"a": True, "b": None, "c": [1, 2]}),
        ("call:f{a:1e5,b:-0.5,c:1.,d:--1}", {"a": 1e5, "b": -0.5, "c": "1.", "d": "--1"}),
    ],
)  # fmt: skip
def test_what_models_write_instead_is_understood(body: str, expected: dict[str, Any]) -> None:
    parser = parse_answer(f"<|tool_call>{body}<tool_call|>")
    assert [call["function"]["arguments"] for call in parser.tool_calls] == [expected]


def test_values_without_quotes_follow_the_schema() -> None:
    kinds = {"zip": "string", "n": "integer", "flag": "string", "x": "number"}
    properties: dict[str, Any] = {name: {"type": kind} for name, kind in kinds.items()}
    properties["list"] = {"type": "array", "items": {"type": "STRING"}}
    properties["at"] = {"type": "object", "properties": {"id": {"type": ["string", "null"]}}}
    tool = {"function": {"name": "f", "parameters": {"properties": properties}}}
    text = "call:f{zip:94110,n:3.0,flag:true,x:3.0,list:[1,2],at:{id:null,b:1}}"
    parser = parse_answer(f"<|tool_call>{text}<tool_call|>", tools=[tool])
    assert parser.tool_calls[0]["function"]["arguments"] == {
        "zip": "94110", "n": 3, "flag": "true", "x": 3.0, "list": ["1", "2"],
        "at": {"id": None, "b": 1},
    }  # fmt: skip
    assert isinstance(parser.tool_calls[0]["function"]["arguments"]["n"], int)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("f{}", "expected call:NAME"),
        ("call:f", "has no arguments"),
        ("call:{a:1}", "has no name"),
        ("call:f{a}", "expected : after the key 'a'"),
        ("call:f{a:1}}", "follows the arguments of f"),
        ("call:f{a:,b:1}", "expected a value, got ','"),
        ("call:f{a:1,a:2}", "the key 'a' occurs twice"),
        ("call:f{a:[1}", "expected , or ]"),
        ("call:f{a:" + "[" * 99 + "]" * 99 + "}", "nested deeper than 64"),
        ("call:f{a:" + "{b:" * 20_000, "nested deeper than 64"),
        ('call:f{a:<|"|>x}', 'no closing <|"|>'),
        ('call:f{a:"\\q"}', "not a JSON string"),
    ],
)
def test_a_broken_call_stays_in_the_text_with_its_reason(body: str, reason: str) -> None:
    raw = f"<|tool_call>{body}<tool_call|>"
    parser = parse_answer(f"one {raw} two<|tool_call>call:g{{b:1}}<tool_call|>")
    assert parser.text == f"one {raw} two"
    assert [call["function"]["name"] for call in parser.tool_calls] == ["g"]
    assert [error["text"] for error in parser.tool_errors] == [raw]
    assert reason in parser.tool_errors[0]["error"]


@pytest.mark.parametrize("seed", range(200))
def test_random_marks_lose_nothing_and_never_crash(seed: int) -> None:
    generator = random.Random(seed)
    pieces = generator.choices([*MARKS, *DELIMITERS, "call:f{a:", "}", "word"], k=30)
    text = "".join(pieces)
    parser = parse_answer(text)
    opened = text.count("<|tool_call>")
    assert len(parser.tool_calls) + len(parser.tool_errors) <= opened
    for error in parser.tool_errors:
        assert error["text"] in parser.text
    cuts = sorted(generator.sample(range(len(text) + 1), 6))
    assert _same(_in_pieces(text, cuts), parser)


def test_a_call_cut_off_is_kept_as_text() -> None:
    for cut in ('<|tool_call>call:f{a:<|"|>x', "<|tool_call>call:f{a:1", "<|tool_call>"):
        parser = parse_answer("so " + cut)
        assert parser.text == "so " + cut and len(parser.tool_errors) == 1
        ended = parse_answer("so " + cut + "<turn|>")
        assert ended.text == parser.text and ended.tool_errors == parser.tool_errors


def test_a_call_ends_a_thought_and_needs_no_closing_mark_before_its_result() -> None:
    parser = parse_answer("<|channel>thought\nhm<|tool_call>call:f{}<|tool_response>")
    assert (parser.reasoning, parser.text) == ("hm", "")
    assert [call["function"]["name"] for call in parser.tool_calls] == ["f"]


def test_empty_thoughts_and_stray_closing_marks_leave_nothing() -> None:
    parser = parse_answer("<|channel>thought\n<channel|>a<channel|>b<|channel>thought\n<channel|>")
    assert (parser.reasoning, parser.text) == ("", "ab")


def test_stop_strings_are_not_looked_for_in_calls() -> None:
    text = f"ab<|tool_call>call:f{{a:{STRING}STOP{STRING}}}<tool_call|>cdSTOPef"
    parser = parse_answer(text, stop=["STOP"])
    assert parser.text == "abcd" and len(parser.tool_calls) == 1
