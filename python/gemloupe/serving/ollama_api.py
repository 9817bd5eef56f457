"""The routes of Ollama's API that its clients use, answered by the same rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from gemloupe.output import Output
from gemloupe.serving import chat_request
from gemloupe.serving.chat_request import GenerateRequest
from gemloupe.serving.failure import ApiError
from gemloupe.serving.fields import Fields
from gemloupe.serving.hooks_json import hooks_json
from gemloupe.serving.jobs import Job
from gemloupe.serving.registry import Found, Served
from gemloupe.serving.scheduler import Ended
from gemloupe.serving.service import Service, streamed, warning_headers

# The version of Ollama whose answers these are like; clients compare it.
_VERSION = "0.12.0"
# Ollama's name of an option -> ours.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "seed": "seed",
    "stop": "stop",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "logit_cap": "logit_cap",
}
# What Ollama's clients send for the sake of its own engine.
_WITHOUT_EFFECT = frozenset(
    {"num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "numa",
     "repeat_last_n", "typical_p", "tfs_z", "mirostat", "mirostat_eta", "mirostat_tau",
     "penalize_newline"}
)  # fmt: skip
_OWN = (
    "max_thinking_tokens", "thinking_mode", "logit_cap", "capture", "edit", "routing", "adapter",
    "tool_choice",
)  # fmt: skip


def routes(service: Service) -> APIRouter:
    """/api/chat, /api/generate, /api/tags, /api/show, /api/ps, /api/version."""
    router = APIRouter()
    registry = service.registry

    @router.post("/api/chat")
    async def chat(request: Request) -> Response:
        fields = Fields(await service.body(request))
        messages = fields.get("messages", list, default=[])
        if not messages:
            return _loaded(service, fields, {"message": {"role": "assistant", "content": ""}})
        body = _as_openai(fields) | {"messages": messages, "tools": fields.get("tools", list)}
        return await _answer(service, request, fields, body, is_chat=True)

    @router.post("/api/generate")
    async def generate(request: Request) -> Response:
        fields = Fields(await service.body(request))
        prompt = fields.get("prompt", str, default="")
        system = fields.get("system", str, default="")
        images = fields.get("images", list)
        raw = fields.get("raw", bool, default=False)
        for key in ("suffix", "template"):
            fields.refuse(key, "", reason="is not supported; use raw with a prompt of your own")
        fields.refuse("context", [], reason="is not supported; send the messages to /api/chat")
        if not prompt and not images:
            return _loaded(service, fields, {"response": ""})
        body = _as_openai(fields)
        if raw:
            if images:
                raise ApiError(400, "a raw prompt takes no images", param="images")
            body = body | {"prompt": prompt}
        else:
            user = {"role": "user", "content": prompt} | ({"images": images} if images else {})
            first = [{"role": "system", "content": system}] if system else []
            body = body | {"messages": [*first, user]}
        return await _answer(service, request, fields, body, is_chat=False)

    @router.get("/api/tags")
    async def tags() -> Response:
        return JSONResponse({"models": [_tag(service, name) for name in registry.names]})

    @router.get("/api/ps")
    async def running() -> Response:
        models = [
            _tag(service, name) | {"size_vram": 0, "expires_at": "9999-12-31T23:59:59Z"}
            for name in registry.names
        ]
        return JSONResponse({"models": models})

    @router.post("/api/show")
    async def show(request: Request) -> Response:
        fields = Fields(await service.body(request))
        name = fields.get("model", str, default="") or fields.get("name", str, default="")
        found = registry.find(name)
        model = found.served.model
        text = model.config.text
        body = {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": _details(found.served),
            "model_info": {
                "general.architecture": "gemma4",
                "gemma4.block_count": len(text.layers),
                "gemma4.context_length": text.max_position_embeddings,
                "gemma4.embedding_length": text.hidden_size,
                "gemma4.attention.head_count": text.num_attention_heads,
                "gemma4.vocab_size": text.vocab_size,
            },
            "capabilities": [
                "completion",
                "tools",
                "thinking",
                *(["vision"] if model.vision is not None else []),
            ],
            "modified_at": _stamp(service.started),
        }
        return JSONResponse(body, headers=warning_headers(found.warnings))

    @router.get("/api/version")
    async def version() -> Response:
        return JSONResponse({"version": _VERSION})

    return router


def _loaded(service: Service, fields: Fields, empty: Mapping[str, Any]) -> Response:
    """The answer to a request without a prompt, by which Ollama's clients load a model."""
    name = fields.get("model", str, default="")
    found = service.registry.find(name)
    body = {"model": name, "created_at": _stamp(), **empty, "done": True, "done_reason": "load"}
    return JSONResponse(body, headers=warning_headers(found.warnings))


