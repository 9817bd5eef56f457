"""Filled KV caches on disk: found by what they were computed from, the oldest thrown away."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemloupe import _core
from gemloupe.cache import KvCache
from gemloupe.errors import format_bytes
from gemloupe.media import Content

if TYPE_CHECKING:
    from gemloupe.model import Model

MAX_BYTES = 8 << 30
"""Of all caches together."""
_SUFFIX = ".safetensors"
# Files under another name are being written; older ones were left behind.
_ABANDONED_SECONDS = 3600.0


def folder() -> Path:
    """Where caches are kept: $XDG_CACHE_HOME/gemloupe/packs, or that of ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "gemloupe" / "packs"


def key(model: Model, ids: np.ndarray, images: Sequence[Content]) -> str:
    """A hash of all that decides a cache's bits: version, weights, settings, ids and images.

    Weights are known by their files' paths, sizes and times of change.
    """
    facts = {
        "gemloupe": _core.__version__,
        "isa": _core.isa(),
        "model": model.fingerprint,
        "files": [_file_facts(path) for path in model.checkpoint.files],
        "settings": model.settings,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(ids.astype("<i4").tobytes())
    for image in images:
        pixels = image.source.pixels
        digest.update(repr(pixels.shape).encode() + pixels.tobytes())
    return digest.hexdigest()


def _file_facts(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    at = os.stat(path)
    return os.path.realpath(path), at.st_size, at.st_mtime_ns


class Shelf:
    """The caches of a user, `max_bytes` of them."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"max_cache_bytes is {max_bytes!r}; expected a number of bytes")
        self._max_bytes = max_bytes
        self._folder = folder()

    def take(self, name: str, model: Model, ids: np.ndarray) -> KvCache | None:
        """The cache of this name; None where there is none that fits."""
        path = self._folder / (name + _SUFFIX)
        if not path.is_file():
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                cache = KvCache.load(path, model)
        except (ValueError, OSError, UserWarning):
            return None  # It is written anew.
        if not np.array_equal(cache.tokens, ids) or cache.provenance:
            return None
        with contextlib.suppress(OSError):  # Of a read-only folder it serves too.
            os.utime(path)
        return cache

    def put(self, name: str, cache: KvCache) -> None:
        """Keeps a cache; a UserWarning says why it can't be kept."""
        if cache.nbytes > self._max_bytes:
            warnings.warn(
                f"the documents' cache has {format_bytes(cache.nbytes)} and is not kept on disk; "
                f"expected at most {format_bytes(self._max_bytes)} (max_cache_bytes)",
                stacklevel=4,
            )
            return
        try:
            # Others must not read what documents say.
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            self._make_room(cache.nbytes)
            cache.save(self._folder / (name + _SUFFIX))
        except OSError as error:
            warnings.warn(
                f"the documents' cache is not kept on disk: {error}; keep=False keeps none",
                stacklevel=4,
            )

    def _make_room(self, needed: int) -> None:
        entries = []
        for path in self._folder.iterdir():
            at = path.stat()
            if path.suffix == _SUFFIX:
                entries.append((at.st_mtime, at.st_size, path))
            elif time.time() - at.st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        total = needed + sum(size for _time, size, _path in entries)
        for _time, size, path in sorted(entries):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
