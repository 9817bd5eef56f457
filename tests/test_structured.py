"""Answers of a given form: always valid, beside thoughts and tools, and bad forms are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import docs_blocks
import gemloupe as gl
from fake_session import FakeModel, tokenizer_folder
from gemloupe import _core
from gemloupe.generation import generate
from gemloupe.output import Output
from gemloupe.structured import parse_response_format
from gguf_files import write_gguf

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "friend": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "friend"],
    "additionalProperties": False,
}
QUESTION = "What is 27 + 45?"


@pytest.fixture(scope="module")
def edge() -> Any:
    return gl.load("demo:edge", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_answers_follow_a_json_schema(edge: Any, seed: int, thinking: bool) -> None:
    out = edge.chat(QUESTION, response_format=PERSON, seed=seed, thinking=thinking)
    assert out.finish_reason == "stop"
    jsonschema.validate(json.loads(out.text), PERSON)
    assert bool(out.reasoning) == thinking


def test_all_spellings_of_a_schema_give_one_answer(edge: Any) -> None:
    openai = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}
    flat = {"type": "json_schema", "name": "p", "schema": PERSON}
    outs = [edge.chat(QUESTION, response_format=form, seed=3) for form in (PERSON, openai, flat)]
    assert len({out.text for out in outs}) == 1


@pytest.mark.parametrize("form", ["json", {"type": "json_object"}])
def test_json_is_any_object(edge: Any, form: Any) -> None:
    out = edge.chat(QUESTION, response_format=form, seed=1, max_new_tokens=200)
    text = out.text if out.finish_reason == "stop" else "{}"
    assert out.text.startswith("{") and isinstance(json.loads(text), dict)


def test_regexes_choices_and_grammars(edge: Any) -> None:
    for seed in range(3):
        number = edge.chat(QUESTION, response_format={"regex": "[1-9][0-9]{2}"}, seed=seed).text
        assert re.fullmatch("[1-9][0-9]{2}", number)
        choices = ["yes", "no", "maybe so", 'a "quoted" \\ one\n']
        assert edge.chat(QUESTION, response_format={"choices": choices}, seed=seed).text in choices
        grammar = {"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{2,4}/'}
        assert re.fullmatch(
            "<[a-z]{2,4}>", edge.chat("hi", response_format=grammar, seed=seed).text
        )
    text = edge.chat(QUESTION, temperature=0).text
    assert edge.chat(QUESTION, temperature=0, response_format={"type": "text"}).text == text


def test_a_form_that_the_answer_has_anyway_changes_no_token(edge: Any) -> None:
    free = edge.chat(QUESTION, temperature=0, thinking=True)
    out = edge.chat(
        QUESTION, temperature=0, thinking=True, response_format={"regex": r"[\s\S]*"}, logprobs=1
    )
    assert out.ids.tolist() == free.ids.tolist()


def test_log_probabilities_are_those_without_the_mask(edge: Any) -> None:
    out = edge.chat(QUESTION, response_format={"regex": "zq{3}"}, logprobs=2)
    run = edge.run([*out.prompt.ids.tolist(), *out.ids.tolist()[:-1]], logits="all")
    logits = run.logits[len(out.prompt) - 1 :].astype(np.float64)
    for row, token, (logprob, top) in zip(logits, out.ids, out.logprobs, strict=True):
        expected = row - np.log(np.exp(row).sum())
        assert logprob == pytest.approx(expected[token], abs=1e-4)
        assert [i for i, _ in top] == np.argsort(-row, kind="stable")[:2].tolist()


def test_rows_of_a_batch_have_masks_of_their_own(edge: Any) -> None:
    forms = [{"regex": "[a-z]{3}"}, None, PERSON, {"choices": ["left", "right"]}] * 3
    outs = edge.generate(
        [[{"role": "user", "content": QUESTION}]] * 12, response_format=forms, seed=list(range(12))
    )
    for seed, (form, out) in enumerate(zip(forms, outs, strict=True)):
        alone = edge.chat(QUESTION, response_format=form, seed=seed)
        assert out.ids.tolist() == alone.ids.tolist()


def test_a_gguf_files_vocabulary_serves_as_well(tmp_path: Path) -> None:
    demo = docs_blocks.DEMO
    write_gguf(tmp_path / "edge.gguf", demo, tokenizer=demo)
    model = gl.load(tmp_path / "edge.gguf")
    out = model.chat(QUESTION, response_format=PERSON, seed=1, thinking=True)
    jsonschema.validate(json.loads(out.text), PERSON)


def test_a_tokenizer_that_llguidance_lacks_is_refused(folder: Path) -> None:
    model = _model(folder, "x")
    model.tokenizer.backend.decoder = None
    with pytest.raises(ValueError, match="llguidance can't use the tokenizer of .*decoder"):
        _generate(model, response_format="json")


def test_tools_thoughts_and_form_together_in_a_stream(edge: Any) -> None:
    def calculator(expression: str) -> int:
        """Calculate.

        Args:
            expression: For example 2+3.
        """
        return 1665

    form = {"regex": r"37 \* 45 = [0-9]{1,6}"}
    arguments = {"tools": [calculator], "thinking": True, "response_format": form, "temperature": 0}
    messages = [{"role": "user", "content": "What is 37 * 45?"}]
    arguments["max_thinking_tokens"] = 40
    stream = edge.generate(messages, stream=True, **arguments)
    pieces = list(stream)
    out = stream.result
    assert [result.content for piece in pieces for result in piece.tool_results] == [1665]
    assert out.text == "37 * 45 = 1665" and out.text == "".join(piece.text for piece in pieces)
    reasoning = "".join(piece.reasoning for piece in pieces)
    assert reasoning == out.rounds[0].reasoning + out.reasoning and reasoning
    same = edge.generate(messages, **arguments)
    assert same.ids.tolist() == out.ids.tolist()


def _generate(model: FakeModel, **arguments: Any) -> Output:
    out = generate(model, [{"role": "user", "content": "hi"}], **arguments)
    assert isinstance(out, Output)
    return out


def _model(folder: Path, *scripts: str) -> FakeModel:
    model = FakeModel(folder, *scripts)
    ends = [model.tokenizer.id(piece) for piece in ("<eos>", "<turn|>", "<|tool_response>")]
    model.generation_config = {"eos_token_id": ends}
    return model


# A script says what the model would like to write; the mask changes what is not allowed.
def test_the_form_begins_after_the_thought_and_allows_one_only(folder: Path) -> None:
    form = {"regex": "[xy]{2}"}
    wish = "<|channel>thought\na<eos>b<turn|>c\n<channel|>xy<turn|>"
    out = _generate(_model(folder, wish), response_format=form, thinking=True)
    # Nothing ends the row in the middle of a thought.
    assert out.reasoning.startswith("a") and out.text == "xy" and out.finish_reason == "stop"
    off = _generate(_model(folder, "<|channel>y<turn|>" + "x" * 4), response_format=form)
    assert off.reasoning == "" and re.fullmatch("[xy]{2}", off.text)
    twice = "<|channel>thought\na\n<channel|><|channel>y<turn|>"
    again = _generate(_model(folder, twice), response_format=form, thinking=True)
    assert again.reasoning == "a" and re.fullmatch("[xy]{2}", again.text)


def test_calls_stay_free_and_end_without_text_behind_them(folder: Path) -> None:
    form = {"regex": "[xy]{2}"}
    tool = {"name": "f"}
    wish = '<|tool_call>call:f{a:<|"|><tool_call|>q<|"|>}<tool_call|><|tool_response>'
    out = _generate(_model(folder, wish), response_format=form, tools=[tool])
    assert out.finish_reason == "tool_calls"
    assert out.tool_calls[0]["function"]["arguments"] == {"a": "<tool_call|>q"}
    out = _generate(_model(folder, wish.replace("<|tool_response>", "xy")), response_format=form,
                    tools=[tool])  # fmt: skip
    assert out.text == "" and len(out.tool_calls) == 1
    plain = _generate(_model(folder, wish), response_format=form, max_new_tokens=3)
    assert plain.tool_calls == [] and re.fullmatch("[xy]{2}", plain.text)


def test_stop_strings_end_a_form_early(folder: Path) -> None:
    out = _generate(_model(folder, '{"a":12,"b":3}'), response_format="json", stop=[","])
    assert (out.text, out.finish_reason) == ('{"a":12', "stop")


def test_suppressed_ids_stay_forbidden(folder: Path) -> None:
    model = _model(folder, "x<eos>")
    token = model.tokenizer.id("x")
    model.generation_config["suppress_tokens"] = [token]
    assert _generate(model, response_format={"regex": "[xy]"}).text == "y"
    with pytest.raises(ValueError, match="no token of the vocabulary can continue the answer"):
        _generate(model, response_format={"regex": "x"})


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength .5. is greater than"),
        (
            {"type": "object", "required": ["x"], "properties": {"x": {"type": "array",
             "minItems": 1, "items": {"allOf": [{"type": "string"}, {"type": "integer"}]}}}},
            "at /properties/x/items: Unsatisfiable schema: incompatible types",
        ),
        ({"properties": {"a/b": {"not": {}}}}, r"at /properties/a~1b: Unimplemented keys: ..not"),
        ({"properties": {"a": {"$ref": "#/$defs/q"}}}, "at /properties/a: Pointer '/.defs/q' does"),
        ({"properties": {"a": {"$ref": "http://x.y/z"}}}, "at /properties/a: Resource .* not"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "json_schema", "json_schema": {"schema": False}}, "nsatisfiable"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": r"[^\s\S]"}, "no text satisfies it"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "start: start"}, "no text satisfies it"),
        ({"type": "json_schema"}, 'type "json_schema" but no schema'),
        ({"default": float("nan")}, "is not JSON"),
        ({"regex": ""}, "regex is empty"),
    ],
)  # fmt: skip
def test_forms_that_nothing_has_are_refused_with_the_place(
    edge: Any, form: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        edge.chat("hi", response_format=form, max_new_tokens=1)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (3, "response_format is 3; expected a JSON schema"),
        ("xml", "response_format is 'xml'"),
        ({"choices": []}, r"choices is \[\]"),
        ({"choices": ["a", ""]}, r"choices\[1\] is ''"),
        ({"regex": 3}, "regex is 3"),
        ({"type": "json_schema", "schema": 3}, "the JSON schema is 3"),
    ],
)
def test_forms_of_the_wrong_type_are_refused(form: Any, expected: str) -> None:
    with pytest.raises(TypeError, match=expected):
        parse_response_format(form)


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _recursive() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


def _doubling(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


HOSTILE: dict[str, Any] = {
    "deep": _nested(10_000),
    "recursive": _recursive(),
    "doubling": _doubling(30),
    "many_properties": {"properties": {f"p{i}": {"type": "string"} for i in range(20_000)}},
    "large_enum": {"enum": [f"v{i}" for i in range(200_000)]},
    "large_text": {"enum": ["x" * 2_000_000]},
    "factors": {"type": "integer", "multipleOf": 999_999_937, "minimum": 3, "maximum": 10**30},
    "references": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                   "$ref": "#/$defs/a"},
    "nested_regex": {"regex": "(" * 100_000 + "a" + ")" * 100_000},
    "many_choices": {"choices": [str(i) for i in range(20_000)]},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_are_refused_within_seconds(edge: Any, name: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match="response_format"):
        edge.chat("hi", response_format=HOSTILE[name], max_new_tokens=1)
    assert time.process_time() - started < 5


SLOW = [
    {"regex": "((a{1,30}){1,30}){1,30}b"},
    {"regex": "(x+x+)+y"},
    {"regex": "(.*a.{0,100}b){200}"},
    {"regex": "a{1000000}"},
    {"type": "string", "minLength": 10**9},
    {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
]
_MEASURE = """
import resource, sys, time
import gemloupe as gl
model = gl.load("demo:edge", "float32", threads=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for form in eval(sys.stdin.read()):
    started = time.process_time()
    try:
        model.chat("hi", response_format=form, max_new_tokens=16, seed=1)
    except ValueError as error:
        assert "response_format" in str(error), error
    seconds = time.process_time() - started
    assert seconds < 5, (form, seconds)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 300_000, grown
"""


def test_forms_that_are_hard_to_follow_take_bounded_time_and_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], input=repr(SLOW), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_error_while_the_form_is_followed_leaves_the_cache_as_it_was(edge: Any) -> None:
    cache = edge.new_cache()
    edge.run([2, 5, 6], cache=cache)
    held = cache.tokens.tolist()
    with pytest.raises(ValueError, match="response_format"):
        edge.generate([5], cache=cache, response_format={"regex": "a{1000000}"}, seed=1)
    assert cache.tokens.tolist() == held
    assert edge.generate([5], cache=cache, max_new_tokens=2).finish_reason == "length"


def test_ctrl_c_is_heard_while_a_mask_is_awaited(edge: Any) -> None:
    session, request = _core.Session(edge.core), _core.RowRequest()
    request.ids, request.max_new_tokens = [2, 5], 3
    request.mask = _core.TokenMask(edge.config.text.vocab_size)
    session.submit(request)
    code = "import _thread, time; time.sleep(0.3); _thread.interrupt_main()"
    import threading

    threading.Thread(target=lambda: exec(code)).start()
    with pytest.raises(KeyboardInterrupt):
        session.step()
    assert session.active == 0


def test_a_mask_of_another_vocabulary_is_refused(edge: Any) -> None:
    session, request = _core.Session(edge.core), _core.RowRequest()
    request.ids, request.max_new_tokens = [2], 1
    request.mask = _core.TokenMask(7)
    with pytest.raises(ValueError, match="the token mask is for 7 ids, expected"):
        session.submit(request)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_sampler_chooses_among_the_ids_of_the_mask(edge: Any, temperature: float) -> None:
    size = edge.config.text.vocab_size
    generator = np.random.default_rng(0)
    for count in (1, 2, 40):
        allowed = generator.choice(size, count, replace=False)
        session, request = _core.Session(edge.core), _core.RowRequest()
        request.ids, request.max_new_tokens = [2, 5], 20
        request.sampling.temperature, request.sampling.seed = temperature, 3
        request.mask = mask = _core.TokenMask(size)
        session.submit(request)
        run = edge.run([2, 5])
        best = allowed[np.argmax(run.logits[0][allowed])]
        for step in range(20):
            mask.words[:] = 0
            np.bitwise_or.at(mask.words, allowed // 32, np.uint32(1) << (allowed % 32).astype("u4"))
            mask.allow()
            (result,) = session.step()
            assert result.token in allowed
            if step == 0 and temperature == 0:
                assert result.token == best


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"gemloupe\[structured\]"):
        parse_response_format("json")
