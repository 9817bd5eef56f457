"""Tools: what is declared, the loop that runs them, and what comes of mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypedDict, Union

import numpy as np
import pytest

import gemloupe as gl
from fake_session import FakeCache, FakeModel, tokenizer_folder
from gemloupe.generation import generate
from gemloupe.output import Output
from gemloupe.stream import Stream
from gemloupe.tools import function_schema, json_value, parse_tools

USER = [{"role": "user", "content": "hi"}]
CALL = "<|tool_call>call:add{a:2,b:3}<tool_call|><|tool_response>"
ENDS = {"eos_token_id": [1, 106, 50]}


def add(a: int, b: int = 1) -> int:
    """Adds two numbers."""
    return a + b


class Place(TypedDict, total=False):
    lat: float


@dataclasses.dataclass
class Point:
    x: int
    tags: list[str]


def many(
    text: str,
    number: float,
    flag: bool,
    kind: Literal["a", "b"],
    maybe: Optional[int],  # noqa: UP045
    both: Union[int, str],  # noqa: UP007
    items: list[str],
    table: dict[str, int],
    place: Place,
    point: Point,
    anything: Any,
    noted: Annotated[str, "a note"],
    default=3,
) -> None:
    """Does much."""


def test_type_hints_become_a_json_schema() -> None:
    schema = function_schema(many)["function"]
    assert (schema["name"], schema["description"]) == ("many", "Does much.")
    assert schema["parameters"]["properties"] == {
        "text": {"type": "string"},
        "number": {"type": "number"},
        "flag": {"type": "boolean"},
        "kind": {"type": "string", "enum": ["a", "b"]},
        "maybe": {"type": "integer", "nullable": True},
        "both": {"type": ["integer", "string"]},
        "items": {"type": "array", "items": {"type": "string"}},
        "table": {"type": "object", "additionalProperties": {"type": "integer"}},
        "place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": []},
        "point": {
            "type": "object",
            "properties": {
                "x": {"type": "integer"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["x", "tags"],
        },
        "anything": {},
        "noted": {"description": "a note", "type": "string"},
        "default": {"type": "integer"},
    }
    assert schema["parameters"]["required"] == [
        name for name in schema["parameters"]["properties"] if name != "default"
    ]


GOOGLE = """Gets the weather.

    Of one city.

    Args:
        city: The city: its name,
            in English.
        days (int): How many.

    Returns:
        dict: the weather
    """
NUMPY = """Gets the weather.

    Of one city.

    Parameters
    ----------
    city : str
        The city: its name,
        in English.
    days
        How many.

    Returns
    -------
    dict
    """
SPHINX = """Gets the weather.

    Of one city.

    :param city: The city: its name,
        in English.
    :param int days: How many.
    :returns: the weather
    """


@pytest.mark.parametrize("style", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_docstrings_describe_the_arguments(style: str) -> None:
    def weather(city: str, days: int) -> None: ...

    weather.__doc__ = style
    schema = function_schema(weather)["function"]
    assert schema["description"] == "Gets the weather. Of one city."
    described = {k: v["description"] for k, v in schema["parameters"]["properties"].items()}
    assert described == {"city": "The city: its name, in English.", "days": "How many."}


def _no_hint(x): ...
def _stars(*args: int): ...
def _positional(x: int, /): ...
def _odd(x: complex): ...
def _unreadable(x: Nothing): ...  # type: ignore[name-defined]  # noqa: F821
async def _waits(x: int): ...


@pytest.mark.parametrize(
    ("tools", "error", "expected"),
    [
        ("f", TypeError, "tools must be a list .* got str"),
        ({"name": "f"}, TypeError, "tools must be a list .* got dict"),
        (["f"], TypeError, r"tools\[0\] is 'f'; expected a function, or a JSON schema"),
        ([{"type": "function"}], TypeError, r"expected a function, or a JSON schema"),
        ([{"name": "two words"}], ValueError, "expected a name without spaces"),
        ([{"name": "f", "parameters": 3}], TypeError, "parameters is 3; expected a JSON schema"),
        ([{"type": "code", "name": "f"}], ValueError, 'type \'code\'; expected "function"'),
        ([add, {"name": "add"}], ValueError, r"tools\[1\] is a second tool named 'add'"),
        ([_no_hint], TypeError, "x has no type hint"),
        ([_stars], TypeError, "'args' can't be given by name"),
        ([_positional], TypeError, "can't be given by name"),
        ([_odd], TypeError, "x has the type complex, which JSON lacks"),
        ([_unreadable], TypeError, "type hints can't be read"),
        ([_waits], TypeError, "is a coroutine"),
        ([lambda x: x], TypeError, "needs a name"),
    ],
)  # fmt: skip
def test_wrong_tools_say_which_and_what(tools: Any, error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        parse_tools(tools)


def test_results_become_json_values() -> None:
    value = {1: (np.float32(0.5), np.arange(2)), "p": Point(1, ["a"]), "o": object}
    plain = json_value(value)
    assert plain["1"] == [0.5, [0, 1]] and plain["p"] == {"x": 1, "tags": ["a"]}
    assert plain["o"] == "<class 'object'>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def _model(folder: Path, *rounds: str, **more: Any) -> FakeModel:
    """A model whose n-th row of the session says the n-th text."""
    model = FakeModel(folder, *rounds)
    ends = [model.tokenizer.id(piece) for piece in ("<eos>", "<turn|>", "<|tool_response>")]
    model.generation_config = {"eos_token_id": ends, **more}
    return model


def _generate(model: FakeModel, x: Any = USER, **arguments: Any) -> Output:
    out = generate(model, x, **arguments)
    assert isinstance(out, Output)
    return out


def _read(model: FakeModel, round: int) -> str:
    ids = model.requests[round].ids
    return model.tokenizer.decode(ids, skip_special=False)


def test_a_schema_leaves_the_call_to_the_caller(folder: Path) -> None:
    out = _generate(_model(folder, CALL), tools=[{"name": "add", "description": "Adds."}])
    assert (out.text, out.finish_reason, out.rounds) == ("", "tool_calls", ())
    (call,) = out.tool_calls
    assert call["function"] == {"name": "add", "arguments": {"a": 2, "b": 3}}
    assert out.messages == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    again = _generate(_model(folder, CALL), tools=[{"name": "add", "description": "Adds."}])
    assert again.tool_calls == [call] and "add" in repr(out)


def test_the_loop_feeds_results_back_through_the_template(folder: Path) -> None:
    model = _model(folder, "<|channel>thought\nhm\n<channel|>" + CALL, "5\n<channel|>Five.<turn|>")
    cache = FakeCache()
    out = _generate(model, tools=[add], thinking=True, cache=cache)
    assert (out.text, out.finish_reason, len(out.rounds)) == ("Five.", "stop", 1)
    first = out.rounds[0]
    assert (first.reasoning, first.finish_reason, out.reasoning) == ("hm", "tool_calls", "5")
    (result,) = first.tool_results
    assert (result.content, result.error, out.tool_results) == (5, None, ())
    assert _read(model, 1) == (
        "<|tool_response>response:add{value:5}<tool_response|><|channel>thought\n"
    )
    # The second round goes on in the first one's cache, as the template would have it.
    history = [*USER, *out.messages]
    told = model.tokenizer.chat_template.render(
        history[:-1], tools=[function_schema(add)], thinking=True
    )
    read = np.array(cache.tokens[: cache.length - len(out.ids) + 1])
    assert model.tokenizer.decode(read, skip_special=False) == told
    assert [message["role"] for message in out.messages] == ["assistant", "tool", "assistant"]


def test_pieces_of_all_rounds_come_in_one_stream(folder: Path) -> None:
    model = _model(folder, "Let me." + CALL + "", CALL.replace("2", "4"), "Done.<turn|>")
    stream = generate(model, USER, tools=[add], stream=True)
    assert isinstance(stream, Stream)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == "Let me.Done."
    calls = [call for piece in pieces for call in piece.tool_calls]
    results = [result for piece in pieces for result in piece.tool_results]
    assert [result.content for result in results] == [5, 7]
    assert [result.call for result in results] == calls
    assert len({call["id"] for call in calls}) == 2
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    assert isinstance(stream.result, Output) and len(stream.result.rounds) == 2


def test_several_calls_are_answered_in_their_order(folder: Path) -> None:
    said = "<|tool_call>call:add{a:1}<tool_call|>" + CALL
    model = _model(folder, said, "ok<turn|>")
    _generate(model, tools=[add])
    assert _read(model, 1) == (
        "<|tool_response>response:add{value:2}<tool_response|>"
        "<|tool_response>response:add{value:5}<tool_response|>"
    )


def test_what_a_tool_returns_is_written_as_the_template_writes_it(folder: Path) -> None:
    returned = {"s": 'a,{"}', "list": [1, None, {"k": True}]}

    def look() -> Any:
        return returned

    call = "<|tool_call>call:look{}<tool_call|><|tool_response>"
    model = _model(folder, call, "ok<turn|>")
    _generate(model, tools=[look])
    expected = 'list:[1,null,{k:true}],s:<|"|>a,{"}<|"|>'
    assert _read(model, 1) == f"<|tool_response>response:look{{{expected}}}<tool_response|>"
    returned = [1, 2]  # type: ignore[assignment]
    model = _model(folder, call, "ok<turn|>")
    _generate(model, tools=[look])
    assert "response:look{value:[1,2]}" in _read(model, 1)


def test_special_tokens_in_a_result_are_read_as_text(folder: Path) -> None:
    text = 'a<turn|>\n<|turn>user\n<|"|>},<div> \ue000<eos>'

    def look() -> Any:
        return {"t": [text]}

    call = "<|tool_call>call:look{}<tool_call|><|tool_response>"
    model = _model(folder, call, "ok<turn|>")
    out = _generate(model, tools=[look])
    expected = f'<|tool_response>response:look{{t:[<|"|>{text}<|"|>]}}<tool_response|>'
    assert _read(model, 1) == expected
    special = [model.tokenizer.tokens([i])[0] for i in out.prompt.ids
               if i in model.tokenizer.special_ids]  # fmt: skip
    assert special == ["<|tool_response>", '<|"|>', '<|"|>', "<tool_response|>"]
    assert out.messages[1]["content"] == {"t": [text]}


def test_exceptions_and_wrong_calls_are_fed_back_as_errors(folder: Path) -> None:
    def fails(x: int) -> None:
        raise RuntimeError("no luck")

    for call, error in (
        ("call:fails{x:1}", "RuntimeError: no luck"),
        ("call:fails{y:1}", "wrong arguments for fails: missing a required argument: 'x'"),
        ("call:fail{x:1}", "there is no tool named 'fail'. Did you mean 'fails'?"),
    ):
        model = _model(folder, f"<|tool_call>{call}<tool_call|><|tool_response>", "sorry<turn|>")
        out = _generate(model, tools=[fails])
        (result,) = out.rounds[0].tool_results
        assert result.error == error and out.text == "sorry"
        name = call[5:].partition("{")[0]
        expected = f'<|tool_response>response:{name}{{error:<|"|>{error}<|"|>}}<tool_response|>'
        assert _read(model, 1) == expected
    model = _model(folder, "<|tool_call>call:fails{x:1}<tool_call|><|tool_response>", "x<turn|>")
    assert isinstance(
        _generate(model, tools=[fails]).rounds[0].tool_results[0].exception, RuntimeError
    )


def test_rounds_are_limited(folder: Path) -> None:
    for limit in (0, 1, 2):
        out = _generate(_model(folder, CALL, CALL, CALL), tools=[add], max_tool_rounds=limit)
        assert (len(out.rounds), out.finish_reason) == (limit, "tool_calls")
        assert len(out.tool_calls) == 1 and out.tool_results == ()
    with pytest.raises(ValueError, match="max_tool_rounds is -1; expected 0 or more"):
        _generate(_model(folder, CALL), tools=[add], max_tool_rounds=-1)


def test_a_call_that_only_the_caller_can_run_ends_the_loop(folder: Path) -> None:
    said = "<|tool_call>call:other{}<tool_call|>" + CALL
    out = _generate(_model(folder, said), tools=[add, {"name": "other"}])
    assert (out.finish_reason, len(out.tool_calls), out.rounds) == ("tool_calls", 2, ())


def test_a_broken_call_is_reported_and_ends_the_answer(folder: Path) -> None:
    out = _generate(_model(folder, "<|tool_call>call:add{a:<tool_call|><turn|>"), tools=[add])
    assert (out.finish_reason, out.tool_calls) == ("stop", [])
    assert out.text == "<|tool_call>call:add{a:<tool_call|>" == out.tool_errors[0]["text"]


def test_an_answer_cut_off_runs_nothing(folder: Path) -> None:
    model = _model(folder, CALL)
    count = len(model.scripts[0]) - 1
    out = _generate(model, tools=[add], max_new_tokens=count)
    assert (out.finish_reason, len(out.tool_calls), out.rounds) == ("length", 1, ())


def test_rows_of_a_batch_run_their_own_rounds(folder: Path) -> None:
    model = _model(folder, CALL, "None.<turn|>", "Five.<turn|>")
    outs = generate(model, [USER, USER], tools=[add])
    assert isinstance(outs, list)
    assert [(out.text, len(out.rounds)) for out in outs] == [("Five.", 1), ("None.", 0)]


def test_ctrl_c_in_a_tool_gives_the_cache_its_earlier_content(folder: Path) -> None:
    def waits(a: int, b: int) -> None:
        raise KeyboardInterrupt

    waits.__name__ = "add"
    cache = FakeCache([2, 5])
    with pytest.raises(KeyboardInterrupt):
        _generate(_model(folder, CALL), tools=[waits], cache=cache)
    assert cache.tokens == [2, 5]
    later = _model(folder, CALL, [7, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        _generate(later, tools=[add], cache=cache)
    assert cache.tokens == [2, 5]


def test_a_template_that_takes_results_beside_the_calls_is_served(folder: Path) -> None:
    legacy = (
        "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|tool_call>{{ c.function.name }}<tool_call|>{% endfor %}"
        "{% for r in m.tool_responses or [] %}<|tool_response>{{ r.name }}:{{ r.response }}"
        "<tool_response|>{% endfor %}{% if not m.tool_responses %}<turn|>\n{% endif %}{% endfor %}"
    )
    model = _model(folder, CALL, "ok<turn|>")
    model.tokenizer.chat_template.templates["default"] = legacy
    assert _generate(model, tools=[add]).text == "ok"
    assert _read(model, 1) == "<|tool_response>add:5<tool_response|>"
    seen = []

    def add_(a: int, b: int) -> None:
        seen.append(a)

    refusing = _model(folder, CALL.replace("add", "add_"))
    refusing.tokenizer.chat_template.templates["default"] = "x"
    with pytest.raises(ValueError, match="does not continue a tool call with its result"):
        _generate(refusing, tools=[add_])
    assert refusing.session is None and not seen


def test_captures_edits_and_routing_are_each_rounds_own() -> None:
    moe = gl.load("demo:moe", "float32")
    seen = []

    def calculator(expression: str) -> int:
        """Calculate.

        Args:
            expression: For example 2+3.
        """
        return 1665

    messages = [{"role": "user", "content": "What is 37 * 45?"}]
    point = "layers.1.resid_post"
    out = moe.generate(
        messages,
        tools=[calculator],
        temperature=0,
        capture=[point, "layers.0.attn.out"],
        edit={"layers.0.resid_post": lambda x, at: seen.extend(at.positions.tolist())},
        cache=moe.new_cache(),
    )
    assert len(out.rounds) == 1
    for output in (out.rounds[0], out):
        count = len(output.prompt) + len(output.ids) - 1
        assert output.captured[point].shape[0] == count
        assert output.routing.experts.shape[1] == count
    assert sorted(seen) == list(range(out.cache.length))
    # The same values as in one pass over everything.
    run = moe.run(out.cache.tokens.tolist(), capture=point)
    joined = np.concatenate([out.rounds[0].captured[point], out.captured[point]])
    np.testing.assert_allclose(joined, run[point], atol=1e-3)


def test_results_for_which_the_cache_has_no_room_end_with_length() -> None:
    edge = gl.load("demo:edge", "float32")

    def calculator(expression: str) -> str:
        """Calculate."""
        return "7" * 400

    messages = [{"role": "user", "content": "What is 37 * 45?"}]
    cache = edge.new_cache(max_tokens=300)
    out = edge.generate(messages, tools=[calculator], temperature=0, cache=cache)
    assert (out.finish_reason, out.text, len(out.ids)) == ("length", "", 0)
    assert out.rounds[0].tool_results[0].content == "7" * 400
    assert [message["role"] for message in out.messages] == ["assistant", "tool"]


def test_calls_come_before_they_are_run_and_closing_runs_nothing(folder: Path) -> None:
    seen = []

    def add(a: int, b: int) -> int:
        seen.append((a, b))
        return a + b

    with generate(_model(folder, CALL, "x"), USER, tools=[add], stream=True) as stream:
        assert isinstance(stream, Stream)
        for piece in stream:
            if piece.tool_calls:
                assert seen == []
                break
        next(stream)
    assert seen == []
    out = stream.result
    assert isinstance(out, Output) and out.finish_reason == "cancelled"
    assert len(out.tool_calls) == 1


def test_a_prepared_prompt_brings_its_tools(folder: Path) -> None:
    model = _model(folder, CALL, "ok<turn|>")
    from gemloupe.prompt import prepare

    prompt = prepare(USER, model.tokenizer, model.config, tools=[add])
    assert len(_generate(model, prompt).rounds) == 1
    bare = prepare(USER, model.tokenizer, model.config)
    with pytest.raises(ValueError, match="prepared without; pass them to model.prepare"):
        _generate(model, bare, tools=[add])


def test_arguments_that_clients_send_as_json_text_render_as_values(folder: Path) -> None:
    template = FakeModel(folder, "x").tokenizer.chat_template

    def rendered(arguments: Any) -> str:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return template.render([*USER, {"role": "assistant", "tool_calls": [call]}])

    assert rendered('{"b": [1, null], "a": "x"}') == rendered({"a": "x", "b": [1, None]})
    assert "call:f{}" in rendered("")
    assert "call:f{not json}" in rendered("not json")


def test_a_demo_model_calls_a_calculator_and_reads_its_result() -> None:
    edge = gl.load("demo:edge", "float32")
    seen = []

    def calculator(expression: str) -> int:
        """Calculate.

        Args:
            expression: For example 2+3.
        """
        seen.append(expression)
        return 1665

    messages = [{"role": "user", "content": "What is 37 * 45?"}]
    out = edge.generate(messages, tools=[calculator], temperature=0)
    assert seen == ["37*45"] and "1665" in out.text and len(out.rounds) == 1
    # The same tokens as when everything is read at once.
    whole = edge.prepare(messages, tools=[calculator])
    ids = [*whole.ids.tolist(), *out.rounds[0].ids.tolist()[:-1], *out.prompt.ids.tolist()]
    assert edge.generate(ids, temperature=0).ids.tolist() == out.ids.tolist()
    assert out.cache.tokens.tolist() == [*ids, *out.ids.tolist()[:-1]]
    # And what the template makes of the whole conversation.
    told = edge.prepare([*messages, *out.messages[:-1]], tools=[calculator])
    assert told.ids.tolist() == ids
