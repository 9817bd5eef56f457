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
    before = [*prompt.messages, said]

    def render(messages: Sequence[Mapping[str, Any]], asks: bool) -> str:
        return template.render(
            messages, tools=tools, thinking=prompt.thinking, add_generation_prompt=asks
        )

    begun = render(before, False).removesuffix("\n").removesuffix(TURN_CLOSE)
    problem = None
    for added in _forms(said, results):
        messages = [*prompt.messages, *added]
        try:
            text = render(messages, True)
        except ValueError as error:
            problem = error
            continue
        tail = text.removeprefix(begun)
        if text.startswith(begun) and tail.startswith(RESULT_OPEN):
            ids = np.array(prompt.tokenizer.encode(tail, bos=False), np.int32)
            ids.setflags(write=False)
            return dataclasses.replace(prompt, ids=ids, media=(), messages=tuple(messages))
    raise ValueError(
        f"{template.origin}: the chat template does not continue a tool call with its result; "
        "pass max_tool_rounds=0 and write the next prompt yourself"
    ) from problem


def _forms(said: Mapping[str, Any], results: Sequence[ToolResult]) -> list[list[Mapping[str, Any]]]:
    """The ways in which templates take results, the newest first."""
    messages = [result.message for result in results]
    legacy = [{"name": each["name"], "response": each["content"]} for each in messages]
    texts = [
        {**each, "content": each["content"] if isinstance(each["content"], str) else
         as_json(each["content"])}
        for each in messages
    ]  # fmt: skip
    return [[said, *messages], [{**said, "tool_responses": legacy}], [said, *texts]]
