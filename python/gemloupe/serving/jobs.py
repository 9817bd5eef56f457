"""The rows of one request, awaited in its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from gemloupe.generation import Row
from gemloupe.output import Output
from gemloupe.serving.scheduler import Ended, Event, Scheduler
from gemloupe.stream import Piece


class Job:
    """Made inside the event loop that awaits it. ApiError as `Scheduler.submit`."""

    def __init__(self, scheduler: Scheduler, rows: Sequence[Row]) -> None:
        self._scheduler = scheduler
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self._left = len(rows)
        self._tickets = scheduler.submit(rows, deliver)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Ended]]:
        """(index, what happened), until all rows have ended; raises the first exception."""
        try:
            while self._left:
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Ended):
                    self._left -= 1
                yield index, event
        finally:
            self.cancel()

    async def outputs(self) -> list[Output]:
        """All outputs, in order."""
        outputs: dict[int, Output] = {}
        async for index, event in self.events():
            if isinstance(event, Ended):
                outputs[index] = event.output
        return [outputs[index] for index in sorted(outputs)]

    def cancel(self) -> None:
        self._scheduler.cancel(self._tickets)
