"""What other libraries, and strangers with curl, ask of a server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import langchain_openai
import numpy as np
import ollama
import openai
import pydantic
import pytest
import soundfile

import docs_blocks
from adapter_files import write_adapter
from gemloupe.serving.command import Options
from gemloupe.serving.limits import Access
from serving import Server, running

SUM = "What is 27 + 45?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "one", docs_blocks.DEMO)
    with running("demo:edge", Options(access=Access(adapter_folder=folder))) as started:
        yield started


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture
def langchain(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a ChatOpenAI that talks to the server alone."""
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")

    def make(**more: Any) -> langchain_openai.ChatOpenAI:
        return langchain_openai.ChatOpenAI(
            model="gemma4", base_url=f"{server.url}/v1", api_key="x", temperature=0,
            max_retries=0, **more,
        )  # fmt: skip

    return make


class Sum(pydantic.BaseModel):
    """The result of an addition."""

    sum: int


def calculator(expression: str) -> str:
    """Calculate.

    Args:
        expression: For example 2+3.
    """
    return expression


def test_langchain_invokes_and_streams(server: Server, langchain: Any) -> None:
    out = server.model.chat(SUM, temperature=0)
    llm = langchain(stream_usage=True)
    said = llm.invoke(SUM)
    assert said.content == out.text
    assert said.usage_metadata["input_tokens"] == len(out.prompt)
    assert said.usage_metadata["output_tokens"] == len(out.ids)
    chunks = list(llm.stream([("user", SUM)]))
    assert "".join(chunk.content for chunk in chunks) == out.text and len(chunks) > 3
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks
               if chunk.usage_metadata) == len(out.ids)  # fmt: skip
    batch = llm.batch([SUM, "What is 3 + 9?"])
    assert batch[0].content == out.text and "12" in batch[1].content
    thinking = langchain(extra_body={"enable_thinking": True, "max_thinking_tokens": 4})
    expected = server.model.chat(SUM, temperature=0, thinking=True, max_thinking_tokens=4)
    assert thinking.invoke(SUM).content == expected.text


def test_langchain_binds_tools_and_gives_results_back(langchain: Any) -> None:
    llm = langchain().bind_tools([calculator])
    asked = [("user", "What is 37 * 45?")]
    first = llm.invoke(asked)
    (call,) = first.tool_calls
    assert call["name"] == "calculator" and set(call["args"]) == {"expression"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "1665"}
    assert "1665" in llm.invoke([*asked, first, result]).content
    streamed = None
    for chunk in llm.stream(asked):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["args"] == call["args"]
    forced = langchain().bind_tools([calculator], tool_choice="calculator").invoke(SUM)
    assert [each["name"] for each in forced.tool_calls + forced.invalid_tool_calls] == [
        "calculator"
    ]


def test_langchain_gets_structured_output(langchain: Any) -> None:
    llm = langchain(max_tokens=80)
    assert isinstance(llm.with_structured_output(Sum, method="json_schema").invoke(SUM), Sum)
    # The demo model calls what it must, with arguments of a tool that it knows.
    calling = llm.with_structured_output(Sum, method="function_calling", include_raw=True)
    assert [call["name"] for call in calling.invoke(SUM)["raw"].tool_calls] == ["Sum"]


def test_an_adapters_own_name_is_a_models_name(server: Server, http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": SUM}], "max_tokens": 2, "temperature": 0,
            "logprobs": True}  # fmt: skip

    def ask(model: str) -> tuple[Any, bool]:
        answer = http.post("/v1/chat/completions", json={**body, "model": model})
        entries = answer.json()["choices"][0]["logprobs"]["content"]
        return [entry["logprob"] for entry in entries], "x-gemloupe-warning" in answer.headers

    load = {"lora_name": "mine", "lora_path": "one"}
    assert http.post("/v1/load_lora_adapter", json=load).json()["status"] == "loaded"
    mine, warned = ask("mine")
    assert not warned and mine == ask("demo:edge:mine")[0] != ask("demo:edge")[0]
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    assert ask("mine") == (ask("demo:edge")[0], True)
    again = http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
    assert again.status_code == 404


