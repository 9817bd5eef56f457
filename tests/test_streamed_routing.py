"""`routing: "stream"`: the experts of every token, while the answer comes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import gemloupe as gl
from gemloupe.generation import Generation, make_rows
from serving import Server, running
from tiny_drafters import make_drafter, save_drafter
from tiny_models import random_ids

CHAT = [{"role": "user", "content": "What is 27 + 45?"}]
BODY = {"messages": CHAT, "temperature": 0.8, "seed": 3, "stream": True, "routing": "stream"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("demo:moe") as started:
        yield started


def _chunks(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = httpx.post(server.url + path, json=body, timeout=30)
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def _joined(chunks: list[dict[str, Any]]) -> tuple[np.ndarray, list[int]]:
    """Experts [L, T, k] and positions [T] of all chunks."""
    experts, positions = [], []
    for chunk in chunks:
        for choice in chunk["choices"]:
            if routing := choice.get("gemloupe", {}).get("routing"):
                entry = routing["experts"]
                assert entry["dtype"] == "uint8"
                array = np.frombuffer(base64.b64decode(entry["data"]), np.uint8)
                experts.append(array.reshape(entry["shape"]))
                positions += routing["positions"]
    return np.concatenate(experts, axis=1), positions


def test_streamed_experts_are_those_of_the_trace(server: Server) -> None:
    chunks = _chunks(server, "/v1/chat/completions", BODY)
    experts, positions = _joined(chunks)
    out = server.model.generate(CHAT, temperature=0.8, seed=3, max_new_tokens=4096)
    np.testing.assert_array_equal(experts, out.routing.experts)
    assert positions == out.routing.positions.tolist()
    with_routing = [c for c in chunks if any("gemloupe" in each for each in c["choices"])]
    assert len(with_routing) == len(out.ids)  # The prompt's come with the first token.
    assert "routing" not in chunks[-1].get("gemloupe", {})


def test_completions_stream_experts_too(server: Server) -> None:
    body = {"prompt": "The sun", "stream": True, "routing": "stream", "temperature": 0}
    experts, _ = _joined(_chunks(server, "/v1/completions", body))
    out = server.model.generate("The sun", temperature=0, max_new_tokens=16)
    np.testing.assert_array_equal(experts, out.routing.experts)


def test_routing_is_not_streamed_without_a_stream(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**BODY, "stream": False})
    assert answer.status_code == 400
    assert 'routing is "stream" without stream' in answer.json()["error"]["message"]


def test_a_trace_is_whole_although_its_experts_were_handed_out() -> None:
    model = gl.load("demo:moe")
    arguments = {"max_new_tokens": 20, "seed": 1, "routing": "full"}
    rows = make_rows(model, CHAT, {**arguments, "capture": "layers.2.router.experts"})
    rows[0].streams_experts = True
    generation = Generation(model, rows)
    pieces = []
    while not generation.done:
        pieces += generation.step()
    trace, plain = generation.outputs()[0].routing, model.generate(CHAT, **arguments).routing
    handed_out = np.concatenate([piece.experts.experts for piece in pieces], axis=1)
    np.testing.assert_array_equal(handed_out, plain.experts)
    for name in ("experts", "weights", "probs", "positions"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(plain, name))
    captured = generation.outputs()[0].captured["layers.2.router.experts"]
    np.testing.assert_array_equal(captured, plain.experts[2])


def test_wrong_guesses_of_a_drafter_are_handed_out_to_nobody(
    tmp_path: Path, tiny: Callable
) -> None:
    model = gl.load(tiny("26b")[1])
    drafter = model.load_drafter(save_drafter(make_drafter("26b"), tmp_path / "drafter"))
    arguments = {"max_new_tokens": 60, "top_k": 2, "temperature": 2.0, "seed": 1}
    rows = make_rows(model, random_ids(13), {**arguments, "drafter": drafter})
    rows[0].streams_experts = True
    generation = Generation(model, rows, stream=False)
    routed = []
    while not generation.done:
        routed += [piece.experts for piece in generation.step() if piece.experts]
    drafts = generation.outputs()[0].drafts
    assert drafts.drafted > drafts.accepted
    plain = model.generate(random_ids(13), **arguments).routing
    np.testing.assert_array_equal(
        np.concatenate([r.experts for r in routed], axis=1), plain.experts
    )
    positions = np.concatenate([r.positions for r in routed])
    np.testing.assert_array_equal(positions, plain.positions)
    np.testing.assert_array_equal(generation.outputs()[0].routing.experts, plain.experts)


def test_a_dense_model_has_no_experts_to_stream() -> None:
    with running("demo:edge") as server:
        chunks = _chunks(server, "/v1/chat/completions", BODY)
        assert not any("gemloupe" in choice for chunk in chunks for choice in chunk["choices"])
