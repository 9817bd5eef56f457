"""Counts of a server in Prometheus's text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from gemloupe.serving.registry import Registry

_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Seconds in fixed buckets."""

    def __init__(self) -> None:
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._buckets[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self._buckets, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What the HTTP side counts; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = Histogram()
        self._first = Histogram()

    def request(self, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[route, status] += 1
            self._seconds.add(seconds)

    def first_token(self, seconds: float) -> None:
        with self._lock:
            self._first.add(seconds)

    def text(self, registry: Registry) -> str:
        with self._lock:
            lines = ["# TYPE gemloupe_requests_total counter"]
            for (route, status), count in sorted(self._requests.items()):
                lines.append(
                    f'gemloupe_requests_total{{route="{route}",status="{status}"}} {count}'
                )
            lines += self._seconds.lines("gemloupe_request_seconds")
            lines += self._first.lines("gemloupe_time_to_first_token_seconds")
        for name, kind, of_model in _OF_MODEL:
            lines.append(f"# TYPE gemloupe_{name} {kind}")
            for served in registry.models:
                value = of_model(served.scheduler)
                lines.append(f'gemloupe_{name}{{model="{_label(served.name)}"}} {value}')
        return "\n".join(lines) + "\n"


_OF_MODEL = (
    ("prompt_tokens_total", "counter", lambda s: s.counts.prompt_tokens),
    ("generated_tokens_total", "counter", lambda s: s.counts.new_tokens),
    ("rows_ended_total", "counter", lambda s: s.counts.ended),
    ("rows_cancelled_total", "counter", lambda s: s.counts.cancelled),
    ("rows_failed_total", "counter", lambda s: s.counts.failed),
    ("rows_refused_total", "counter", lambda s: s.counts.refused),
    ("steps_total", "counter", lambda s: s.counts.steps),
    ("busy_seconds_total", "counter", lambda s: round(s.counts.busy_seconds, 6)),
    ("waiting_seconds_total", "counter", lambda s: round(s.counts.waiting_seconds, 6)),
    ("rows_waiting", "gauge", lambda s: s.waiting),
    ("rows_running", "gauge", lambda s: s.running),
    ("kv_bytes", "gauge", lambda s: s.kv_bytes),
    ("kv_bytes_limit", "gauge", lambda s: s.kv_budget),
    ("prefix_lookups_total", "counter", lambda s: s.prefix_stats.lookups),
    ("prefix_hits_total", "counter", lambda s: s.prefix_stats.hits),
    ("prefix_tokens_total", "counter", lambda s: s.prefix_stats.tokens),
    ("prefix_evicted_total", "counter", lambda s: s.prefix_stats.evicted),
    ("prefix_bytes", "gauge", lambda s: 0 if s.prefixes is None else s.prefixes.nbytes),
    ("prefix_bytes_limit", "gauge", lambda s: 0 if s.prefixes is None else s.prefixes.max_bytes),
)


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
