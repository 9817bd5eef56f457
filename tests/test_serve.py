"""`gemloupe serve` with the clients that people use: openai, ollama, httpx."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import ollama
import openai
import PIL.Image
import pytest
import soundfile

import docs_blocks
import gemloupe as gl
from adapter_files import write_adapter
from gemloupe import _core
from gemloupe.serving.command import Options, serve
from gemloupe.serving.limits import Access
from serving import Server, endless, running, wait_until
from tiny_drafters import make_drafter, save_drafter
from tiny_models import make_tiny, save_tiny, save_tiny_tokenizer

TAGS = (
    "gemma4", "gemma4:2b-e2b", "gemma4:4b-e4b", "gemma4:26b-a4b", "gemma4:26b-moe", "gemma4:31b",
)  # fmt: skip
SUM = [{"role": "user", "content": "What is 27 + 45?"}]
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Calculate.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "first", docs_blocks.DEMO)
    write_adapter(folder / "second", docs_blocks.DEMO, seed=1)
    adapters = {str(folder / "first"): 0.3, str(folder / "second"): 0.3}
    with running("demo:edge", Options(adapters=adapters)) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="ollama", max_retries=0)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def _array(entry: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(entry["data"])
    return np.frombuffer(data, entry["dtype"]).reshape(entry["shape"])


@pytest.fixture(scope="module")
def tagged() -> Iterator[openai.OpenAI]:
    with running("demo:edge", Options(aliases=dict.fromkeys(TAGS, "demo:edge"))) as started:
        yield openai.OpenAI(base_url=f"{started.url}/v1", api_key="ollama", max_retries=0)


@pytest.mark.parametrize("tag", TAGS)
def test_every_tag_of_the_articles_answers_without_a_warning(
    tagged: openai.OpenAI, tag: str
) -> None:
    raw = tagged.chat.completions.with_raw_response.create(model=tag, messages=SUM, temperature=0)
    assert "x-gemloupe-warning" not in raw.headers
    answer = raw.parse()
    assert answer.model == tag and "72" in answer.choices[0].message.content


def test_the_articles_thinking_requests_run_unchanged(tagged: openai.OpenAI) -> None:
    response = tagged.chat.completions.create(
        model="gemma4:31b",
        messages=[{"role": "user", "content": "Analyze this code for race conditions."}],
        extra_body={
            "thinking_mode": "enabled",
            "max_thinking_tokens": 1500,
            "logit_cap": 30.0,  # Prevents logit drift in long reasoning
        },
        max_tokens=40,
    )
    assert response.choices[0].finish_reason in ("stop", "length")
    response = tagged.chat.completions.create(
        model="gemma4:31b",
        messages=[
            {
                "role": "user",
                "content": "Given 100 academic papers in this folder, identify emerging research "
                "trends and map how they're connected.",
            }
        ],
        extra_body={"thinking_mode": "enabled", "max_thinking_tokens": 1500},
        max_tokens=40,
    )
    assert response.usage.prompt_tokens > 10


def test_the_articles_bare_tools_are_understood(tagged: openai.OpenAI) -> None:
    response = tagged.chat.completions.create(
        model="gemma4:26b-a4b",
        messages=[{"role": "user", "content": "Find and summarize all PDFs in this folder."}],
        tools=[
            {"name": "list_files", "description": "List files in directory"},
            {"name": "read_pdf", "description": "Extract text from PDF"},
            {"name": "summarize", "description": "Summarize text"},
        ],
        max_tokens=40,
    )
    assert response.choices[0].message.role == "assistant"


def test_the_articles_sampling_dict_caps_the_logits(tagged: openai.OpenAI) -> None:
    sampling_params = {"temperature": 1.0, "top_p": 0.95, "top_k": 64, "logit_cap": 30.0}

    def first(**body: Any) -> float:
        response = tagged.chat.completions.create(
            model="gemma4", messages=SUM, seed=3, max_tokens=1, logprobs=True, extra_body=body
        )
        return response.choices[0].logprobs.content[0].logprob

    assert first(sampling_params=sampling_params) == first(**sampling_params)
    capped = first(sampling_params={**sampling_params, "logit_cap": 2.0})
    assert capped != first(**sampling_params)


def test_another_name_is_answered_with_a_warning(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"model": "gpt-5", "messages": SUM})
    assert answer.status_code == 200
    warning = "there is no model 'gpt-5' here: 'demo:edge' answered"
    assert answer.headers["x-gemloupe-warning"] == warning
    assert answer.json()["warnings"] == [warning]


def test_a_server_of_two_models_knows_their_names_alone() -> None:
    with running("demo:edge", Options(aliases={"moe": "demo:moe"})) as server:
        with httpx.Client(base_url=server.url, timeout=30) as http:
            names = [each["id"] for each in http.get("/v1/models").json()["data"]]
            assert names == ["demo:edge", "demo:moe", "moe"]
            body = {"model": "moe", "messages": SUM, "routing": "experts", "max_tokens": 3}
            routing = http.post("/v1/chat/completions", json=body).json()["choices"][0]
            experts = _array(routing["gemloupe"]["routing"]["experts"])
            assert experts.ndim == 3 and experts.dtype == np.int32
            unknown = http.post("/v1/chat/completions", json={**body, "model": "gpt-5"})
            assert unknown.status_code == 404
            assert unknown.json()["error"]["code"] == "model_not_found"


def test_answers_are_those_of_the_model(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo:edge", messages=SUM, seed=7, temperature=0.9, n=2, logprobs=True, top_logprobs=2
    )
    out = server.model.generate(SUM, seed=7, temperature=0.9, logprobs=2, max_new_tokens=4096)
    assert len(answer.choices) == 2
    first = answer.choices[0]
    assert first.message.content == out.text
    assert [entry.logprob for entry in first.logprobs.content] == [p for p, _ in out.logprobs]
    assert all(len(entry.top_logprobs) == 2 for entry in first.logprobs.content)
    assert answer.usage.prompt_tokens == len(out.prompt)


def test_thoughts_come_apart_and_their_budget_holds(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo:edge",
        messages=SUM,
        temperature=0,
        extra_body={"enable_thinking": True, "max_thinking_tokens": 4},
    )
    out = server.model.generate(SUM, temperature=0, thinking=True, max_thinking_tokens=4)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == (out.text, out.reasoning)
    assert message.reasoning == out.reasoning and out.reasoning


def test_a_stream_joins_to_the_answer(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "demo:edge", "messages": SUM, "temperature": 0,
        "extra_body": {"thinking_mode": "enabled"},
    }  # fmt: skip
    whole = client.chat.completions.create(**request)
    stream = client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == whole.choices[0].message.reasoning_content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert last.choices == [] and last.usage == whole.usage


def test_stop_strings_and_lengths_end_answers(client: openai.OpenAI) -> None:
    stopped = client.chat.completions.create(model="x", messages=SUM, temperature=0, stop=["="])
    assert stopped.choices[0].finish_reason == "stop"
    assert "=" not in stopped.choices[0].message.content
    short = client.chat.completions.create(
        model="x", messages=SUM, temperature=0, max_completion_tokens=3
    )
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def test_tool_calls_and_their_results_go_round(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is 37 * 45?"}]
    request = {"model": "x", "messages": messages, "tools": [CALCULATOR], "temperature": 0}
    first = client.chat.completions.create(**request).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content is None
    call = first.message.tool_calls[0]
    assert call.function.name == "calculator" and json.loads(call.function.arguments)
    messages += [
        first.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "1665"},
    ]
    second = client.chat.completions.create(**request).choices[0]
    assert second.finish_reason == "stop" and "1665" in second.message.content
    streamed = client.chat.completions.create(
        model="x", messages=messages[:1], tools=[CALCULATOR], temperature=0, stream=True
    )
    calls = [c for chunk in streamed for c in chunk.choices[0].delta.tool_calls or ()]
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
        (0, "calculator", call.function.arguments)
    ]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
def test_a_call_can_be_required(client: openai.OpenAI, choice: Any, thinking: bool) -> None:
    clock = {"type": "function", "function": {"name": "clock", "description": "Tell the time."}}
    answer = client.chat.completions.create(
        model="x",
        messages=SUM,
        tools=[CALCULATOR, clock],
        tool_choice=choice,
        temperature=0,
        max_tokens=200,
        extra_body={"enable_thinking": thinking, "max_thinking_tokens": 30},
    )
    message = answer.choices[0].message
    names = [call.function.name for call in message.tool_calls or ()]
    broken = getattr(answer.choices[0], "gemloupe", {}).get("tool_errors", [])
    assert names or broken, "neither a call nor a broken one"
    if choice != "required":
        assert names == ["clock"] or "call:clock{" in broken[0]["text"]
    assert bool(getattr(message, "reasoning_content", "")) == thinking


def test_no_call_comes_where_tools_are_switched_off(client: openai.OpenAI) -> None:
    request = {"model": "x", "messages": SUM, "temperature": 0}
    off = client.chat.completions.create(**request, tools=[CALCULATOR], tool_choice="none")
    without = client.chat.completions.create(**request)
    assert off.choices[0].message == without.choices[0].message
    assert off.usage == without.usage


def test_answers_follow_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="x", messages=SUM, response_format=FORM, seed=2, max_tokens=60
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"sum"}


def test_a_mixed_crowd_gets_what_each_would_get_alone(
    server: Server, client: openai.OpenAI
) -> None:
    questions = [f"What is {a} + {b}?" for a, b in ((27, 45), (3, 9), (88, 11), (40, 2))]
    requests = []
    for number in range(16):
        asked: dict[str, Any] = {"temperature": 0, "max_tokens": 80}
        if number % 2:
            asked |= {"temperature": 1.0, "seed": number}
        if number % 4 == 1:
            asked["tools"] = [CALCULATOR]
        if number % 3 == 0:
            asked["response_format"] = FORM
        extra: dict[str, Any] = {}
        if number % 4 == 2:
            extra |= {"thinking_mode": "enabled", "max_thinking_tokens": 20}
        if number % 5 == 3:
            extra["adapter"] = ("first", "second")[number % 2]
        if number % 7 == 0:
            extra["logit_cap"] = 10.0
        messages = [{"role": "user", "content": questions[number % 4]}]
        requests.append(asked | {"model": "demo:edge", "messages": messages, "extra_body": extra})

    def ask(request: dict[str, Any]) -> tuple[str, str, list[tuple[str, str]], str]:
        text = reasoning = reason = ""
        calls = []
        for chunk in client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                calls += [
                    (c.function.name, c.function.arguments) for c in choice.delta.tool_calls or ()
                ]
                reason = choice.finish_reason or reason
        return text, reasoning, calls, reason

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, requests)) == alone
    assert any(reasoning for _, reasoning, _, _ in alone)
    assert server.scheduler.running == server.scheduler.waiting == server.scheduler.kv_bytes == 0


def test_adapters_are_chosen_by_name(server: Server, client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list().data]
    assert names == ["demo:edge", "demo:edge:first", "demo:edge:second"]

    def ask(model: str, **extra: Any) -> list[float]:
        answer = client.chat.completions.create(
            model=model, messages=SUM, max_tokens=2, temperature=0, logprobs=True, extra_body=extra
        )
        return [entry.logprob for entry in answer.choices[0].logprobs.content]

    plain = ask("demo:edge")
    assert ask("demo:edge:first") == ask("x", adapter="first") != plain
    assert ask("demo:edge:second") not in (plain, ask("demo:edge:first"))
    assert ask("demo:edge:first", adapter="base") == plain
    with pytest.raises(openai.NotFoundError, match="no adapter 'third'; there are first, second"):
        ask("x", adapter="third")
    with pytest.raises(openai.NotFoundError, match="has no adapter 'third'"):
        ask("demo:edge:third")


def test_captures_and_edits_are_the_models(server: Server, http: httpx.Client) -> None:
    point = "layers.2.resid_post"
    body = {"messages": SUM, "max_tokens": 3, "temperature": 0, "capture": [point]}
    answer = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    out = server.model.generate(SUM, max_new_tokens=3, temperature=0, capture=point)
    np.testing.assert_array_equal(
        _array(answer["gemloupe"]["captured"][point]), out.captured[point]
    )
    edit = {"layers.1.attn.z": {"do": "zero", "heads": [0]}, point: {"do": "scale", "factor": 0.5}}
    edited = http.post("/v1/chat/completions", json={**body, "edit": edit}).json()["choices"][0]
    mine = {"layers.1.attn.z": gl.edits.zero(heads=[0]), point: gl.edits.scale(0.5)}
    out = server.model.generate(SUM, max_new_tokens=3, temperature=0, capture=point, edit=mine)
    np.testing.assert_array_equal(
        _array(edited["gemloupe"]["captured"][point]), out.captured[point]
    )


def test_completions_echo_their_prompt_with_logprobs(server: Server, client: openai.OpenAI) -> None:
    ids = server.model.tokenizer.encode("The sun rises in the")
    answer = client.completions.create(
        model="x", prompt=ids, echo=True, logprobs=1, max_tokens=0, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    logits = server.model.run(ids, logits="all").logits.astype(np.float64)
    chosen = np.take_along_axis(logits[:-1], np.array(ids[1:])[:, None], axis=1)[:, 0]
    expected = chosen - np.log(np.exp(logits[:-1]).sum(axis=1))
    assert logprobs.token_logprobs[0] is None and len(logprobs.tokens) == len(ids)
    np.testing.assert_allclose(logprobs.token_logprobs[1:], expected, atol=1e-4)
    assert answer.usage.completion_tokens == 0
    text = client.completions.create(
        model="x", prompt="The sun", echo=True, max_tokens=4, temperature=0
    )
    out = server.model.generate("The sun", max_new_tokens=4, temperature=0)
    assert text.choices[0].text == "The sun" + out.text
    stream = client.completions.create(
        model="x", prompt="The sun", echo=True, max_tokens=4, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == text.choices[0].text


def test_several_prompts_give_answers_in_order(server: Server, client: openai.OpenAI) -> None:
    prompts = ["The sun", "The cat"]
    answer = client.completions.create(model="x", prompt=prompts, n=2, max_tokens=3, temperature=0)
    texts = [choice.text for choice in sorted(answer.choices, key=lambda each: each.index)]
    alone = [server.model.generate(p, max_new_tokens=3, temperature=0).text for p in prompts]
    assert texts == [alone[0], alone[0], alone[1], alone[1]]


def test_embeddings_are_means_of_a_layer(server: Server, client: openai.OpenAI) -> None:
    answer = client.embeddings.create(
        model="x", input=["The sun", "a cat"], extra_body={"layer": 3}
    )
    for entry, text in zip(answer.data, ["The sun", "a cat"], strict=True):
        run = server.model.run(text, capture="layers.3.resid_post", logits=None)
        mean = run["layers.3.resid_post"].mean(axis=0)
        np.testing.assert_allclose(entry.embedding, mean, rtol=1e-4, atol=1e-4)
    unit = client.embeddings.create(model="x", input="hi", extra_body={"normalize": True})
    assert np.linalg.norm(unit.data[0].embedding) == pytest.approx(1, abs=1e-5)


def test_text_becomes_tokens_and_text_again(server: Server, http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "The sun", "with_pieces": True}).json()
    assert answer["tokens"] == server.model.tokenizer.encode("The sun")
    assert len(answer["pieces"]) == answer["count"] == len(answer["tokens"])
    back = http.post("/detokenize", json={"tokens": answer["tokens"][1:]}).json()
    assert back["prompt"] == "The sun"
    chat = http.post("/tokenize", json={"messages": SUM}).json()
    assert chat["tokens"] == server.model.prepare(SUM).ids.tolist()


def test_health_and_metrics_can_be_read(server: Server, http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json={"messages": SUM, "max_tokens": 2})
    assert http.get("/health").json() == {"status": "ok"}
    lines = http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    route = 'gemloupe_requests_total{route="/v1/chat/completions",status="200"}'
    assert int(values[route]) >= 1
    assert int(values['gemloupe_generated_tokens_total{model="demo:edge"}']) >= 2
    assert values['gemloupe_rows_running{model="demo:edge"}'] == "0"


def test_a_client_that_goes_away_ends_its_row(server: Server) -> None:
    model = server.model
    body = endless(model.tokenizer, model.config.text.vocab_size)
    body |= {"prompt": "The", "max_tokens": 4000, "stream": True}
    before = server.scheduler.counts.cancelled
    with httpx.Client(base_url=server.url, timeout=30) as http:
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            wait_until(lambda: server.scheduler.running == 1)
    wait_until(lambda: server.scheduler.counts.cancelled == before + 1)
    content = json.dumps({**body, "stream": False}).encode()
    where = httpx.URL(server.url)
    with socket.create_connection((where.host, where.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc.decode()}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        wait_until(lambda: server.scheduler.running == 1)
    wait_until(lambda: server.scheduler.counts.cancelled == before + 2)
    wait_until(lambda: server.scheduler.running == 0)


def test_a_row_that_fails_takes_no_other_with_it(server: Server, client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        form = {"regex": "a{1000000}"} if number % 4 == 0 else {"type": "text"}
        try:
            answer = client.chat.completions.create(
                model="x", messages=SUM, temperature=0, max_tokens=40, response_format=form
            )
        except openai.BadRequestError as error:
            return str(error)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert all("response_format" in answer for answer in answers[::4])
    assert {answer for i, answer in enumerate(answers) if i % 4} == {ask(1)}
    with pytest.raises(openai.APIError, match="response_format"):
        list(
            client.chat.completions.create(
                model="x", messages=SUM, response_format={"regex": "a{1000000}"}, stream=True
            )
        )


def test_released_rows_give_back_their_numbers(server: Server) -> None:
    session = server.model.new_session()

    def submit() -> int:
        request = _core.RowRequest()
        request.ids, request.max_new_tokens = [2, 5], 2
        return session.submit(request)

    assert [submit(), submit()] == [0, 1]
    session.release(0)
    assert session.active == 1
    with pytest.raises(ValueError, match="row 0 was released"):
        session.cancel(0)
    assert submit() == 0 and session.active == 2
    assert session.step()[0].row == 1, "prompts are read in the order in which they came"
    while session.active:
        session.step()


def test_ollamas_client_works(server: Server) -> None:
    client = ollama.Client(host=server.url)
    out = server.model.generate(SUM, temperature=0, thinking=True)
    options = {"temperature": 0, "num_ctx": 4096}
    answer = client.chat(model="gemma4", messages=SUM, options=options, think=True)
    assert (answer.message.content, answer.message.thinking) == (out.text, out.reasoning)
    assert answer.done_reason == "stop" and answer.eval_count == len(out.ids)
    parts = list(client.chat(model="gemma4", messages=SUM, options=options, stream=True))
    plain = server.model.generate(SUM, temperature=0).text
    assert "".join(part.message.content for part in parts) == plain and parts[-1].done
    said = client.generate(model="gemma4", prompt="What is 27 + 45?", options=options)
    assert said.response == plain
    raw = client.generate(
        model="gemma4", prompt="The sun", raw=True, options={**options, "num_predict": 4}
    )
    assert raw.response == server.model.generate("The sun", max_new_tokens=4, temperature=0).text
    form = client.chat(model="gemma4", messages=SUM, options={"seed": 1}, format=SCHEMA)
    assert set(json.loads(form.message.content)) == {"sum"}
    asked = [{"role": "user", "content": "What is 37 * 45?"}]
    call = client.chat(model="gemma4", messages=asked, tools=[CALCULATOR], options=options)
    assert call.message.tool_calls[0].function.name == "calculator"
    assert client.list().models[0].model == "demo:edge"
    assert "tools" in client.show("gemma4").capabilities
    with pytest.raises(ollama.ResponseError, match="options.temperature|temperature is"):
        client.chat(model="gemma4", messages=SUM, options={"temperature": -1})


def test_ctrl_c_lets_running_requests_end() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "gemloupe", "serve", "demo:edge", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_up, 60)
        model = gl.load("demo:edge")
        body = endless(model.tokenizer, model.config.text.vocab_size)
        body |= {"prompt": "The", "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(20) in (0, 130)
    finally:
        process.kill()
        process.communicate()


def test_listening_to_others_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemloupe.serving import command

    monkeypatch.setattr(command, "_uvicorn", lambda: (dict, lambda config: pytest.fail("ran")))
    monkeypatch.setattr(command, "_check_address", lambda options: None)
    monkeypatch.setattr(command, "make_service", lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    for host, others in (("0.0.0.0", True), ("::", True), ("127.0.0.1", False), ("::1", False)):
        for access in (Access(), Access(api_key="x"), Access(anybody=True)):
            refused = others and access == Access()
            error = pytest.raises(ValueError, match="without a key") if refused else None
            with error or pytest.raises(KeyError, match="stop"):
                command.serve("demo:edge", Options(host=host, access=access))


def test_options_that_can_not_work_are_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, error, text in (
            (Options(port=port), OSError, f"can't listen on '127.0.0.1', port {port}: Address alr"),
            (Options(host="256.1.1.1", access=Access(anybody=True)), OSError, "on '256.1.1.1'"),
            (Options(port=65536), ValueError, "--port is 65536; expected 1 to 65535"),
            (Options(access=Access(api_key="schlüssel")), ValueError, "printable ASCII"),
            (Options(access=Access(api_key="key\n")), ValueError, "printable ASCII"),
            (Options(access=Access(adapter_folder=tmp_path / "no")), ValueError, "--adapter-dir"),
        ):
            with pytest.raises(error, match=re.escape(text)):
                serve("no model", options)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemloupe.serving import command

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r'pip install "gemloupe\[serve\]"'):
        command.make_service("demo:edge", Options())


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("towers")
    save_tiny(make_tiny("e2b", towers="tiny", media_ids=True), folder)
    save_tiny_tokenizer(folder)
    with running(str(folder)) as started:
        yield started


def _video(picture: np.ndarray) -> str:
    """Two frames in base64."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=1)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "bgr0"
        for frame in (picture, picture[::-1]):
            made = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(made))
        container.mux(stream.encode())
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("adapter", [None, "towers"])
def test_images_sounds_and_videos_are_read_from_the_request(
    seeing: Server, tmp_path: Path, adapter: str | None
) -> None:
    if adapter:  # They are encoded under it, too.
        ends = ("q_proj.linear", "embedding_projection")
        seeing.model.load_adapter(
            write_adapter(tmp_path / adapter, seeing.model.checkpoint.folder, end=ends)
        )
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    png, wav = io.BytesIO(), io.BytesIO()
    PIL.Image.fromarray(picture).save(png, "PNG")
    soundfile.write(wav, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000, format="WAV")
    image, sound = (base64.b64encode(each.getvalue()).decode() for each in (png, wav))
    text = {"type": "text", "text": "hi"}
    for theirs, mine in (
        (
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{image}", "detail": "low"},
            },
            {"type": "image", "image": png.getvalue(), "max_soft_tokens": 70},
        ),
        (
            {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
            {"type": "audio", "audio": wav.getvalue()},
        ),
        (
            {
                "type": "video_url",
                "video_url": {"url": f"data:video/matroska;base64,{_video(picture)}"},
            },
            {"type": "video", "video": base64.b64decode(_video(picture))},
        ),
    ):
        client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="x", max_retries=0)
        chat = [{"role": "user", "content": [theirs, text]}]
        answer = client.chat.completions.create(
            model="x", messages=chat, max_tokens=3, temperature=0, logprobs=True,
            extra_body={"adapter": adapter} if adapter else {},
        )  # fmt: skip
        out = seeing.model.generate(
            [{"role": "user", "content": [mine, text]}],
            max_new_tokens=3, temperature=0, logprobs=1, adapter=adapter,
        )  # fmt: skip
        got = [entry.logprob for entry in answer.choices[0].logprobs.content]
        assert got == [logprob for logprob, _ in out.logprobs]
        assert answer.usage.prompt_tokens == len(out.prompt) > 5
    chat = [{"role": "user", "content": "hi", "images": [png.getvalue()]}]
    with pytest.raises(ollama.ResponseError, match="an image of 48 rows of 48 patches"):
        ollama.Client(host=seeing.url).chat(model="x", messages=chat)  # Too fine for this tower.


