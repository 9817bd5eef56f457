"""A server in a thread of the test's process, on a free port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from gemloupe.serving.app import make_app
from gemloupe.serving.command import Options, make_service


@contextmanager
def running(source: str = "demo:edge", options: Options | None = None) -> Iterator[Server]:
    """Serves inside the block."""
    service = make_service(source, options or Options())
    app = make_app(service, drain=5.0)
    config = uvicorn.Config(app, port=0, log_level="error", http="h11", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Server(service, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Server:
    """The service behind an address."""

    def __init__(self, service: Any, url: str) -> None:
        self.service = service
        self.url = url

    @property
    def model(self) -> Any:
        return self.service.registry.models[0].model

    @property
    def scheduler(self) -> Any:
        return self.service.registry.models[0].scheduler


def endless(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Fields of a request whose answer is "a" over and over, up to its last token."""
    logits = [0.0] * vocab_size
    logits[tokenizer.encode("a", bos=False)[0]] = 1.0
    return {"edit": {"logits": {"do": "set", "value": logits}}, "temperature": 0}


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Returns when `condition()` is true; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)
