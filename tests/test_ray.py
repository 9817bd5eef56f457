"""Datasets and a server on a local Ray cluster of two workers, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemloupe as gl
from gemloupe.integrations.ray import Generator
from serving import endless, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
GREEDY = {"temperature": 0, "max_new_tokens": 12}
POINT = "layers.3.resid_post"


@pytest.fixture(scope="module")
def model() -> gl.Model:
    return gl.load("demo:edge", threads=1)


def _prompts(count: int) -> list[dict[str, Any]]:
    return [{"id": n, "prompt": f"What is {n} + {7 * n}?"} for n in range(count)]


def _object_column(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = values
    return column


def test_a_batch_of_rows_gives_what_generate_gives(model: gl.Model) -> None:
    generator = Generator("demo:edge", load={"threads": 1}, chat=True, capture=POINT, **GREEDY)
    prompts = [row["prompt"] for row in _prompts(3)]
    batch = generator({"prompt": _object_column(prompts), "id": np.arange(3)})
    for index, prompt in enumerate(prompts):
        expected = model.chat(prompt, capture=POINT, **GREEDY)
        assert batch["text"][index] == expected.text
        assert batch["prompt_tokens"][index] == len(expected.prompt)
        np.testing.assert_array_equal(batch["generated_ids"][index], expected.ids)
        np.testing.assert_array_equal(batch[POINT][index], expected.captured[POINT])
    np.testing.assert_array_equal(batch["id"], np.arange(3))


def test_chats_ids_and_seeds_come_from_columns(model: gl.Model) -> None:
    generator = Generator("demo:edge", load={"threads": 1}, max_new_tokens=6, temperature=1.0)
    chat = [{"role": "user", "content": "Hi", "name": None}]  # As Arrow fills in what is missing.
    rows = _object_column([np.array(chat, object)])
    batch = generator({"messages": rows, "seed": np.array([5])})
    expected = model.generate(
        [{"role": "user", "content": "Hi"}], max_new_tokens=6, temperature=1.0, seed=5
    )
    assert batch["text"].tolist() == [expected.text]
    ids = generator({"prompt": _object_column([np.array([2, 100, 101])]), "seed": [9]})
    expected = model.generate([2, 100, 101], max_new_tokens=6, temperature=1.0, seed=9)
    assert ids["text"].tolist() == [expected.text]


def test_a_row_that_fails_raises_or_is_recorded() -> None:
    rows = {"prompt": _object_column([[2, 10**7], [2, 5]])}
    load = {"threads": 1}
    with pytest.raises(ValueError, match=r"\[2, 10000000\]: .*10000000"):
        Generator("demo:edge", load=load, **GREEDY)(rows)
    batch = Generator("demo:edge", load=load, errors="record", capture=POINT, **GREEDY)(rows)
    assert "10000000" in batch["error"][0] and batch["error"][1] == ""
    assert batch["finish_reason"][0] == "error" and batch[POINT][0].shape == (0, 96)
    with pytest.raises(ValueError, match="the rows have 'text'; expected 'messages' or 'prompt'"):
        Generator("demo:edge", load=load, **GREEDY)({"text": rows["prompt"]})


def test_a_generator_that_is_dropped_ends_its_engine() -> None:
    generator = Generator("demo:edge", load={"threads": 1}, **GREEDY)
    generator({"prompt": _object_column([[2, 5]])})
    scheduler = generator._scheduler
    assert scheduler.alive
    del generator
    assert not scheduler.alive


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemloupe.integrations.ray import deployment

    monkeypatch.setitem(sys.modules, "ray", None)
    for use in (lambda: Generator("demo:edge"), lambda: deployment("demo:edge")):
        with pytest.raises(ImportError, match=r'pip install "gemloupe\[ray\]"'):
            use()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


@pytest.mark.ray
def test_a_worker_is_killed_and_nothing_is_lost_or_doubled(
    cluster: Any, model: gl.Model, tmp_path: Path
) -> None:
    import ray.data

    notes = tmp_path / "notes"
    notes.mkdir()

    class Slow(Generator):
        """Notes which worker begins which rows, and takes its time."""

        def __call__(self, batch: Any) -> Any:
            note = notes / f"{os.getpid()}-{batch['id'][0]}"
            note.touch()
            time.sleep(0.3)
            return super().__call__(batch)

    def kill_one() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            pids = [path.name.split("-")[0] for path in notes.iterdir()]
            # Both work, and this one has begun a second batch.
            if len({*pids}) == 2 and (twice := [pid for pid in pids if pids.count(pid) == 2]):
                os.kill(int(twice[0]), signal.SIGKILL)
                killed.append(twice[0])
                return
            time.sleep(0.02)

    killed: list[str] = []
    rows = _prompts(24)
    threading.Thread(target=kill_one, daemon=True).start()
    capture = {POINT: gl.at(), "layers.5.resid_post": gl.at(-1)}
    arguments = {"load": {"dtype": "auto"}, "chat": True, "capture": capture, **GREEDY}
    found = (
        ray.data.from_items(rows, override_num_blocks=12)
        .map_batches(
            Slow,
            fn_constructor_args=("demo:edge",),
            fn_constructor_kwargs=arguments,
            batch_size=2,
            num_cpus=1,
            concurrency=2,
        )
        .take_all()
    )
    assert killed
    assert sorted(row["id"] for row in found) == [row["id"] for row in rows]
    for row in found:
        expected = model.chat(row["prompt"], capture=capture, **GREEDY)
        assert row["text"] == expected.text
        for name in capture:
            np.testing.assert_array_equal(row[name], expected.captured[name])
    # What the killed worker had begun last was begun again by another.
    begun: dict[str, set[str]] = {}
    for path in notes.iterdir():
        pid, first = path.name.split("-")
        begun.setdefault(first, set()).add(pid)
    assert len(begun) == 12 and any(len(pids) > 1 and killed[0] in pids for pids in begun.values())


@pytest.mark.ray
def test_serve_answers_and_streams_as_the_model_does(cluster: Any, model: gl.Model) -> None:
    import httpx
    from ray import serve

    from gemloupe.integrations.ray import deployment

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(deployment("demo:edge", ray_actor_options={"num_cpus": 1}), route_prefix="/")
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        messages = [{"role": "user", "content": "What is 27 + 45?"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 24}
        expected = model.generate(messages, temperature=0, max_new_tokens=24).text
        answer = httpx.post(url, json=body, timeout=30).json()
        assert answer["choices"][0]["message"]["content"] == expected
        pieces = []
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=30) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    pieces.append(delta.get("content", ""))
        assert "".join(pieces) == expected and len(pieces) > 5
        assert httpx.post(url, json={"messages": 3}, timeout=30).status_code == 400
        # A client that goes away ends its row.
        long = endless(model.tokenizer, model.config.text.vocab_size)
        long |= {"messages": messages, "max_tokens": 4000, "stream": True}
        with httpx.stream("POST", url, json=long, timeout=30) as response:
            lines = response.iter_lines()
            while '"a"' not in next(lines):
                pass
        metrics = f"http://127.0.0.1:{port}/metrics"
        ended = 'gemloupe_rows_cancelled_total{model="demo:edge"} 1\n'
        wait_until(lambda: ended in httpx.get(metrics, timeout=30).text)
    finally:
        serve.shutdown()
