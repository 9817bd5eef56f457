"""What the routes of both interfaces share: rows of a request, waiting for them, bodies."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from gemloupe.errors import quoted
from gemloupe.generation import Row, make_rows
from gemloupe.output import Output
from gemloupe.serving.chat_request import GenerateRequest
from gemloupe.serving.failure import ApiError, as_api_error
from gemloupe.serving.fields import parse_body
from gemloupe.serving.hooks_json import check_capture_size
from gemloupe.serving.jobs import Job
from gemloupe.serving.limits import Access, Limits
from gemloupe.serving.metrics import Metrics
from gemloupe.serving.registry import Found, Registry, Served
from gemloupe.serving.scheduler import Ended
from gemloupe.stream import Piece

# 2^64 divided by the golden ratio: what separates the seeds of one request's answers.
_CHOICE_SEED = 0x9E3779B97F4A7C15
_BASE_ADAPTER = "base"
# No text has so many characters a token.
_MOST_CHARACTERS = 16
_PREPARED_AT_ONCE = 4


@dataclass
class Service:
    """A server without its HTTP."""

    registry: Registry
    limits: Limits
    access: Access = field(default_factory=Access)
    metrics: Metrics = field(default_factory=Metrics)
    pass_gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """Embeddings and transcriptions take turns among themselves, and with the rows."""
    passes_waiting: int = 0
    started: float = field(default_factory=time.time)
    _limiter: anyio.CapacityLimiter | None = None

    def failure(self, error: BaseException) -> ApiError:
        """What a client is told about an exception, without this machine's paths."""
        known = as_api_error(error)
        text = str(known)
        for served in self.registry.models:
            text = text.replace(str(served.model.checkpoint.folder), served.name)
        if text == str(known):
            return known
        return ApiError(
            known.status, text, param=known.param, code=known.code, retry_after=known.retry_after
        )

    async def body(self, request: Request) -> dict[str, Any]:
        """The request's JSON object. ApiError as `raw_body`, and 400 for anything else."""
        return await run_in_threadpool(parse_body, await self.raw_body(request))

    async def raw_body(self, request: Request) -> bytes:
        """The request's body. ApiError 413 where it is too long, 408 where it is slow."""
        limit = self.limits.max_body
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_long(limit)
        data = bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                data.extend(chunk)
                if len(data) > limit:
                    raise _too_long(limit)

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not come in time") from None
        except ClientDisconnect:  # Nobody reads this; the log needs no traceback of it.
            raise ApiError(400, "the client went away before its body had come") from None
        return bytes(data)

    async def start(self, found: Found, request: GenerateRequest) -> tuple[Job, list[Row]]:
        """Prepares a request's rows in a thread of the pool and queues them."""
        if not found.served.scheduler.alive:
            raise ApiError(503, "the server is stopping", retry_after=5)
        rows = await anyio.to_thread.run_sync(self._rows, found, request, limiter=self._preparing())
        try:
            return Job(found.served.scheduler, rows), rows
        except BaseException:
            for row in rows:
                if row.guide:
                    row.guide.close()
            raise

    def _preparing(self) -> anyio.CapacityLimiter:
        """A long text takes memory while it becomes tokens: few do at once."""
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_PREPARED_AT_ONCE)
        return self._limiter

    def check_length(self, model: Any, given: Any) -> None:
        """ApiError 400 for a text that is too long whatever its tokens are."""
        limit = model.config.text.max_position_embeddings
        limit = min(limit, self.limits.max_prompt or limit)
        if (size := _characters(given)) > limit * _MOST_CHARACTERS:
            raise ApiError(
                400,
                f"the prompt has {size} characters; expected at most {limit} tokens",
                code="context_length_exceeded",
            )

    def _rows(self, found: Found, request: GenerateRequest) -> list[Row]:
        model = found.served.model
        arguments = dict(request.arguments)
        adapter = arguments.get("adapter", found.adapter)
        _check_adapter(found.served, adapter)
        adapter = {} if adapter == _BASE_ADAPTER else adapter
        arguments["adapter"] = adapter
        has_tools = arguments.get("tool_choice") != "none"
        rows = []
        for index, given in enumerate(request.inputs):
            self.check_length(model, [given, arguments.get("tools")])
            prompt = model.prepare(
                given,
                thinking=arguments.get("thinking", False),
                tools=arguments.get("tools") if has_tools else None,
            )
            prompt = prompt.under(model.adapters.media(model.adapters.selected(adapter)))
            for medium in prompt.media:
                _ = medium.soft_tokens  # Computed here, not in the engine's thread.
            for choice in range(request.choices):
                seed = request.seed
                if seed is not None:
                    seed = (seed + (index * request.choices + choice) * _CHOICE_SEED) % 2**63
                more = {
                    "seed": seed,
                    "drafter": found.served.drafter,
                    "prefix_cache": found.served.scheduler.prefixes,
                }
                row = make_rows(model, prompt, {**arguments, **more})[0]
                row.streams_experts = request.streams_routing
                check_capture_size(row, model.config.text, self.limits.max_capture)
                rows.append(row)
        return rows

    async def outputs(self, request: Request, job: Job) -> list[Output]:
        """All outputs; a client that goes away cancels them."""
        async with _watched(request, job):
            outputs = await job.outputs()
        for output in outputs:
            self.metrics.first_token(output.timings.time_to_first_token)
        return outputs

    async def events(self, request: Request, job: Job) -> AsyncIterator[tuple[int, Piece | Ended]]:
        """What happens to the rows; a client that goes away cancels them."""
        async with _watched(request, job) as gone:
            async for index, event in job.events():
                if gone.is_set():
                    return
                if isinstance(event, Ended):
                    self.metrics.first_token(event.output.timings.time_to_first_token)
                yield index, event


def _characters(value: Any) -> int:
    """Characters of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _characters(item) for key, item in value.items())
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


def _too_long(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")


def _check_adapter(served: Served, adapter: Any) -> None:
    names = adapter if isinstance(adapter, dict) else [] if adapter is None else [adapter]
    for name in names:
        if name != _BASE_ADAPTER and name not in served.adapters:
            raise ApiError(
                404,
                f"no adapter {quoted(name)}; there are {', '.join(served.adapters) or 'none'}",
                param="adapter",
                code="adapter_not_found",
            )


@contextlib.asynccontextmanager
async def _watched(request: Request, job: Job) -> AsyncIterator[asyncio.Event]:
    """Cancels the job when the client goes away, which the event then says."""
    gone = asyncio.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()
        job.cancel()

    task = asyncio.create_task(watch())
    try:
        yield gone
    finally:
        task.cancel()
        job.cancel()


def warning_headers(warnings: Iterable[str]) -> dict[str, str]:
    """X-Gemloupe-Warning, in printable ASCII; {} without warnings."""
    text = "; ".join(warnings)
    plain = "".join(c if " " <= c <= "~" else "?" for c in text)
    return {"X-Gemloupe-Warning": plain[:1000]} if plain else {}


class _JobResponse(StreamingResponse):
    """Ends its job when it ends, even where its first text was never asked for."""

    job: Job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


def streamed(
    job: Job,
    chunks: AsyncIterator[str],
    headers: Mapping[str, str],
    on_error: Callable[[BaseException], str],
) -> StreamingResponse:
    """A response of a job's text as it comes; an exception becomes its last text.

    `headers` say what it is.
    """

    async def texts() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield chunk.encode()
        except Exception as error:
            yield on_error(error).encode()

    response = _JobResponse(texts(), headers={"Cache-Control": "no-store", **headers})
    response.job = job
    return response
