"""What a model reads after it has called tools: their results, in the template's own words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemloupe.answer import RESULT_OPEN, TURN_CLOSE
from gemloupe.prompt import Prompt
from gemloupe.tools import ToolResult, as_json


def next_prompt(prompt: Prompt, said: Mapping[str, Any], results: Sequence[ToolResult]) -> Prompt:
    """Returns what follows a model's calls: `ids` of the results alone, to be appended.

    `prompt` is what was read before and `said` the model's message with its calls. The ids begin
    with the token that asks for a result, in place of the one that ended the calls.
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

    begun = render([*prompt.messages, bare], False).removesuffix("\n").removesuffix(TURN_CLOSE)
    problem = None
    for form in _FORMS:
        try:
            text = render([*prompt.messages, *form(bare, results)], True)
        except ValueError as error:
            problem = error
            continue
        tail = text.removeprefix(begun)
        if text.startswith(begun) and tail.startswith(RESULT_OPEN):
            ids = np.array(prompt.tokenizer.encode(tail, bos=False), np.int32)
            ids.setflags(write=False)
            messages = (*prompt.messages, *form(said, results))
            return dataclasses.replace(prompt, ids=ids, media=(), messages=messages)
    raise ValueError(
        f"{template.origin}: the chat template does not continue a tool call with its result; "
        "pass max_tool_rounds=0 and write the next prompt yourself"
    ) from problem


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
