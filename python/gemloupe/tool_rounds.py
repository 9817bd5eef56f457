"""What a model reads after it has called tools: their results, in the template's own words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemloupe.answer import RESULT_OPEN, TURN_CLOSE
from gemloupe.prompt import Prompt
from gemloupe.tokenizer import Tokenizer
from gemloupe.tools import ToolResult, as_json

# The form of every special token.
_PIECE = re.compile(r"<[^\s<>]{1,40}>")


def next_prompt(prompt: Prompt, said: Mapping[str, Any], results: Sequence[ToolResult]) -> Prompt:
    """Returns what follows a model's calls: `ids` of the results alone, to be appended.

    `prompt` is what was read before and `said` the model's message with its calls. The ids begin
    with the token that asks for a result, in place of the one that ended the calls. Special tokens
    written out in results are read as ordinary text: results may come from strangers.
    ValueError where the chat template has no place for results.
    """
    template = prompt.tokenizer.chat_template
    tools = [tool.schema for tool in prompt.tools]
    # Templates disagree about where a text beside calls stands; what follows is the same.
    bare = {**said, "content": ""}

    def render(messages: Sequence[Mapping[str, Any]], asks: bool) -> str:
        return template.render(
            messages, tools=tools, thinking=prompt.thinking, add_generation_prompt=asks
        )

    cut = _unused_text(results)
    harmless = [_without_specials(result, prompt.tokenizer, cut) for result in results]
    begun = render([*prompt.messages, bare], False).removesuffix("\n").removesuffix(TURN_CLOSE)
    problem = None
    for form in _FORMS:
        try:
            text = render([*prompt.messages, *form(bare, harmless)], True)
        except ValueError as error:
            problem = error
            continue
        tail = text.removeprefix(begun)
        if text.startswith(begun) and tail.startswith(RESULT_OPEN):
            pieces = [prompt.tokenizer.encode(piece, bos=False) for piece in tail.split(cut)]
            ids = np.array([id for piece in pieces for id in piece], np.int32)
            ids.setflags(write=False)
            messages = (*prompt.messages, *form(said, results))
            return dataclasses.replace(prompt, ids=ids, media=(), messages=messages)
    raise ValueError(
        f"{template.origin}: the chat template does not continue a tool call with its result; "
        "pass max_tool_rounds=0 and write the next prompt yourself"
    ) from problem


def _unused_text(results: Sequence[ToolResult]) -> str:
    """A text that occurs in no result."""
    text = repr([result.content for result in results])
    cut = "\ue000"
    while cut in text or ascii(cut)[1:-1] in text:
        cut += "\ue000"
    return cut


def _without_specials(result: ToolResult, tokenizer: Tokenizer, cut: str) -> ToolResult:
    """Puts `cut` into every special token that is written out in a result."""

    def broken(match: re.Match[str]) -> str:
        special = tokenizer.id(match[0]) in tokenizer.special_ids
        return f"<{cut}{match[0][1:]}" if special else match[0]

    def harmless(value: Any) -> Any:
        if isinstance(value, str):
            return _PIECE.sub(broken, value)
        if isinstance(value, Mapping):
            return {harmless(key): harmless(item) for key, item in value.items()}
        return [harmless(item) for item in value] if isinstance(value, list) else value

    return dataclasses.replace(result, content=harmless(result.content))


def check_template(prompt: Prompt) -> None:
    """Raises ValueError where `next_prompt` would, before anything is generated."""
    name = prompt.tools[0].name
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": {}}}
    next_prompt(prompt, {"role": "assistant", "tool_calls": [call]}, [ToolResult(call, "")])


# The ways in which templates take the message with calls and their results, the newest first.


def _as_messages(said: Mapping[str, Any], results: Sequence[ToolResult]) -> list[Any]:
    return [said, *(result.message for result in results)]


def _beside_calls(said: Mapping[str, Any], results: Sequence[ToolResult]) -> list[Any]:
    messages = [result.message for result in results]
    beside = [{"name": each["name"], "response": each["content"]} for each in messages]
    return [{**said, "tool_responses": beside}]


def _as_texts(said: Mapping[str, Any], results: Sequence[ToolResult]) -> list[Any]:
    messages: list[Any] = [said]
    for result in results:
        content = result.message["content"]
        text = content if isinstance(content, str) else as_json(content)
        messages.append({**result.message, "content": text})
    return messages


_FORMS = (_as_messages, _beside_calls, _as_texts)
