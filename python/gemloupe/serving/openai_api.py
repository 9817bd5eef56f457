"""The routes of OpenAI's API, and those that other servers have beside it."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response

import gemloupe.capturing as capturing
from gemloupe.errors import quoted
from gemloupe.generation import Row
from gemloupe.output import Output
from gemloupe.serving import chat_request, openai_format
from gemloupe.serving.chat_request import GenerateRequest
from gemloupe.serving.failure import ApiError
from gemloupe.serving.fields import Fields
from gemloupe.serving.hooks_json import experts_json
from gemloupe.serving.jobs import Job
from gemloupe.serving.messages import read_messages
from gemloupe.serving.registry import Found, Served
from gemloupe.serving.scheduler import Ended
from gemloupe.serving.service import Service, streamed, warning_headers

_MAX_EMBEDDINGS = 256


def routes(service: Service) -> APIRouter:
    """Every route but Ollama's."""
    router = APIRouter()
    limits, registry = service.limits, service.registry

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = chat_request.read_chat(await service.body(request), limits)
        return await _generate(service, request, asked, _CHAT)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = chat_request.read_completion(await service.body(request), limits)
        return await _generate(service, request, asked, _TEXT)

    @router.get("/v1/models")
    async def models() -> Response:
        created = int(service.started)
        data = [_model(service, name, created) for name in registry.names]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in registry.names:
            raise ApiError(404, f"no model {quoted(name)}", param="model", code="model_not_found")
        return JSONResponse(_model(service, name, int(service.started)))

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await _embeddings(service, await service.body(request))

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        fields = Fields(await service.body(request))
        found = registry.find(fields.get("model", str, default=""))
        tokenizer = found.served.model.tokenizer
        messages = fields.get("messages", list)
        text = fields.get("prompt", str) or fields.get("content", str, default="")
        bos = fields.get("add_special_tokens", bool, default=fields.get("add_special", bool))
        pieces = fields.get("with_pieces", bool, default=False)
        warnings = [*found.warnings, *fields.finish()]

        def ids_of() -> list[int]:
            service.check_length(found.served.model, messages or text)
            if messages is not None:
                words = replace(service.limits, max_images=0, max_sounds=0, max_videos=0)
                chat = read_messages(messages, words)
                ids: list[int] = found.served.model.prepare(chat).ids.tolist()
                return ids
            return tokenizer.encode(text, bos="auto" if bos is not False else False)

        ids = await run_in_threadpool(ids_of)
        answer: dict[str, Any] = {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": found.served.model.config.text.max_position_embeddings,
        }
        if pieces:
            answer["pieces"] = tokenizer.tokens(ids)
        return JSONResponse(answer, headers=warning_headers(warnings))

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        fields = Fields(await service.body(request))
        found = registry.find(fields.get("model", str, default=""))
        ids = fields.get("tokens", list, default=[])
        vocab = found.served.model.config.text.vocab_size
        for index, id in enumerate(ids):
            if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < vocab:
                raise ApiError(
                    400, f"tokens[{index}] is {quoted(id)}; expected 0 to {vocab - 1}",
                    param="tokens",
                )  # fmt: skip
        warnings = [*found.warnings, *fields.finish()]
        tokenizer = found.served.model.tokenizer
        text = await run_in_threadpool(tokenizer.decode, ids, skip_special=False)
        return JSONResponse({"prompt": text, "content": text}, headers=warning_headers(warnings))

    @router.get("/health")
    async def health() -> Response:
        alive = all(served.scheduler.alive for served in registry.models)
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(
            service.metrics.text(registry), media_type="text/plain; version=0.0.4"
        )

    @router.get("/v1/adapters")
    async def adapters(model: str = "") -> Response:
        found = registry.find(model)
        return JSONResponse({"object": "list", "data": found.served.adapters})

    @router.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request) -> Response:
        fields = Fields(await service.body(request))
        found = registry.find(fields.get("model", str, default=""))
        name = fields.get("lora_name", str, default="")
        folder = fields.get("lora_path", str, default="")
        scale = fields.number("scale", -100, 100, 1.0)
        fields.finish()
        await run_in_threadpool(_load_adapter, service, found.served, name, folder, scale)
        return JSONResponse({"status": "loaded", "name": name})

    @router.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request) -> Response:
        fields = Fields(await service.body(request))
        found = registry.find(fields.get("model", str, default=""))
        name = fields.get("lora_name", str, default="")
        fields.finish()
        if service.access.adapter_folder is None:
            raise ApiError(403, "this server's adapters are fixed; start it with --adapter-dir")
        if name not in found.served.adapters:
            raise ApiError(404, f"no adapter {quoted(name)}", param="lora_name")
        found.served.model.delete_adapter(name)
        return JSONResponse({"status": "unloaded", "name": name})

    return router


