"""Many requests on one model: one thread drives the engine and changes its rows at every step.

A row waits in a queue, is admitted when there is room among the rows and memory for its keys and
values, and leaves with its last token, when it is cancelled, or when it fails; the others go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemloupe import _core, sizes
from gemloupe.errors import format_bytes
from gemloupe.generation import Generation, Row
from gemloupe.output import Output
from gemloupe.prefix_cache import PrefixStats
from gemloupe.serving.failure import ApiError
from gemloupe.serving.limits import Limits
from gemloupe.stream import Piece

_log = logging.getLogger("gemloupe.serve")
_MOST_PREFIX_BYTES = 4 << 30


@dataclass(frozen=True)
class Ended:
    """A row has ended; nothing follows."""

    output: Output


Event = Piece | Ended | Exception
"""What happens to a row: pieces, then `Ended` or an exception."""


@dataclass(eq=False)
class Ticket:
    """One row on its way through the engine."""

    row: Row
    deliver: Callable[[Event], None] = field(repr=False)
    """Called in the engine's thread, which it must not hold up."""
    kv_bytes: int
    queued: float = field(default_factory=time.monotonic)
    cancelled: bool = False


@dataclass
class Counts:
    """What a scheduler has done since it began."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    ended: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    waiting_seconds: float = 0.0
    """Of all admitted rows, from submission to admission."""


class Scheduler:
    """Owns one session of a model. `submit` and `cancel` may be called from any thread."""

    def __init__(self, model: Any, limits: Limits) -> None:
        self.model = model
        self.limits = limits
        self.counts = Counts()
        budget = limits.kv_bytes
        self.kv_budget = _core.available_memory() // 2 if budget is None else budget
        prefix_bytes = limits.prefix_bytes
        if prefix_bytes is None:
            prefix_bytes = min(_core.available_memory() // 10, _MOST_PREFIX_BYTES)
        self.prefixes = model.prefix_cache(prefix_bytes) if prefix_bytes else None
        """What prompts begin with, or None."""
        self._generation = Generation(model)
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._next = 0
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="gemloupe-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def kv_bytes(self) -> int:
        """Memory set aside for the keys and values of the admitted rows."""
        return sum(ticket.kv_bytes for ticket in [*self._running.values()])

    @property
    def prefix_stats(self) -> PrefixStats:
        """What the prefix cache has done; zeros without one."""
        return PrefixStats() if self.prefixes is None else self.prefixes.stats

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, rows: Sequence[Row], deliver: Callable[[int, Event], None]) -> list[Ticket]:
        """Queues the rows of one request, all or none; `deliver` gets each one's index.

        ApiError: 400 for a row that could never be admitted, 429 where the queue is full, 503
        while the server stops.
        """
        tickets = [
            Ticket(row, _delivery(deliver, index), self._needed(row))
            for index, row in enumerate(rows)
        ]
        with self._changed:
            if self._closing:
                raise ApiError(503, "the server is stopping", retry_after=5)
            # Rows that can run at once need no place in the queue.
            free = max(0, self.limits.max_rows - len(self._running) - len(self._waiting))
            if len(self._waiting) + len(tickets) - free > self.limits.max_queue:
                self.counts.refused += len(tickets)
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests are waiting already; try again later",
                    code="queue_full",
                    retry_after=self._wait_estimate(),
                )
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Ends these rows before the next step; those that have ended stay as they are."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Takes nothing new, lets what there is end for `timeout` seconds, then cancels it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                for ticket in [*self._waiting, *self._running.values()]:
                    ticket.cancelled = True
                self._changed.notify()
            self._thread.join()
        if self.prefixes is not None:
            self.prefixes.clear()

    def _needed(self, row: Row) -> int:
        text = self.model.config.text
        limit = text.max_position_embeddings
        prompt = len(row.prompt)
        most = limit if self.limits.max_prompt is None else min(self.limits.max_prompt, limit)
        if prompt > most:
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens; expected at most {most}",
                code="context_length_exceeded",
            )
        context = min(limit, prompt + row.options.max_new_tokens)
        kv_dtype = self.model.kv_dtype
        needed = sizes.kv_allocated(text, context, kv_dtype, _core.DEFAULT_CHUNK)
        if needed > self.kv_budget:
            raise ApiError(
                400,
                f"{context} tokens need {format_bytes(needed)} for keys and values; this server "
                f"has {format_bytes(self.kv_budget)}: ask for fewer tokens",
                code="context_length_exceeded",
            )
        return needed

    def _wait_estimate(self) -> int:
        done = max(1, self.counts.ended)
        each = self.counts.busy_seconds / done
        return max(1, min(120, round(each * len(self._waiting))))

    # The engine's thread.

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
                if self._closing and not self._waiting and not self._running:
                    return
            try:
                self._drop_cancelled()
                self._admit()
                if self._running:
                    self._step()
            except Exception as error:
                _log.exception("the engine's thread can't go on")
                self._give_up(error)
                return

    def _give_up(self, error: Exception) -> None:
        """A mistake of our own: nobody is to wait for ever."""
        with self._changed:
            self._closing = True
            tickets = [*self._waiting, *self._running.values()]
            self._waiting.clear()
            self._running.clear()
        for ticket in tickets:
            self._fail(ticket, error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in dropped:
                self._waiting.remove(ticket)
        for index in [index for index, ticket in self._running.items() if ticket.cancelled]:
            dropped.append(self._running.pop(index))
            self._generation.remove(index)
        for ticket in dropped:
            self.counts.cancelled += 1
            _close_guide(ticket)
            ticket.deliver(ApiError(503, "the request was cancelled", code="cancelled"))

    def _admit(self) -> None:
        """First come, first served: a row that waits for memory is not overtaken for ever."""
        while len(self._running) < self.limits.max_rows:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting[0]
                if self._running and self.kv_bytes + ticket.kv_bytes > self.kv_budget:
                    return
                self._waiting.popleft()
            index, self._next = self._next, self._next + 1
            try:
                self._generation.add(index, ticket.row)
            except Exception as error:
                self._fail(ticket, error)
                continue
            self.counts.waiting_seconds += time.monotonic() - ticket.queued
            self.counts.prompt_tokens += len(ticket.row.prompt)
            self._running[index] = ticket

    def _step(self) -> None:
        began = time.monotonic()
        try:
            pieces = self._generation.step()
        except Exception as error:
            # It can't be told whose it is; without the newest row what worked before works again.
            _log.exception("a step failed")
            self._end(max(self._running), error)
            return
        self.counts.steps += 1
        self.counts.busy_seconds += time.monotonic() - began
        for index, reason in [*self._generation.errors.items()]:
            self._end(index, reason)
        for piece in pieces:
            ticket = self._running.get(piece.row)
            if ticket is None:
                continue
            self.counts.new_tokens += len(piece.ids)
            ticket.deliver(piece)
            if piece.finish_reason:
                self._end(piece.row)

    def _end(self, index: int, error: Exception | None = None) -> None:
        ticket = self._running.pop(index)
        try:
            output = self._generation.remove(index)
        except Exception as problem:
            _log.exception("a row could not be taken out")
            error = error or problem
        if error is not None:
            self._fail(ticket, error)
            return
        self.counts.ended += 1
        ticket.deliver(Ended(output))

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self.counts.failed += 1
        _close_guide(ticket)
        ticket.deliver(error)


def _close_guide(ticket: Ticket) -> None:
    if ticket.row.guide:
        ticket.row.guide.close()


def _delivery(deliver: Callable[[int, Event], None], index: int) -> Callable[[Event], None]:
    def one(event: Event) -> None:
        try:
            deliver(index, event)
        except RuntimeError:  # The client's event loop is gone.
            _log.debug("nobody waits for row %d", index)

    return one
