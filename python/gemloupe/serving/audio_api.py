"""/v1/audio/transcriptions: speech in a form's file to text."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from gemloupe.errors import quoted
from gemloupe.media.audio import AudioSource
from gemloupe.serving.failure import ApiError
from gemloupe.serving.fields import Fields
from gemloupe.serving.registry import Found
from gemloupe.serving.service import Service, warning_headers
from gemloupe.transcription import Segment, segments

# What clients send (ISO 639-1) -> the name that the model is told.
_LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French", "he": "Hebrew",
    "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese",
    "ko": "Korean", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "th": "Thai", "tr": "Turkish",
    "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
_MAX_NAME = 40


def routes(service: Service) -> APIRouter:
    """The route of transcriptions."""
    router = APIRouter()

    @router.post("/v1/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        data, values = await _form(service, request)
        fields = Fields(values)
        found = service.registry.find(fields.get("model", str, default=""))
        language = fields.get("language", str)
        form = fields.choice("response_format", ("json", "text", "verbose_json"), "json")
        if fields.get("temperature", str, default="0") not in ("0", "0.0"):
            raise ApiError(400, "transcriptions are greedy; leave temperature out")
        if fields.get("stream", str, default="false").lower() not in ("false", "0"):
            raise ApiError(400, "transcriptions come whole; leave stream out", param="stream")
        warnings = [*found.warnings, *fields.finish()]
        if language is not None:
            language = _LANGUAGES.get(language.lower(), language)
            if len(language) > _MAX_NAME or not language.replace(" ", "").isalpha():
                raise ApiError(400, f"language is {quoted(language)}; expected one such as 'en'")
        if service.passes_waiting >= service.limits.max_queue:
            raise ApiError(429, "too many passes are waiting", code="queue_full", retry_after=5)
        service.passes_waiting += 1
        try:
            async with service.pass_gate:
                parts = await run_in_threadpool(_transcribed, service, found, data, language)
        finally:
            service.passes_waiting -= 1
        text = " ".join(part.text for part in parts if part.text)
        headers = warning_headers(warnings)
        if form == "text":
            return PlainTextResponse(text + "\n", headers=headers)
        body: dict[str, Any] = {"text": text}
        if form == "verbose_json":
            body |= {
                "task": "transcribe",
                "language": language or "",
                "duration": parts[-1].end if parts else 0.0,
                "segments": [
                    {"id": i, "start": part.begin, "end": part.end, "text": part.text}
                    for i, part in enumerate(parts)
                ],
            }
        return JSONResponse(body, headers=headers)

    return router


async def _form(service: Service, request: Request) -> tuple[bytes, dict[str, Any]]:
    """(the file, the other fields) of a form whose length has been checked."""
    body = await service.raw_body(request)
    sent = False

    async def again() -> dict[str, Any]:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, again).form(max_files=1, max_fields=20)
    except (MultiPartException, ValueError, KeyError) as error:
        raise ApiError(400, f"the body is no form: {error}") from None
    async with _closing(form):
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "file is missing; expected a sound", param="file")
        values = {key: value for key, value in form.items() if isinstance(value, str)}
        return await file.read(), values


class _closing:
    """Closes a form's files."""

    def __init__(self, form: Any) -> None:
        self._form = form

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *_error: Any) -> None:
        await self._form.close()


def _transcribed(
    service: Service, found: Found, data: bytes, language: str | None
) -> list[Segment]:
    model = found.served.model
    _ = model.audio_tower  # Of a model without ears: ValueError.
    most = service.limits.max_transcribed
    seconds = AudioSource(data).seconds
    if seconds > most:
        raise ApiError(400, f"the sound is {seconds:.0f} s long; expected at most {most:g} s")
    adapter = {} if found.adapter is None else found.adapter
    return list(segments(model, data, language, adapter=adapter, max_new_tokens=512))