def _model(service: Service, name: str, created: int) -> dict[str, Any]:
    found = service.registry.find(name)
    limits = {"max_tokens": service.limits.max_new_tokens, "max_body": service.limits.max_body}
    facts = {**found.served.facts, **limits, "adapter": found.adapter}
    entry = {"id": name, "object": "model", "created": created, "owned_by": "gemloupe"}
    return {**entry, "gemloupe": facts}


def _load_adapter(service: Service, served: Served, name: str, path: str, scale: float) -> None:
    root = service.access.adapter_folder
    if root is None:
        raise ApiError(403, "clients may load no adapters here; start with --adapter-dir FOLDER")
    if not name or not path:
        raise ApiError(400, "lora_name and lora_path are missing; expected both")
    root = root.resolve()
    try:
        folder = (root / path).resolve()
        inside = root in folder.parents and folder.is_dir()
    except (OSError, ValueError):
        inside = False
    if not inside:
        raise ApiError(403, f"lora_path is {quoted(path)}; expected a folder in --adapter-dir")
    try:
        served.model.load_adapter(str(folder), name=name, scale=scale)
    except FileNotFoundError:
        raise ApiError(400, f"{quoted(path)} holds no adapter", param="lora_path") from None


class _Form:
    """How one of the two interfaces writes its answers."""

    def __init__(self, is_chat: bool) -> None:
        self.is_chat = is_chat
        self.prefix = "chatcmpl" if is_chat else "cmpl"
        self.object = "chat.completion" if is_chat else "text_completion"
        self.chunk = "chat.completion.chunk" if is_chat else "text_completion"

    def choice(self, index: int, output: Output, asked: GenerateRequest) -> dict[str, Any]:
        make = openai_format.chat_choice if self.is_chat else openai_format.completion_choice
        return make(index, output, asked)


_CHAT, _TEXT = _Form(True), _Form(False)


async def _generate(
    service: Service, request: Request, asked: GenerateRequest, form: _Form
) -> Response:
    found = service.registry.find(asked.model)
    warnings = [*found.warnings, *asked.warnings]
    job, rows = await service.start(found, asked)
    head = {
        "id": f"{form.prefix}-{uuid.uuid4().hex}",
        "object": form.chunk if asked.stream else form.object,
        "created": int(time.time()),
        "model": asked.model or found.served.name,
    }
    headers = warning_headers(warnings)
    if asked.stream:
        chunks = _chunks(service, request, asked, form, head, job, rows)
        kind = {"Content-Type": "text/event-stream; charset=utf-8"}
        return streamed(
            job, chunks, kind | headers, lambda error: _event(service.failure(error).body)
        )
    outputs = await service.outputs(request, job)

    def answer() -> bytes:
        choices = [form.choice(i, output, asked) for i, output in enumerate(outputs)]
        counted = openai_format.usage(outputs, asked.choices, asked.discard)
        body = {**head, "choices": choices, "usage": counted}
        if warnings:
            body["warnings"] = warnings
        return json.dumps(body).encode()

    body = await run_in_threadpool(answer)
    return Response(body, media_type="application/json", headers=headers)


async def _chunks(
    service: Service,
    request: Request,
    asked: GenerateRequest,
    form: _Form,
    head: dict[str, Any],
    job: Job,
    rows: list[Row],
) -> AsyncIterator[str]:
    with_usage = {"usage": None} if asked.include_usage else {}

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return _event({**head, "choices": choices, **with_usage, **more})

    for index, row in enumerate(rows):
        if form.is_chat:
            delta = {"role": "assistant", "content": ""}
            yield event([{"index": index, "delta": delta, "finish_reason": None}])
        elif asked.echo and not asked.logprobs:
            text = openai_format.echoed_text(index, row.prompt, asked)
            yield event([{"index": index, "text": text, "finish_reason": None}])
    calls = [0] * len(rows)
    offsets: dict[int, int] = {}  # Of rows with a first token: where its text begins.
    outputs: dict[int, Output] = {}
    async for index, happened in service.events(request, job):
        if isinstance(happened, Ended):
            outputs[index] = happened.output
            added = openai_format.extras(happened.output)["gemloupe"]
            if asked.streams_routing:
                added.pop("routing", None)
            if {"captured", "routing", "tool_errors"} & added.keys():
                yield event([], gemloupe={"index": index, **added})
            continue
        tokenizer = rows[index].prompt.tokenizer
        choice: dict[str, Any] | None
        if form.is_chat:
            choice = openai_format.chat_delta(index, happened, calls[index], asked, tokenizer)
            calls[index] += len(happened.tool_calls)
        else:
            logprobs = None
            if asked.logprobs and index not in offsets:
                offsets[index] = 0
                if asked.echo:  # Its log-probabilities came with the first token.
                    choice, offsets[index] = _echoed(index, rows[index], asked)
                    yield event([choice])
            if asked.logprobs and happened.ids and not asked.discard:
                logprobs = openai_format.completion_logprobs(
                    happened.ids,
                    happened.logprobs or [],
                    asked.top_logprobs,
                    tokenizer,
                    offsets[index],
                )
                offsets[index] += sum(map(len, logprobs["tokens"]))
            text = "" if asked.discard else happened.text
            choice = {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": happened.finish_reason,
            }
            if not text and logprobs is None and not happened.finish_reason:
                choice = choice if happened.experts else None
        if choice is not None:
            if happened.experts:
                choice["gemloupe"] = {"routing": experts_json(happened.experts)}
            yield event([choice])
    if asked.include_usage:
        ended = [outputs[index] for index in sorted(outputs)]
        counted = openai_format.usage(ended, asked.choices, asked.discard)
        timings = [openai_format.timings(output) for output in ended]
        more = {"usage": counted, "gemloupe": {"timings": timings}}
        yield _event({**head, "choices": [], **more})
    yield "data: [DONE]\n\n"


