"""The web page: a chat in the browser, made of the files in `page/` alone."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from gemloupe.serving.failure import ApiError

_FOLDER = Path(__file__).parent / "page"
_PREFIX = "/page/"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline; and no text can become markup by mistake.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; media-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}


def is_page(path: str) -> bool:
    """Whether a request's path is of the page: `/` and its files."""
    return path == "/" or path.startswith(_PREFIX)


def routes(shown: bool) -> APIRouter:
    """`/`, a page for browsers and a line for other clients; with `shown` false a line for all."""
    router = APIRouter()
    files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _KINDS}

    @router.api_route("/", methods=["GET", "HEAD"])
    async def root(request: Request) -> Response:
        if shown and "text/html" in request.headers.get("accept", ""):
            return _file("index.html")
        return PlainTextResponse("gemloupe is running", headers={"Vary": "Accept"})

    @router.api_route(_PREFIX + "{name}", methods=["GET", "HEAD"])
    async def file(name: str) -> Response:
        if not shown or name not in files or name == "index.html":
            raise ApiError(404, "the page has no such file")
        return _file(name)

    def _file(name: str) -> Response:
        headers = {**_HEADERS, "Content-Type": _KINDS[Path(name).suffix], "Vary": "Accept"}
        return Response(files[name], headers=headers)

    return router
