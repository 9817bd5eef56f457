"""What is wrong with a request, as clients of OpenAI's API read it."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer other than 200. `param` names the field of the request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                 429: "rate_limit_error"}  # fmt: skip
        kind = kinds.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        inner = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": inner}

    def body_for(self, path: str) -> dict[str, Any]:
        """The body in the form of the route's API: Ollama's has a text alone."""
        return {"error": str(self)} if path.startswith("/api/") else self.body


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about an exception; nothing of what is nobody's business."""
    if isinstance(error, ApiError):
        return error
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    message = " ".join(str(text).split())
    if isinstance(error, (ValueError, TypeError, KeyError)):
        return ApiError(400, message)
    if isinstance(error, MemoryError):
        return ApiError(503, message or "out of memory", code="out_of_memory", retry_after=10)
    if isinstance(error, ImportError):
        return ApiError(501, message)
    return ApiError(500, "internal error; the server's log says more")