def _echoed(index: int, row: Row, asked: GenerateRequest) -> tuple[dict[str, Any], int]:
    """The choice of a chunk with the prompt and its log-probabilities, and its length."""
    tokens = openai_format.echoed_tokens(index, row.prompt, row.prompt_logprobs, asked)
    tokenizer = row.prompt.tokenizer
    logprobs = openai_format.completion_logprobs(*tokens, asked.top_logprobs, tokenizer)
    text = openai_format.echoed_text(index, row.prompt, asked)
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
    return choice, sum(map(len, logprobs["tokens"]))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def _embeddings(service: Service, body: dict[str, Any]) -> Response:
    fields = Fields(body)
    name = fields.get("model", str, default="")
    found = service.registry.find(name)
    config = found.served.model.config.text
    given = fields.get("input")
    inputs = chat_request.prompts_of(given, "input")
    if len(inputs) > _MAX_EMBEDDINGS:
        raise ApiError(
            400, f"{len(inputs)} inputs; expected at most {_MAX_EMBEDDINGS}", param="input"
        )
    layers = len(config.layers)
    layer = fields.integer("layer", -layers, layers - 1, -1) % layers
    normalize = fields.get("normalize", bool, default=False)
    encoding = fields.choice("encoding_format", ("float", "base64"), "float")
    fields.refuse(
        "dimensions", config.hidden_size, reason=f"is not supported; expected {config.hidden_size}"
    )
    warnings = [*found.warnings, *fields.finish(chat_request.WITHOUT_EFFECT)]
    if service.passes_waiting >= service.limits.max_queue:
        raise ApiError(429, "too many passes are waiting", code="queue_full", retry_after=2)
    service.passes_waiting += 1
    try:
        async with service.pass_gate:
            rows, tokens = await run_in_threadpool(_embed, service, found, inputs, layer, normalize)
    finally:
        service.passes_waiting -= 1
    data = [
        {"object": "embedding", "index": i, "embedding": _vector(row, encoding)}
        for i, row in enumerate(rows)
    ]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "data": data, "model": name or found.served.name, "usage": used}
    return JSONResponse(answer, headers=warning_headers(warnings))


def _vector(row: np.ndarray, encoding: str) -> Any:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    return row.tolist()


def _embed(
    service: Service, found: Found, inputs: list[Any], layer: int, normalize: bool
) -> tuple[list[np.ndarray], int]:
    """The mean of a layer's resid_post [D] over each input, and the tokens of all."""
    model = found.served.model
    limit = model.config.text.max_position_embeddings
    limit = min(limit, service.limits.max_prompt or limit)
    service.check_length(model, inputs)
    prompts = [model.prepare(each) for each in inputs]
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit:
            raise ApiError(
                400,
                f"input[{index}] has {len(prompt)} tokens; expected 1 to {limit}",
                code="context_length_exceeded",
            )
    point = f"layers.{layer}.resid_post"
    rows = []
    for prompt in prompts:
        run = model.run(
            prompt,
            capture={point: capturing.at(reduce="mean")},
            logits=None,
            routing=False,
            adapter={} if found.adapter is None else found.adapter,
        )
        row = np.asarray(run[point], np.float32).reshape(-1)
        rows.append(row / np.linalg.norm(row) if normalize else row)
    return rows, sum(map(len, prompts))
