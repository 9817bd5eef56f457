"""Chat templates: Gemma 4's own rules, and the same text as transformers renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemloupe.chat_template import DEFAULT_PATH, ChatTemplate, check_messages
from gemloupe.config import parse_config
from gemloupe.prompt import prepare
from gemloupe.tokenizer import Tokenizer
from tiny_models import save_tiny_tokenizer

USER = {"role": "user", "content": "hi"}
TEXT = {"type": "text"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "w",
        "description": "Get",
        "parameters": {
            "type": "object",
            "properties": {
                "loc": {"type": "string", "description": "City", "enum": ["a", "b"]},
                "days": {"type": ["integer", "null"], "description": "How many"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "at": {
                    "type": "object",
                    "properties": {"x": {"type": "number"}},
                    "required": ["x"],
                },
            },
            "required": ["loc"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": None,
    "reasoning": "look it up",
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {
                "name": "w",
                "arguments": {"loc": "a", "days": 3, "deep": {"x": [1.5, True]}},
            },
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": {"value": "ok", "n": None}}
PICTURE = {
    "role": "user",
    "content": [
        {"type": "image", "url": "x.png"},
        {"type": "text", "text": " what? "},
        {"type": "audio"},
        {"type": "video"},
    ],
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
    "developer_parts": [
        {"role": "developer", "content": [TEXT | {"text": "One."}, TEXT | {"text": "Two."}]},
        USER,
    ],
    "history": [
        USER,
        {"role": "assistant", "content": "<|channel>thought\nx<channel|>Hello"},
        USER,
    ],
    "consecutive_assistants": [
        USER,
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "two"},
        USER,
    ],
    "pending_call": [USER, CALL],
    "call_and_result": [USER, CALL, RESULT],
    "whole_tool_round": [USER, CALL, RESULT, {"role": "assistant", "content": "It is ok."}, USER],
    "old_reasoning": [USER, {"role": "assistant", "content": "a", "reasoning_content": "r"}, USER],
    "media": [PICTURE],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), 480)


def _default(folder: Path, per_layer_input: int = 0) -> ChatTemplate:
    config = {"model_type": "gemma4_text", "hidden_size_per_layer_input": per_layer_input}
    return Tokenizer(folder, parse_config(config)).chat_template


EXAMPLES = {
    "plain": (
        [USER],
        {},
        "<bos><|turn>user\nhi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
    ),
    "thinking": (
        [USER],
        {"thinking": True},
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n",
    ),
    "system_thinking": (
        [{"role": "system", "content": "Be brief."}, USER],
        {"thinking": True},
        "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n",
    ),
    "media": (
        [PICTURE],
        {"add_generation_prompt": False},
        "<bos><|turn>user\n<|image|>what?<|audio|><|video|><turn|>\n",
    ),
    "call_and_result": (
        [
            USER,
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"n": 3, "s": "a"}}]},
            {"role": "tool", "name": "f", "content": "ok"},
        ],
        {},
        "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"
        '<|tool_call>call:f{n:3,s:<|"|>a<|"|>}<tool_call|>'
        '<|tool_response>response:f{value:<|"|>ok<|"|>}<tool_response|>',
    ),
    "tool": (
        [USER],
        {"tools": [{"name": "w", "description": "Get", "parameters": {
            "type": "object", "required": ["loc"],
            "properties": {"loc": {"type": "string", "description": "City", "enum": ["a"]}}}}],
         "add_generation_prompt": False},
        '<bos><|turn>system\n<|tool>declaration:w{description:<|"|>Get<|"|>,parameters:{properties:{'
        'loc:{description:<|"|>City<|"|>,enum:[<|"|>a<|"|>],type:<|"|>STRING<|"|>}},'
        'required:[<|"|>loc<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n<|turn>user\nhi<turn|>\n',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_default_template_follows_gemma_4s_format(folder: Path, name: str) -> None:
    messages, arguments, expected = EXAMPLES[name]
    assert _default(folder).render(messages, **arguments) == expected


def test_only_models_without_per_layer_embeddings_get_an_empty_thought(folder: Path) -> None:
    large, edge = _default(folder).render([USER]), _default(folder, 8).render([USER])
    assert large == edge + "<|channel>thought\n<channel|>"
    assert edge.endswith("<|turn>model\n")


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no_tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_and_ids_equal_transformers(
    folder: Path, name: str, tools: list[Any] | None, thinking: bool
) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder)
    arguments = {
        "chat_template": DEFAULT_PATH.read_text("utf-8"),
        "tools": tools,
        "enable_thinking": thinking,
        "add_generation_prompt": True,
    }
    messages = CONVERSATIONS[name]
    text = ours.chat_template.render(messages, tools=tools, thinking=thinking)
    assert text == theirs.apply_chat_template(messages, tokenize=False, **arguments)
    expected = theirs.apply_chat_template(messages, return_dict=False, **arguments)
    assert ours.encode(text) == expected
    assert expected[0] == ours.bos_id and ours.bos_id not in expected[1:]
    if name != "media":
        prompt = prepare(messages, ours, None, tools=tools, thinking=thinking)
        assert prompt.ids.tolist() == expected


UNUSUAL = (
    "{{ bos_token }}{% for m in messages %}\n"
    "    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
    "{{ m | tojson }}{% generation %} g {% endgeneration %}\n"
    "    {% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ m.get('none') is none }}\n"
    "{% endfor %}\n  {{- strftime_now('%Y') }}{{ tools | tojson(indent=1) }}{{ missing }}"
)


def test_unusual_template_features_equal_transformers(folder: Path, tmp_path: Path) -> None:
    import transformers

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(UNUSUAL)
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "<é>", "none": None},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = Tokenizer(tmp_path).chat_template
    assert not template.is_default
    assert template.render(messages, tools=[WEATHER]) == theirs.apply_chat_template(
        messages, tools=[WEATHER], tokenize=False, add_generation_prompt=True
    )


def test_where_a_template_is_looked_for(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings: dict[str, Any] = {"bos_token": "<bos>", "chat_template": "one"}

    def rendered(tools: list[Any] | None = None) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return Tokenizer(tmp_path).chat_template.render([USER], tools=tools)

    assert rendered() == "one"
    settings["chat_template"] = [
        {"name": "default", "template": "two"},
        {"name": "tool_use", "template": "three"},
    ]
    assert (rendered(), rendered([WEATHER])) == ("two", "three")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered() == "file"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ raise_exception('no system') }}", "refuses these messages: no system"),
        ("{{ messages[9].content }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{% set n = namespace(__class__=1) %}", "refuses these messages"),
        ("{% if %}", "not valid Jinja: .* at line 1"),
    ],
)
def test_refusing_hostile_and_broken_templates_are_value_errors(source: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ChatTemplate({"default": source}).render([USER])


@pytest.mark.parametrize(
    ("messages", "error", "expected"),
    [
        ([], ValueError, "at least one message"),
        (["hi"], TypeError, r"messages\[0\] must be a dict .* got str"),
        ([{"role": "usr", "content": "x"}], ValueError, r"the role 'usr'; expected 'system'"),
        ([{"role": "user"}], ValueError, r'messages\[0\] \(user\) has no "content"'),
        ([{"role": "user", "content": 3}], TypeError, "content must be a str .* got int"),
        ([{"role": "user", "content": ["x"]}], TypeError, r"content\[0\] is 'x'; expected a part"),
        ([{"role": "user", "content": [{"type": "text"}]}], ValueError, 'has no "text"'),
    ],
)
def test_wrong_messages_say_which_and_what(
    messages: list[Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        check_messages(messages)
