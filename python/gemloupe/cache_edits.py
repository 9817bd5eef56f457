"""What edits of a call leave in the provenance of its cache."""

from __future__ import annotations

from gemloupe import capturing
from gemloupe.cache import KvCache


def note(cache: KvCache, request: capturing.Request) -> None:
    """Notes the edits under which a cache's next entries are computed, in front of the pass."""
    for point, edit in request.edits:
        cache.note("edit", f"{point.name}: {edit.kind}")
