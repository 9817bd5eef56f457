"""What edits of a call leave in the provenance of its cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from gemloupe import capturing
from gemloupe.cache import KvCache
from gemloupe.media import tower_hooks


def note(cache: KvCache, request: capturing.Request) -> None:
    """Notes the edits under which a cache's next entries are computed, in front of the pass."""
    for point, edit in request.edits:
        cache.note("edit", f"{point.name}: {edit.kind}")


def note_towers(cache: KvCache, request: tower_hooks.TowerRequest) -> None:
    """Notes the edits in the towers from which the next entries' soft tokens come."""
    for edited in request.edited:
        cache.note("edit", edited)


@contextmanager
def forgotten_on_error(caches: Iterable[KvCache | None]) -> Iterator[None]:
    """Takes back what is noted in the caches inside, if that raises."""
    before = [(cache, cache.provenance) for cache in caches if cache is not None]
    try:
        yield
    except BaseException:
        for cache, notes in before:
            cache.forget(notes)
        raise
