"""Shared set-up: no network, fixed seeds, tiny checkpoints made once per session."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# Before any import of huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

# A runner started in the background ignores SIGINT, and so would the tests of Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets sockets reach this machine only; any other address is an error of the test."""
    import socket

    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: object) -> None:
        is_ip = self.family in (socket.AF_INET, socket.AF_INET6)
        if is_ip and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"tests must not use the network; connect to {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
    monkeypatch.setattr(socket.socket, "connect_ex", connect_locally)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Returns `get(variant, *, style, shards, **make_tiny's) -> (model, folder)`, cached."""
    from tiny_models import make_tiny, save_tiny

    made: dict[tuple, tuple] = {}

    def get(variant: str, *, style: str = "transformers", shards: int = 1, **arguments: object):
        key = (variant, style, shards, repr(sorted(arguments.items())))
        if key not in made:
            model = make_tiny(variant, **arguments)
            folder = tmp_path_factory.mktemp(f"{variant}-{style}")
            made[key] = (model, save_tiny(model, folder, style=style, shards=shards))
        return made[key]

    return get
