"""A progress bar on a terminal."""

from __future__ import annotations

import sys
from typing import Any


class ProgressBar:
    """Shows the fraction of a long piece of work; silent where stderr is no terminal.

    With `counted`, a noun, it shows how many were done, of `total` or of an unknown number.
    """

    def __init__(
        self,
        text: str,
        *,
        shown: bool = True,
        counted: str | None = None,
        total: int | None = None,
    ) -> None:
        self._bar: Any = None
        if shown and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            of, unit = (100, "%") if counted is None else (total, f" {counted}")
            self._bar = tqdm(total=of, desc=text, unit=unit, leave=False)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, fraction: float) -> None:
        if self._bar is not None:
            self._bar.update(int(100 * fraction) - self._bar.n)

    def count(self, done: int, note: str = "") -> None:
        """How many are done, with something to be said beside it."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
