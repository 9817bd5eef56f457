"""Processes of serve_engine.py, rounds that alternate between them, and Markdown tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from gemloupe.bench import Spread

_T = TypeVar("_T")
HERE = Path(__file__).resolve().parent
FIRST_ID = 300  # Below are control tokens.
# CPUs that others may keep busy during a measurement, and how often it is made at most.
DISTURBED, MOST_TRIES = 0.1, 2


class Worker:
    """One engine's process. RuntimeError, naming the engine, for whatever fails in it."""

    script = "serve_engine.py"

    def __init__(
        self, name: str, python: str, load: dict[str, Any], env: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self._env = env
        self._python = python
        self._load = load
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None
        self.about: dict[str, Any] = {}

    @property
    def is_loaded(self) -> bool:
        return self._process is not None

    def load(self) -> float:
        """Starts the process and loads the model; returns the seconds of loading."""
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [self._python, str(HERE / self.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(self._env or {})},
        )
        self.about = self.ask("load", **self._load)
        return float(self.about.pop("seconds"))

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            self._process = None
            raise RuntimeError(
                f"{self.name}: the process ended with {code} during {op}{self._last_words()}"
            )
        result = json.loads(line)
        if "error" in result:
            raise RuntimeError(f"{self.name}: {op} failed: {result['error']}")
        return result

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        found = [line.strip() for line in lines if line.strip()]
        return f": {found[-1]}" if found else ""

    def prefill(self, ids: Sequence[int]) -> float:
        return float(self.ask("prefill", ids=list(ids))["seconds"])

    def decode(self, ids: Sequence[int]) -> list[float]:
        return list(self.ask("decode", ids=list(ids))["seconds"])

    def peak_rss(self) -> int:
        return int(self.ask("memory")["VmHWM"])

    def cpu_seconds(self) -> float:
        """CPU time of the process so far, all its threads together."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process and waits until its memory is free."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def busy_seconds() -> float:
    """CPU time that all processes, the kernel and other virtual machines have taken so far."""
    values = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(values) - values[3] - values[4]) / os.sysconf("SC_CLK_TCK")


def undisturbed(worker: Worker, measure: Callable[[], _T]) -> tuple[_T, float]:
    """Measures again, MOST_TRIES times in all, while others keep more than DISTURBED CPUs busy.

    Returns the last result, and how many CPUs others kept busy during it.
    """
    for _ in range(MOST_TRIES):
        begin, busy, own = time.perf_counter(), busy_seconds(), worker.cpu_seconds()
        result = measure()
        others = busy_seconds() - busy - (worker.cpu_seconds() - own)
        others = max(0.0, others / (time.perf_counter() - begin))
        if others <= DISTURBED:
            break
    return result, others


def random_ids(count: int, vocab: int, seed: Sequence[int]) -> list[int]:
    """The same ids for every engine."""
    first = min(FIRST_ID, vocab // 2)
    return np.random.default_rng(list(seed)).integers(first, vocab, count).tolist()


def in_turns(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: every second one backwards, so that nobody always runs last."""
    return list(names) if number % 2 == 0 else list(names)[::-1]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column left and the others right."""
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), marks, *map(list, rows)])


def cell(samples: Sequence[float], digits: int = 2) -> str:
    return Spread.of(samples).text(digits) if samples else "-"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Ratio of the medians; None where one was not measured."""
    if not ours or not theirs:
        return None
    return Spread.of(ours).median / Spread.of(theirs).median


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