@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("prompt", ["The sun", [2, 5, 9]])
def test_streamed_completions_have_the_log_probabilities_of_the_whole(
    server: Server, prompt: Any, max_tokens: int
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    asked: dict[str, Any] = {
        "model": "x", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "echo": True,
        "logprobs": 2,
    }  # fmt: skip
    whole = client.completions.create(**asked).choices[0]
    parts = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [each for part in parts if part.logprobs for each in getattr(part.logprobs, name)]
        assert joined == getattr(whole.logprobs, name), name


def test_ollamas_routes_answer_curl(http: httpx.Client) -> None:
    chat = {"model": "gemma4", "messages": [{"role": "user", "content": SUM}],
            "options": {"temperature": 0}}  # fmt: skip
    said = http.post("/api/chat", json={**chat, "stream": False}).json()
    assert "72" in said["message"]["content"] and said["done_reason"] == "stop"
    lines = http.post("/api/chat", json=chat).text.splitlines()
    parts = [json.loads(line) for line in lines]
    assert "".join(part["message"]["content"] for part in parts) == said["message"]["content"]
    assert [part["done"] for part in parts].count(True) == 1 and parts[-1]["eval_count"] > 3
    text = http.post("/api/generate", json={"prompt": SUM, "stream": False, "options":
                                            {"temperature": 0}}).json()  # fmt: skip
    assert text["response"] == said["message"]["content"]
    assert http.post("/api/generate", json={"model": "x"}).json()["done_reason"] == "load"
    assert http.get("/api/tags").json()["models"][0]["name"] == "demo:edge"
    shown = http.post("/api/show", json={"model": "demo:edge"}).json()
    assert shown["model_info"]["gemma4.context_length"] == 8192
    assert http.get("/api/version").json()["version"]
    assert http.get("/").text == "gemloupe is running"
    assert "error" in http.post("/api/pull", json={"model": "x"}).json()


def test_what_is_not_known_is_said_in_a_header(http: httpx.Client) -> None:
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": SUM}], "max_tokens": 1}
    answer = http.post("/v1/chat/completions", json={**body, "foo": 1, "user": "me"})
    told = answer.headers["x-gemloupe-warning"]
    assert "no model 'gpt-4'" in told and "'foo' has no effect" in told
    stream = http.post("/v1/chat/completions", json={**body, "foo": 1, "stream": True})
    assert "'foo' has no effect" in stream.headers["x-gemloupe-warning"]
    for path in ("/v1/completions", "/v1/embeddings", "/tokenize"):
        key = "input" if path.endswith("embeddings") else "prompt"
        answer = http.post(path, json={"model": "gpt-4", key: "hi", "foo": 1})
        assert answer.status_code == 200 and "foo" in answer.headers["x-gemloupe-warning"], path


def test_what_a_model_without_ears_hears_is_an_error(http: httpx.Client) -> None:
    wav = io.BytesIO()
    soundfile.write(wav, np.zeros(800), 16_000, format="WAV")
    files = {"file": ("a.wav", wav.getvalue())}
    answer = http.post("/v1/audio/transcriptions", files=files, data={"model": "whisper-1"})
    assert answer.status_code == 400 and "no audio part" in answer.json()["error"]["message"]
    answer = http.post("/v1/audio/transcriptions", files=files, data={"stream": "true"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream"
    answer = http.post("/v1/audio/transcriptions", files=files, data={"response_format": "srt"})
    assert answer.status_code == 400 and "verbose_json" in answer.json()["error"]["message"]


def test_readme_and_its_page_show_requests_that_work(http: httpx.Client) -> None:
    docs = docs_blocks.DEMO.parents[1] / "docs"
    pages = [Path(__file__).parents[1] / "README.md", docs / "serve.md"]
    for page in pages:
        text = page.read_text()
        begin = text.index("curl http://127.0.0.1:11434")
        line = text[begin : text.index("\n", begin)]
        address, body = line.split(" -d ")
        path = address.removeprefix("curl http://127.0.0.1:11434")
        answer = http.post(path, content=body.strip("'")).json()
        assert "72" in answer["choices"][0]["message"]["content"]


# What the articles show, but for the port: that is the server's default.
ARTICLE = """
client = openai.OpenAI(base_url="http://localhost:11434/v1", api_key="ollama")
response = client.chat.completions.create(
    model="gemma4:31b",
    messages=[{"role": "user", "content": "Analyze this code for race conditions."}],
    extra_body={
        "thinking_mode": "enabled",
        "max_thinking_tokens": 1500,
        "logit_cap": 30.0 # Prevents logit drift in long reasoning
    }
)
print(response.choices[0].message.content)
"""


def test_the_articles_snippet_runs_to_the_letter(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    port = server.url.rpartition(":")[2]
    assert Options().port == 11434
    exec(ARTICLE.replace("11434", port), {"openai": openai})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("tag", ["gemma4", "gemma4:2b-e2b", "gemma4:4b-e4b", "gemma4:26b-moe"])
def test_ollama_run_of_the_articles_finds_every_tag(server: Server, tag: str) -> None:
    """What `ollama run TAG` asks for: the model, then a chat."""
    client = ollama.Client(host=server.url)
    assert "completion" in client.show(tag).capabilities
    said = client.chat(model=tag, messages=[{"role": "user", "content": SUM}],
                       options={"temperature": 0})  # fmt: skip
    assert said.model == tag and "72" in said.message.content
