"""The web application: routes, the guard before them, and errors in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from gemloupe.serving import audio_api, ollama_api, openai_api, web_page
from gemloupe.serving.failure import ApiError
from gemloupe.serving.guard import Guard
from gemloupe.serving.service import Service

_log = logging.getLogger("gemloupe.serve")


def make_app(service: Service, drain: float = 30.0) -> Any:
    """Returns the ASGI application. At its shutdown rows have `drain` seconds to end."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        for served in service.registry.models:
            await run_in_threadpool(served.scheduler.close, drain)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(openai_api.routes(service))
    app.include_router(audio_api.routes(service))
    app.include_router(ollama_api.routes(service))
    app.include_router(web_page.routes(service.access.page))

    async def explain(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, f"{error.detail}: there is no such route here")
        known = service.failure(error)
        return JSONResponse(known.body_for(request.url.path), known.status, headers=known.headers)

    for kind in (ApiError, HTTPException, ValueError, TypeError, KeyError, MemoryError,
                 ImportError, Exception):  # fmt: skip
        app.add_exception_handler(kind, explain)
    if service.access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.access.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Gemloupe-Warning"],
        )
    limits = service.limits
    most = limits.max_queue + limits.max_rows + limits.spare_requests
    return Guard(app, service.access, service.metrics, most)
