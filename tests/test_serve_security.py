"""What a stranger can send to a server: each line of gl.help("security")."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import docs_blocks
from adapter_files import write_adapter
from gemloupe.serving.command import Options, is_loopback
from gemloupe.serving.limits import Access, Limits
from serving import Server, endless, running, wait_until

HI = [{"role": "user", "content": "Hi"}]
KEY = "a secret"
LIMITS = Limits(
    max_rows=1,
    max_queue=1,
    max_body=20_000,
    max_schema=1000,
    max_prompt=100,
    max_new_tokens=3000,
    max_capture=1 << 20,
    body_seconds=0.5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    (root / "inside").mkdir()
    write_adapter(root / "inside" / "good", docs_blocks.DEMO)
    write_adapter(root / "outside", docs_blocks.DEMO)
    (root / "inside" / "link").symlink_to(root / "outside")
    (root / "inside" / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    access = Access(hosts=("127.0.0.1",), adapter_folder=folder / "inside")
    with running("demo:edge", Options(limits=LIMITS, access=access)) as started:
        yield started


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def _refused(answer: httpx.Response, status: int, text: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert text in error["message"], error
    assert {"message", "type", "param", "code"} == set(error)


def test_addresses_of_this_machine_are_known() -> None:
    assert Options().host == "127.0.0.1"
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org")))


def test_a_key_guards_every_route_but_health() -> None:
    with running("demo:edge", Options(access=Access(api_key=KEY))) as server:
        with httpx.Client(base_url=server.url, timeout=30) as http:
            assert http.get("/health").status_code == 200
            for path in ("/v1/models", "/metrics", "/nothing", "/v1/adapters"):
                _refused(http.get(path), 401, "the API key is missing or wrong")
            _refused(http.post("/v1/chat/completions", json={"messages": HI}), 401, "API key")
            assert http.post("/api/chat").json() == {
                "error": "the API key is missing or wrong (Authorization: Bearer KEY)"
            }
            for wrong in ("Bearer", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"):
                header = {"Authorization": wrong.encode()}
                assert http.get("/v1/models", headers=header).status_code == 401
            right = {"Authorization": f"Bearer {KEY}"}
            assert http.get("/v1/models", headers=right).status_code == 200


def test_pages_of_other_origins_are_refused(http: httpx.Client) -> None:
    for origin in ("https://example.org", "null", "http://[", "https://localhost.example.org"):
        answer = http.get("/v1/models", headers={"Origin": origin})
        _refused(answer, 403, "may not call this server")
    assert http.get("/v1/models", headers={"Origin": "http://localhost:3000"}).status_code == 200


def test_an_origin_can_be_allowed() -> None:
    access = Access(origins=("https://example.org",))
    with running("demo:edge", Options(access=access)) as server:
        headers = {"Origin": "https://example.org"}
        answer = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        other = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://example.com"})
        assert other.status_code == 403


def test_a_name_that_was_pointed_here_is_refused(http: httpx.Client) -> None:
    for host in ("example.org", "example.org:11434", "[", ""):
        answer = http.get("/v1/models", headers={"Host": host})
        assert answer.status_code in (400, 403), answer.text
    assert http.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


def test_long_bodies_are_refused_before_they_are_read(server: Server, http: httpx.Client) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 30_000}]}
    _refused(http.post("/v1/chat/completions", json=long), 413, "longer than 20000 bytes")

    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"x" * 1000

    _refused(http.post("/v1/completions", content=chunks()), 413, "longer than 20000 bytes")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n"
        raw.sendall(head.encode() + b"\r\n")
        assert b" 413 " in raw.recv(100)


def test_slow_bodies_are_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        raw.sendall(head.encode())
        assert b" 408 " in raw.recv(100)


def test_a_body_that_is_cut_off_leaves_no_traceback(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = server.service.metrics
    before = metrics._requests["other", 400] + metrics._requests["/v1/completions", 400]
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        raw.sendall(head.encode())
    wait_until(
        lambda: metrics._requests["other", 400] + metrics._requests["/v1/completions", 400] > before
    )
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b'"x"', b"\xff", b"[" * 10_000, b'{"a": ' * 3000,
     b'{"a":' * 300 + b"1" + b"}" * 300, b'{"seed": NaN}',
     b'{"seed": ' + b"9" * 6000 + b"}"],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(http: httpx.Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"):
        answer = http.post(path, content=body)
        assert answer.status_code == 400 and "the body is" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"messages": 3}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [3]}, "messages[0] is 3; expected an object"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role is 'root'"),
        ({"messages": [{"role": "user"}]}, 'has no "content"'),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content is"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"temperature": -1}, "temperature is -1; expected 0 to 100"),
        ({"temperature": 1e999}, "the body is not JSON"),
        ({"top_p": 2}, "top_p is 2; expected 0 to 1"),
        ({"temperature": 10**400}, "expected 0 to 100"),
        ({"max_tokens": 10**400}, "max_tokens is 1000"),
        ({"seed": 2**70}, "seed is"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": True}, "max_tokens is True; expected a whole number"),
        ({"n": 9}, "n is 9; expected 1 to 8"),
        ({"stop": ["x"] * 17}, "stop must be at most 16 strings"),
        ({"stop": [{}]}, "stop must be at most 16 strings"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs is 21"),
        ({"tools": [{"name": str(i)} for i in range(513)]}, "513 tools"),
        ({"tools": [{"no": "name"}]}, "tools[0] is"),
        ({"tool_choice": "required"}, "tool_choice without tools"),
        ({"tools": [{"name": "a"}], "tool_choice": "b"}, "tool_choice is 'b'"),
        ({"response_format": {"type": "xml"}}, "response_format is"),
        ({"response_format": {"regex": "a" * 2000}}, "response_format has 2013 bytes"),
        ({"response_format": {"regex": "(a{1000}){1000}"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"thinking_mode": "perhaps"}, "thinking_mode is 'perhaps'"),
        ({"thinking_mode": "enabled", "think": False}, "turns thinking on and off"),
        ({"logit_cap": 0}, "logit_cap is 0; expected"),
        ({"capture": "layers.*.nothing"}, "nothing"),
        ({"capture": ["vision.soft_tokens"]}, "is of a tower; a server looks into the text model"),
        ({"edit": {"audio.mel": {"do": "zero"}}}, "edit: 'audio.mel' is of a tower"),
        ({"capture": "layers.*.resid_post", "max_tokens": 3000}, "captures and routing may take"),
        ({"edit": {"layers.0.resid_post": "zero"}}, "edit['layers.0.resid_post'] is 'zero'"),
        ({"edit": {"layers.0.resid_post": {"do": "sae", "folder": "/"}}}, "expected"),
        ({"edit": {"layers.0.resid_post": {"do": "zero", "fn": "x"}}}, "zero takes no 'fn'"),
        ({"edit": {"layers.0.resid_post": {"do": "set", "value": [1, 2]}}}, "layers.0.resid_post"),
        ({"max_token": 5}, "unknown field 'max_token'. Did you mean 'max_tokens'"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(http: httpx.Client, fields: dict[str, Any], text: str) -> None:
    body = json.dumps({"messages": HI, **fields})
    _refused(http.post("/v1/chat/completions", content=body), 400, text)


def test_long_prompts_are_refused_and_long_answers_cut(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": [2] * 101})
    _refused(answer, 400, "the prompt has 101 tokens; expected at most 100")
    answer = http.post("/v1/embeddings", json={"input": [2] * 101})
    _refused(answer, 400, "input[0] has 101 tokens")
    answer = http.post("/v1/completions", json={"prompt": [[2, 5]] * 9})
    _refused(answer, 400, "9 answers; expected at most 8")
    body = {"messages": HI, "max_tokens": 10**9, "temperature": 0}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    _refused(http.post("/v1/completions", json={"prompt": [2, 10**6]}), 400, "the id 1000000")


@pytest.mark.parametrize(
    "url",
    ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "https://example.org/x.png",
     "data:text/plain;base64,eA==", None, 3, {"path": "/etc/passwd"}],
)  # fmt: skip
def test_images_come_from_the_request_alone(
    http: httpx.Client, url: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = {"type": "image_url", "image_url": {"url": url}, "path": "/etc/passwd", "image": "/x"}
    body = {"messages": [{"role": "user", "content": [part]}]}
    answer = http.post("/v1/chat/completions", json=body)
    _refused(answer, 400, "This server reads no files and fetches no addresses")
    part = {"type": "video_url", "video_url": {"url": url}, "path": "/etc/passwd"}
    body = {"messages": [{"role": "user", "content": [part]}]}
    answer = http.post("/v1/chat/completions", json=body)
    _refused(answer, 400, "This server reads no files and fetches no addresses")
    for part in ({"type": "image", "path": "/etc/passwd"}, {"type": "file", "file": {}}):
        body = {"messages": [{"role": "user", "content": [part]}]}
        assert http.post("/v1/chat/completions", json=body).status_code == 400


def test_a_model_without_vision_says_so(http: httpx.Client) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"no image").decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 400
    many = {"messages": [{"role": "user", "content": [part] * 17}]}
    _refused(http.post("/v1/chat/completions", json=many), 400, "17 images; expected at most 16")


def test_videos_are_few_and_need_their_decoder(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(b"no video").decode()
    part = {"type": "video_url", "video_url": {"url": url}}

    def asked(count: int) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": [part] * count}]}
        return http.post("/v1/chat/completions", json=body)

    _refused(asked(3), 400, "3 videos; expected at most 2")
    assert asked(1).status_code == 400  # This model reads none.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _refused(asked(1), 400, "this server reads no videos; it needs PyAV")


def test_adapters_come_from_their_folder_alone(http: httpx.Client, folder: Path) -> None:
    def load(path: str) -> httpx.Response:
        body = {"lora_name": "mine", "lora_path": path}
        return http.post("/v1/load_lora_adapter", json=body)

    for path in ("../outside", str(folder / "outside"), "link", ".", "nothing", "x\0y", "a" * 9000):
        _refused(load(path), 403, "expected a folder in --adapter-dir")
    _refused(load("empty"), 400, "adapter")
    assert load("good").status_code == 200
    assert http.get("/v1/adapters").json()["data"] == ["mine"]
    _refused(load("good"), 400, "there is an adapter 'mine'")
    body = {"model": "demo:edge:mine", "messages": HI, "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    assert http.get("/v1/adapters").json()["data"] == []


def test_without_an_adapter_folder_nothing_is_loaded() -> None:
    with running() as server, httpx.Client(base_url=server.url) as http:
        body = {"lora_name": "x", "lora_path": "/"}
        _refused(http.post("/v1/load_lora_adapter", json=body), 403, "--adapter-dir")
        body = {"lora_name": "x"}
        _refused(http.post("/v1/unload_lora_adapter", json=body), 403, "--adapter-dir")


def test_a_full_queue_refuses_and_says_when_to_come_again(
    server: Server, http: httpx.Client
) -> None:
    model = server.model
    body = endless(model.tokenizer, model.config.text.vocab_size)
    body |= {"prompt": "The", "stream": True, "max_tokens": 2000}
    with http.stream("POST", "/v1/completions", json=body) as first:
        lines = first.iter_lines()
        next(lines)
        wait_until(lambda: server.scheduler.running == 1)
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(http.post, "/v1/completions", json={"prompt": "A", "max_tokens": 2})
            wait_until(lambda: server.scheduler.waiting == 1)
            answer = http.post("/v1/completions", json={"prompt": "B"})
            _refused(answer, 429, "1 requests are waiting already")
            assert int(answer.headers["retry-after"]) >= 1
            first.close()
            assert waits.result(20).status_code == 200
    wait_until(lambda: server.scheduler.running == 0)
    assert server.scheduler.kv_bytes == 0


def test_memory_for_keys_and_values_is_set_aside() -> None:
    limits = Limits(kv_bytes=400_000, max_new_tokens=8000)
    with running("demo:edge", Options(limits=limits)) as server:
        with httpx.Client(base_url=server.url, timeout=30) as http:
            answer = http.post("/v1/completions", json={"prompt": "The", "max_tokens": 8000})
            _refused(answer, 400, "for keys and values; this server has 390.62 KiB")
            answer = http.post("/v1/completions", json={"prompt": "The", "max_tokens": 4})
            assert answer.status_code == 200


def test_a_server_that_stops_says_so() -> None:
    with running() as server:
        server.scheduler.close()
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "The"})
        _refused(answer, 503, "the server is stopping")
        assert httpx.get(f"{server.url}/health").status_code == 503


def test_errors_of_our_own_show_nothing(
    server: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(server.model), "prepare", lambda *_, **__: (_ for _ in ()).throw(OSError("secret"))
    )
    answer = http.post("/v1/chat/completions", json={"messages": HI})
    _refused(answer, 500, "internal error")
    assert "secret" not in answer.text
    monkeypatch.undo()
    assert http.post("/v1/chat/completions", json={"messages": HI}).status_code == 200


def test_unknown_routes_and_methods_are_named(http: httpx.Client) -> None:
    _refused(http.get("/v1/nothing"), 404, "Not Found")
    _refused(http.get("/v1/completions"), 405, "Method Not Allowed")
    assert http.get("/docs").status_code == http.get("/openapi.json").status_code == 404


def test_warnings_can_not_break_headers(http: httpx.Client) -> None:
    body = {"messages": HI, "max_tokens": 1, "x\r\nSet-Cookie: a": 1, "é" * 2000: 2}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and "set-cookie" not in answer.headers
    assert "has no effect" in answer.headers["x-gemloupe-warning"]


def test_texts_that_no_context_holds_are_not_tokenised(
    server: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(server.model), "prepare", lambda *_, **__: pytest.fail("prepared"))
    text = "x" * 1601
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/chat/completions", {"messages": HI, "tools": [{"name": "a", "description": text}]}),
        ("/v1/embeddings", {"input": text}),
        ("/tokenize", {"prompt": text}),
    ):
        _refused(http.post(path, json=body), 400, "characters; expected at most 100 tokens")


def test_requests_at_once_are_bounded() -> None:
    limits = Limits(max_rows=1, max_queue=1, spare_requests=1, body_seconds=20)
    with running("demo:edge", Options(limits=limits)) as server:
        port = int(server.url.rpartition(":")[2])
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        for connection in slow:
            connection.sendall(head)

        def refused() -> bool:
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": 3})
            return answer.status_code == 429 and answer.headers["retry-after"] == "2"

        wait_until(refused)
        assert httpx.get(f"{server.url}/health").status_code == 200
        for connection in slow:
            connection.close()
        wait_until(lambda: not refused())


def test_paths_of_this_machine_are_in_no_answer(server: Server, http: httpx.Client) -> None:
    folder = str(server.model.checkpoint.folder)
    chat = [{"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}] * 2
    answers = [http.get(path) for path in ("/v1/models", "/api/tags", "/metrics", "/api/ps")]
    answers += [
        http.post("/api/show", json={"model": "x"}),
        http.post("/v1/chat/completions", json={"messages": chat}),
    ]
    assert all(folder not in answer.text for answer in answers)
    told = server.service.failure(ValueError(f"{folder}/chat_template.jinja: refused"))
    assert str(told) == "demo:edge/chat_template.jinja: refused"
