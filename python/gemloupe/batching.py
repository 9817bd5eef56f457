"""Generates for any number of jobs on one scheduler, which batches their rows continuously."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from gemloupe.generation import Row
from gemloupe.output import Output
from gemloupe.serving.limits import Limits
from gemloupe.serving.scheduler import Ended, Event, Scheduler, Ticket
from gemloupe.stream import Piece

Key = TypeVar("Key")
MAX_ROWS = 8
# Seconds that the caller's thread waits at most before it looks for Ctrl-C.
_PATIENCE = 0.2


@dataclass(eq=False)
class _Job(Generic[Key]):
    key: Key
    tickets: list[Ticket] = field(default_factory=list)
    outputs: dict[int, Output] = field(default_factory=dict)
    error: Exception | None = None
    left: int = 0


def generate_all(
    model: Any,
    jobs: Iterable[tuple[Key, Callable[[], Sequence[Row]]]],
    *,
    max_rows: int = MAX_ROWS,
    kv_bytes: int | None = None,
    scheduler: Scheduler | None = None,
    advance: Callable[[int], None] | None = None,
) -> Generator[tuple[Key, list[Output] | Exception], None, None]:
    """Gives (key, outputs of its rows) in the order in which jobs end, or why one failed.

    `jobs` are (key, function that makes the job's rows with `make_rows`); they are asked for
    while others run, a few ahead. `max_rows` decode at once; `kv_bytes` bounds their keys and
    values (half of the free memory where None). A `scheduler` (of `new_scheduler`) that is given is
    used instead and stays open. `advance(n)` is called after each n new tokens.
    Closing the iterator, or an exception in the caller, cancels what runs.
    """
    own = scheduler is None
    if scheduler is None:
        scheduler = new_scheduler(model, max_rows, kv_bytes)
    events: queue.Queue[tuple[_Job[Key], int, Event]] = queue.Queue()
    running: set[_Job[Key]] = set()
    source = iter(jobs)
    more = True
    try:
        while more or running:
            # One more than can run, so that the engine never waits for a tokenizer.
            while more and sum(job.left for job in running) <= max_rows:
                key_and_make = next(source, None)
                if key_and_make is None:
                    more = False
                    break
                job = _Job(key_and_make[0])
                try:
                    _begin(job, key_and_make[1](), scheduler, events)
                except Exception as error:
                    yield job.key, error
                    continue
                running.add(job)
            if not running:
                continue
            try:
                job, index, event = events.get(timeout=_PATIENCE)
            except queue.Empty:
                continue
            if isinstance(event, Piece):
                if advance is not None and job in running:
                    advance(len(event.ids))
                continue
            job.left -= 1
            if isinstance(event, Ended):
                job.outputs[index] = event.output
            elif job.error is None:
                job.error = event
                scheduler.cancel(job.tickets)
            if job.left == 0:
                running.discard(job)
                if job.error is not None:
                    yield job.key, job.error
                else:
                    yield job.key, [job.outputs[i] for i in range(len(job.tickets))]
    finally:
        for job in running:
            scheduler.cancel(job.tickets)
        if own:
            scheduler.close()


def new_scheduler(model: Any, max_rows: int = MAX_ROWS, kv_bytes: int | None = None) -> Scheduler:
    """A scheduler for `generate_all`; its owner closes it."""
    return Scheduler(model, Limits(max_rows=max_rows, max_queue=1 << 30, kv_bytes=kv_bytes))


def _begin(
    job: _Job[Key],
    rows: Sequence[Row],
    scheduler: Scheduler,
    events: queue.Queue[tuple[_Job[Key], int, Event]],
) -> None:
    try:
        job.tickets = scheduler.submit(rows, lambda index, event: events.put((job, index, event)))
    except BaseException:
        for row in rows:
            if row.guide:
                row.guide.close()
        raise
    job.left = len(job.tickets)