def _as_openai(fields: Fields) -> dict[str, Any]:
    """The fields that are alike in all requests, under OpenAI's names."""
    body: dict[str, Any] = {"model": fields.get("model", str, default="")}
    body["stream"] = fields.get("stream", bool, default=True)
    if (think := fields.get("think", bool, str)) is not None:
        body["think"] = think
    form = fields.get("format", str, dict)
    if isinstance(form, dict):
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": form}}
    elif form == "json":
        body["response_format"] = {"type": "json_object"}
    elif form:
        raise ApiError(400, 'format must be "json" or a JSON schema', param="format")
    options = Fields(fields.get("options", dict, default={}), "options.")
    for name, ours in _OPTIONS.items():
        if (value := options.get(name)) is not None:
            body[ours] = value
    count = options.integer("num_predict", -2, 2**31)
    if count is not None and count > 0:
        body["max_tokens"] = count
    for name in _OWN:
        if (value := fields.get(name)) is not None:
            body[name] = value
    fields.get("keep_alive")
    fields.option_warnings = options.finish(_WITHOUT_EFFECT)
    return body


async def _answer(
    service: Service, request: Request, fields: Fields, body: dict[str, Any], is_chat: bool
) -> Response:
    warnings = [*fields.option_warnings, *fields.finish()]
    read = chat_request.read_chat if "messages" in body else chat_request.read_completion
    if "prompt" in body:
        body = {"max_tokens": service.limits.max_new_tokens} | body
        if body.pop("think", False):
            raise ApiError(400, "a raw prompt has no thinking to turn on", param="think")
    asked = read(body, service.limits)
    found = service.registry.find(asked.model)
    warnings = [*found.warnings, *warnings, *asked.warnings]
    began = time.monotonic_ns()
    job, _ = await service.start(found, asked)
    headers = warning_headers(warnings)
    if asked.stream:
        lines = _lines(service, request, asked, found, job, began, is_chat)
        return streamed(
            job,
            lines,
            {"Content-Type": "application/x-ndjson"} | headers,
            lambda error: json.dumps({"error": str(service.failure(error))}) + "\n",
        )
    output = (await service.outputs(request, job))[0]

    def whole() -> bytes:
        said = _said(output.text, output.reasoning, output.tool_calls, is_chat)
        return json.dumps(_head(asked, found) | said | _end(output, began)).encode()

    content = await run_in_threadpool(whole)
    return Response(content, media_type="application/json", headers=headers)


async def _lines(
    service: Service,
    request: Request,
    asked: GenerateRequest,
    found: Found,
    job: Job,
    began: int,
    is_chat: bool,
) -> AsyncIterator[str]:
    async for _, event in service.events(request, job):
        if isinstance(event, Ended):
            said = _said("", "", [], is_chat)
            line = _head(asked, found) | said | _end(event.output, began)
            yield json.dumps(line) + "\n"
        elif event.text or event.reasoning or event.tool_calls:
            said = _said(event.text, event.reasoning, event.tool_calls, is_chat)
            yield json.dumps(_head(asked, found) | said | {"done": False}) + "\n"


def _head(asked: GenerateRequest, found: Found) -> dict[str, Any]:
    return {"model": asked.model or found.served.name, "created_at": _stamp()}


def _said(text: str, reasoning: str, calls: list[dict[str, Any]], is_chat: bool) -> dict[str, Any]:
    thinking = {"thinking": reasoning} if reasoning else {}
    if not is_chat:
        return {"response": text, **thinking}
    message: dict[str, Any] = {"role": "assistant", "content": text, **thinking}
    if calls:
        message["tool_calls"] = [{"function": call["function"]} for call in calls]
    return {"message": message}


def _end(output: Output, began: int) -> dict[str, Any]:
    times = output.timings
    return {
        "done": True,
        "done_reason": "length" if output.finish_reason == "length" else "stop",
        "total_duration": time.monotonic_ns() - began,
        "load_duration": 0,
        "prompt_eval_count": len(output.prompt),
        "prompt_eval_duration": int(times.prefill_seconds * 1e9),
        "eval_count": len(output.ids),
        "eval_duration": int(times.decode_seconds * 1e9),
        **hooks_json(output),
    }


def _stamp(seconds: float | None = None) -> str:
    at = datetime.fromtimestamp(time.time() if seconds is None else seconds, timezone.utc)
    return at.isoformat().replace("+00:00", "Z")


def _details(served: Served) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gemloupe",
        "family": "gemma4",
        "families": ["gemma4"],
        "parameter_size": "",
        "quantization_level": served.model.dtype,
    }


def _tag(service: Service, name: str) -> dict[str, Any]:
    served = service.registry.find(name).served
    return {
        "name": name,
        "model": name,
        "modified_at": _stamp(service.started),
        "size": sum(path.stat().st_size for path in served.model.checkpoint.files),
        "digest": hashlib.sha256(served.model.fingerprint.encode()).hexdigest(),
        "details": _details(served),
    }
