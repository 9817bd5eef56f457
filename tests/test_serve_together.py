"""Everything at once: thoughts, tools, forms, adapters and streams of eight clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

import docs_blocks
from adapter_files import write_adapter
from gemloupe.serving.command import Options
from serving import Server, running

CLIENTS = 8
ADAPTERS = ("first", "second", "base")
FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "sum",
        "schema": {
            "type": "object",
            "properties": {"sum": {"type": "integer"}, "sure": {"type": "boolean"}},
            "required": ["sum", "sure"],
            "additionalProperties": False,
        },
    },
}
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Calculate.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@dataclass
class Reply:
    """What a client saw of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Calls that can't be read, as they were written."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = ""
    chunks: int = 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(ADAPTERS[:2]):
        write_adapter(folder / name, docs_blocks.DEMO, seed=seed)
    adapters = {str(folder / name): 0.2 for name in ADAPTERS[:2]}
    with running("demo:edge", Options(adapters=adapters)) as started:
        yield started


def _asked(client: int, turn: int) -> dict[str, Any]:
    """A request with thinking, tools and a form, under an adapter or the base; half are greedy."""
    number = CLIENTS * turn + client
    a, b = 11 + 7 * client, 20 + 9 * turn
    text = f"What is {a} + {b}?" if number % 3 else f"What is {a} * {b}?"
    sampling = {"temperature": 0} if number % 2 else {"temperature": 0.9, "seed": number}
    return {
        "model": "demo:edge",
        "messages": [{"role": "user", "content": text}],
        "tools": [CALCULATOR],
        "tool_choice": ("auto", "none", "auto", "none", "required")[number % 5],
        "response_format": FORM,
        "max_tokens": 90,
        "logprobs": True,
        "extra_body": {
            "thinking_mode": "enabled",
            "max_thinking_tokens": 12 + 6 * (number % 4),
            "adapter": ADAPTERS[number % 3],
        },
        **sampling,
    }


def _answered(client: openai.OpenAI, request: dict[str, Any]) -> Reply:
    reply = Reply()
    for chunk in client.chat.completions.create(**request, stream=True):
        reply.chunks += 1
        added = (chunk.model_extra or {}).get("gemloupe", {})
        reply.broken += [problem["text"] for problem in added.get("tool_errors", ())]
        for choice in chunk.choices:
            delta = choice.delta
            reply.text += delta.content or ""
            reply.reasoning += getattr(delta, "reasoning_content", None) or ""
            reply.calls += [(c.function.name, c.function.arguments) for c in delta.tool_calls or ()]
            for entry in choice.logprobs.content if choice.logprobs else ():
                reply.ids.append(entry.model_extra["id"])
                reply.logprobs.append(entry.logprob)
            reply.reason = choice.finish_reason or reply.reason
    return reply


def _talk(server: Server, client: int, turns: int = 3) -> list[Reply]:
    """A client's conversation: a call is answered, and the next request goes on with it."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as api:
        replies = []
        for turn in range(turns):
            request = _asked(client, turn)
            replies.append(_answered(api, request))
            if not replies[-1].calls:
                continue
            name, arguments = replies[-1].calls[0]
            function = {"name": name, "arguments": arguments}
            call = {"id": "call_1", "type": "function", "function": function}
            request["messages"] += [
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "72"},
            ]
            replies.append(_answered(api, {**request, "tool_choice": "auto"}))
        return replies


def test_eight_clients_at_once_get_what_each_gets_alone(server: Server) -> None:
    alone = [_talk(server, client) for client in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(lambda client: _talk(server, client), range(CLIENTS)))
    for client, (mine, theirs) in enumerate(zip(together, alone, strict=True)):
        assert mine == theirs, f"client {client}"
    replies = [reply for talk in alone for reply in talk]
    assert sum(bool(reply.reasoning) for reply in replies) > len(replies) // 2
    assert sum(bool(reply.calls) for reply in replies) >= 3
    answers = [reply for reply in replies if reply.reason == "stop"]
    forms = [reply.text for reply in answers if not reply.broken]
    assert len(forms) >= 3, "too few follow the form for this test to mean much"
    assert all(set(json.loads(text)) == {"sum", "sure"} for text in forms)
    assert all(each in reply.text for reply in answers for each in reply.broken), "a call is lost"
    assert all(reply.chunks > 1 and len(reply.ids) == len(reply.logprobs) for reply in replies)
    counts = server.scheduler
    assert counts.running == counts.waiting == counts.kv_bytes == 0


def test_its_replies_are_those_of_the_model_in_process(server: Server) -> None:
    """Not only the same whenever they are asked for, but generate's own, token for token."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as api:
        requests = [_asked(client, 0) for client in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            replies = list(pool.map(lambda request: _answered(api, request), requests))
    for request, reply in zip(requests, replies, strict=True):
        extra = request["extra_body"]
        out = server.model.generate(
            request["messages"],
            thinking=True,
            max_thinking_tokens=extra["max_thinking_tokens"],
            tools=request["tools"],
            tool_choice=request["tool_choice"],
            response_format=FORM,
            adapter={} if extra["adapter"] == "base" else extra["adapter"],
            temperature=request["temperature"],
            seed=request.get("seed"),
            max_new_tokens=request["max_tokens"],
            logprobs=1,
        )
        assert (reply.ids, reply.text, reply.reasoning) == (
            out.ids.tolist(),
            out.text,
            out.reasoning,
        )
        assert reply.logprobs == [logprob for logprob, _ in out.logprobs]
        assert [name for name, _ in reply.calls] == [
            call["function"]["name"] for call in out.tool_calls
        ]
