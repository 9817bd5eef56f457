"""`gemloupe serve`: loads models and runs the application under uvicorn."""

from __future__ import annotations

import ipaddress
import logging
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

    ValueError for an address that others reach, without a key.
    """
    config_class, server_class = _uvicorn()
    _check_key(options)
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


def _uvicorn() -> tuple[Any, Any]:
    for module in ("fastapi", "uvicorn"):
        try:
            __import__(module)
        except ImportError:
            raise missing_extra(module, "gemloupe serve", "serve") from None
    import uvicorn

    return uvicorn.Config, uvicorn.Server
