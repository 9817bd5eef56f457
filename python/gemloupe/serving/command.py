"""`gemloupe serve`: loads models and runs the application under uvicorn."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemloupe.errors import missing_extra, quoted
from gemloupe.serving.limits import Access, Limits

_SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class Options:
    """What `gemloupe serve` is told."""

    host: str = "127.0.0.1"
    port: int = 11434
    name: str | None = None
    """What clients call the first model; None: its source."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names -> checkpoints; those of other checkpoints are loaded too."""
    load: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `gl.load`."""
    adapters: Mapping[str, float] = field(default_factory=dict)
    """Adapters of the first model: path -> scale. Requests name those that they run under."""
    mmproj: str | None = "auto"
    """The towers of the first model, where it is a GGUF file; see `gl.load`."""
    drafter: str | None = None
    """A checkpoint that guesses tokens of the first model, or "prompt-lookup"."""
    limits: Limits = Limits()
    access: Access = Access()
    drain: float = 30.0
    """Seconds that running requests have after Ctrl-C."""


def serve(source: str, options: Options) -> None:
    """Serves until Ctrl-C. ImportError, naming the extra, without FastAPI or uvicorn.

    ValueError for an address that others reach, without a key, and for other wrong options;
    OSError where nothing can listen there. Both come before a model is loaded.
    """
    config_class, server_class = _uvicorn()
    _check_key(options)
    _check_folder(options)
    _check_address(options)
    service = make_service(source, options)
    from gemloupe.serving.app import make_app

    # The engine's thread waits this long for the one that writes answers, at every step.
    sys.setswitchinterval(_SWITCH_SECONDS)
    logging.getLogger("gemloupe.serve").setLevel(logging.INFO)
    config = config_class(
        make_app(service, options.drain),
        host=options.host,
        port=options.port,
        log_level="info",
        access_log=False,
        server_header=False,
        limit_concurrency=options.limits.max_queue + options.limits.max_rows + 256,
        timeout_graceful_shutdown=int(options.drain) + 1,
        # The parser that bounds headers; "auto" takes httptools where that is installed.
        http="h11",
        h11_max_incomplete_event_size=64 << 10,
        ws="none",
    )
    if options.access.page:
        print(f"A chat for browsers: {_address(options)}", file=sys.stderr)
    server_class(config).run()


def make_service(source: str, options: Options) -> Any:
    """Loads the models and starts their engines; see `Options`."""
    _uvicorn()
    from gemloupe.model import load
    from gemloupe.serving.registry import Registry, Served
    from gemloupe.serving.scheduler import Scheduler
    from gemloupe.serving.service import Service

    served: dict[str, Served] = {}
    for each in [source, *options.aliases.values()]:
        if each not in served:
            mmproj = options.mmproj if each == source else "auto"
            model = load(each, mmproj=mmproj, **options.load)
            for path, scale in options.adapters.items() if each == source else ():
                model.load_adapter(path, scale=scale)
            model.tokenizer.raw_text_warned = True
            # A path is nobody's business.
            name = Path(each).name if Path(each).exists() else each
            name = options.name if each == source and options.name else name
            drafter = None
            if each == source and options.drafter is not None:
                drafter = model.drafter(options.drafter)
            served[each] = Served(name, model, Scheduler(model, options.limits), drafter)
    aliases = {tag: served[checkpoint] for tag, checkpoint in options.aliases.items()}
    return Service(Registry(list(served.values()), aliases), options.limits, options.access)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(options: Options) -> str:
    """Where a browser on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    return f"http://[{host}]:{options.port}/" if ":" in host else f"http://{host}:{options.port}/"


def _check_key(options: Options) -> None:
    """ValueError where others reach the server and nothing says who may."""
    access = options.access
    if not is_loopback(options.host) and access.api_key is None and not access.anybody:
        raise ValueError(
            f"the server would listen on {quoted(options.host)} without a key, for whoever reaches "
            "this machine; expected --api-key or GEMLOUPE_API_KEY, or --no-api-key to let anybody "
            "use it"
        )
    key = access.api_key or ""
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise ValueError(
            "the API key has characters that no client can send in a header; expected printable "
            "ASCII, without a space before or after it"
        )


def _check_folder(options: Options) -> None:
    folder = options.access.adapter_folder
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--adapter-dir is {quoted(str(folder))}; expected a folder")


def _check_address(options: Options) -> None:
    host, port = options.host, options.port
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; expected 1 to 65535, or 0 for any that is free")
    problem: OSError | None = None
    bound = False
    try:
        every = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        every, problem = [], error
    for family, kind, protocol, _name, address in every:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind(address)
                bound = True
        except OSError as error:
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
    # One of a name's addresses may be of a protocol that this machine lacks.
    if problem is not None and (not bound or problem.errno == errno.EADDRINUSE):
        raise OSError(
            f"the server can't listen on {quoted(host)}, port {port}: {problem.strerror}; expected "
            "an address of this machine and a port that nobody uses (--host, --port)"
        )


def _uvicorn() -> tuple[Any, Any]:
    for module in ("fastapi", "uvicorn"):
        try:
            __import__(module)
        except ImportError:
            raise missing_extra(module, "gemloupe serve", "serve") from None
    import uvicorn

    return uvicorn.Config, uvicorn.Server
