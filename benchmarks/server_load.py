"""Mixed load on a server of this machine: speed, memory, and whether any reply is lost or crossed.

    python benchmarks/server_load.py MODEL [--seconds 600] [--clients 8] [--new 32] [--hostile 0.3]
    python benchmarks/server_load.py --url http://127.0.0.1:8080 --pid PID --hostile 0

The first form starts `gemloupe serve MODEL`; the second loads a server that runs already, such as
llama.cpp's on the same file (with --hostile 0, since others answer hostile requests differently).
Before the load each of sixteen questions is answered alone and greedily; under it, every answer
must be the same text. Of all requests the share --hostile is a cancelled stream, a bad request or
an oversized body. Latencies are of whole answers; RSS is read before the load, after a tenth of
it (warm) and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

QUESTIONS = [f"What is {17 + 5 * i} + {90 - 3 * i}?" for i in range(16)]
HOSTILE = ("cancel", "bad", "large")
LARGE_BYTES = 20 << 20


@dataclass
class Counts:
    """What came of the load."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def request(question: str, new: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "x", "messages": messages, "max_tokens": new, "temperature": 0, **more}


async def whole(http: httpx.AsyncClient, question: str, new: int) -> tuple[str, int]:
    answer = await http.post("/v1/chat/completions", json=request(question, new))
    answer.raise_for_status()
    body = answer.json()
    return body["choices"][0]["message"]["content"], body["usage"]["completion_tokens"]


async def streamed(http: httpx.AsyncClient, question: str, new: int, counts: Counts) -> str:
    began, text = time.perf_counter(), ""
    body = request(question, new, stream=True)
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                if piece := choice["delta"].get("content"):
                    if not text:
                        counts.first.append(time.perf_counter() - began)
                    text += piece
    return text


async def hostile(http: httpx.AsyncClient, kind: str, new: int, counts: Counts) -> None:
    if kind == "cancel":
        body = request(random.choice(QUESTIONS), 20 * new, stream=True)
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
    elif kind == "bad":
        body = random.choice([b"{", b"[]", b'{"messages": 3}', b'{"messages": [{"role": "x"}]}'])
        answer = await http.post("/v1/chat/completions", content=body)
        if answer.status_code != 400:
            counts.problems.append(f"a bad request got {answer.status_code}")
    else:
        try:
            answer = await http.post("/v1/completions", content=b"x" * LARGE_BYTES)
        except httpx.TransportError:  # Refused while it was being sent.
            return
        if answer.status_code != 413:
            counts.problems.append(f"an oversized body got {answer.status_code}")


async def client(
    http: httpx.AsyncClient, expected: dict[str, tuple[str, int]], end: float, counts: Counts,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    while time.perf_counter() < end:
        if random.random() < options.hostile:
            kind = random.choice(HOSTILE)
            counts.kinds[kind] += 1
            await hostile(http, kind, options.new, counts)
            continue
        question = random.choice(QUESTIONS)
        counts.kinds["answered"] += 1
        began = time.perf_counter()
        try:
            if random.random() < 0.5:
                text = await streamed(http, question, options.new, counts)
            else:
                text, _ = await whole(http, question, options.new)
        except httpx.HTTPError as error:
            counts.problems.append(f"lost: {type(error).__name__}: {error}")
            continue
        counts.seconds.append(time.perf_counter() - began)
        counts.tokens += expected[question][1]
        if text != expected[question][0]:
            counts.problems.append(f"crossed: {question!r} got {text!r}")


def rss(pid: int | None) -> int:
    if pid is None:
        return 0
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def percentile(values: list[float], share: float) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100)[round(100 * share) - 1]


async def load(url: str, pid: int | None, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=2 * options.clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        alone_began = time.perf_counter()
        expected = {question: await whole(http, question, options.new) for question in QUESTIONS}
        alone = sum(n for _, n in expected.values()) / (time.perf_counter() - alone_began)
        counts, began = Counts(), time.perf_counter()
        memory = {"before": rss(pid)}
        end = began + options.seconds
        work = [
            asyncio.create_task(client(http, expected, end, counts, options))
            for _ in range(options.clients)
        ]
        await asyncio.sleep(options.seconds / 10)
        memory["warm"] = rss(pid)
        await asyncio.gather(*work)
        seconds = time.perf_counter() - began
        memory["after"] = rss(pid)
    return {
        "seconds": round(seconds, 1),
        "clients": options.clients,
        "requests": dict(counts.kinds),
        "tokens_per_second": round(counts.tokens / seconds, 1),
        "tokens_per_second_alone": round(alone, 1),
        "latency_p50": round(percentile(counts.seconds, 0.5), 4),
        "latency_p95": round(percentile(counts.seconds, 0.95), 4),
        "first_p50": round(percentile(counts.first, 0.5), 4),
        "first_p95": round(percentile(counts.first, 0.95), 4),
        "rss_mib": {name: round(size / 2**20, 1) for name, size in memory.items()},
        "problems": len(counts.problems),
        "first_problems": counts.problems[:5],
    }


def start(options: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gemloupe", "serve", options.model, "--port", str(port)]
    command += ["--threads", str(options.threads)] if options.threads else []
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            httpx.get(f"{url}/health").raise_for_status()
            return process, url
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit(f"the server ended with {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo:edge")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--pid", type=int, help="its process, for its memory")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--hostile", type=float, default=0.3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    random.seed(0)
    process = None
    if options.url:
        url, pid = options.url, options.pid
    else:
        process, url = start(options)
        pid = process.pid
    try:
        record = asyncio.run(load(url, pid, options))
    finally:
        if process is not None:
            process.send_signal(2)
            process.wait(60)
    print(json.dumps(record, indent=2, ensure_ascii=False))
    if options.json:
        Path(options.json).write_text(json.dumps(record) + "\n")
    if record["problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
