"""Who may call: the check before every route."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from gemloupe.errors import quoted
from gemloupe.serving.failure import ApiError
from gemloupe.serving.limits import Access
from gemloupe.serving.metrics import Metrics
from gemloupe.serving.web_page import is_page

_log = logging.getLogger("gemloupe.serve")
_LOCAL = ("localhost", "127.0.0.1", "::1")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Guard:
    """ASGI middleware: the API key, the Host and Origin headers, and counts of requests."""

    def __init__(self, app: Any, access: Access, metrics: Metrics, most: int) -> None:
        """`most`: requests with a body that are served at once; it bounds what bodies take."""
        self._app = app
        self._access = access
        self._metrics = metrics
        self._most = most
        self._busy = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"a connection of type {scope['type']}")
        began = time.monotonic()
        status = 500
        counts = scope["method"] not in ("GET", "HEAD", "OPTIONS")

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._busy += counts
        try:
            self._check(scope)
            if counts and self._busy > self._most:
                raise ApiError(
                    429, "too many requests at once", code="too_many_requests", retry_after=2
                )
            await self._app(scope, receive, counted)
        except ApiError as error:
            await _refuse(error, scope["path"], counted)
        except Exception:
            # The client has its 500 already, and may go on with the same connection.
            _log.exception("a request failed")
        finally:
            self._busy -= counts
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1")
                   for name, value in scope["headers"]}  # fmt: skip
        if self._access.hosts:
            host = _host_of("//" + headers.get("host", ""))
            if host not in (*_LOCAL, *self._access.hosts):
                raise ApiError(
                    403, f"the Host header is {quoted(host)}; expected one of this server's names"
                )
        origin = headers.get("origin")
        if origin is not None and origin not in self._access.origins:
            if _host_of(origin) not in _LOCAL and not self._is_own(origin, headers.get("host", "")):
                raise ApiError(
                    403, f"pages of {quoted(origin)} may not call this server; see --allow-origin"
                )
        key = self._access.api_key
        # A browser's question before a request has no key, and gets no more than an answer.
        if key is None or scope["path"] == "/health" or scope["method"] == "OPTIONS":
            return
        if self._access.page and is_page(scope["path"]) and scope["method"] in ("GET", "HEAD"):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), key.encode())
        if kind.lower() != "bearer" or not right:
            raise ApiError(
                401, "the API key is missing or wrong (Authorization: Bearer KEY)",
                code="invalid_api_key",
            )  # fmt: skip

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether it is this server's own page, at an address that nobody can point elsewhere."""
        if not host or origin.partition("://")[2] != host:
            return False
        name = _host_of(origin)
        return name in self._access.hosts or _is_address(name)


def _is_address(host: str | None) -> bool:
    try:
        return host is not None and bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _host_of(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


async def _refuse(error: ApiError, path: str, send: Send) -> None:
    body = json.dumps(error.body_for(path)).encode()
    headers = {"content-type": "application/json", "connection": "close", **error.headers}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()]
            + [(b"content-length", str(len(body)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": body})