def test_a_drafter_changes_no_answer(seeing: Server, tmp_path: Path) -> None:
    folder = str(seeing.model.checkpoint.folder)
    drafter = str(save_drafter(make_drafter("e2b"), tmp_path / "drafter"))
    bodies = [{"prompt": [2, 5 + i], "max_tokens": 12, "temperature": i % 2, "seed": i}
              for i in range(6)]  # fmt: skip

    def ask(url: str) -> list[str]:
        with httpx.Client(base_url=url, timeout=30) as http, ThreadPoolExecutor(3) as pool:
            answers = pool.map(lambda body: http.post("/v1/completions", json=body), bodies)
            return [answer.json()["choices"][0]["text"] for answer in answers]

    with running(folder, Options(drafter=drafter)) as drafting:
        assert ask(drafting.url) == ask(seeing.url)


@pytest.mark.filterwarnings("ignore:the text from")
def test_speech_is_transcribed(seeing: Server) -> None:
    wav = io.BytesIO()
    soundfile.write(wav, np.random.default_rng(0).normal(0, 0.1, 8_000), 16_000, format="WAV")
    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="x", max_retries=0)
    mine = gl.transcribe(seeing.model, wav.getvalue(), "English")
    said = client.audio.transcriptions.create(
        model="x", file=("a.wav", wav.getvalue()), language="en"
    )
    assert said.text == mine.text
    whole = client.audio.transcriptions.create(
        model="x", file=("a.wav", wav.getvalue()), language="en", response_format="verbose_json"
    )
    assert whole.duration == pytest.approx(0.5) and whole.segments[0].text == mine.text
    for data, text in ((b"no sound", "can't read this"), (b"", "audio|empty|file")):
        with pytest.raises(openai.BadRequestError, match=text):
            client.audio.transcriptions.create(model="x", file=("a.wav", data))
    answer = httpx.post(f"{seeing.url}/v1/audio/transcriptions", content=b"x")
    assert answer.status_code == 400 and "file is missing" in answer.json()["error"]["message"]
