"""`gemloupe bench`: tokens a second of prefill (pp) and decoding (tg), as in llama-bench.

Prompts are random ids, so that no tokenizer is needed; decoding is greedy and goes on whatever is
chosen. `pp512 d4096 x2` reads two prompts of 512 tokens, each after 4096 that are in the cache.
"""

from __future__ import annotations

import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemloupe import _core, recipe, sizes
from gemloupe.config import TextConfig
from gemloupe.model import Model, load

_FIRST_ID = 300  # Below are control tokens.


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    kind: str
    """"pp" (prefill) or "tg" (decoding)."""
    tokens: int
    """Of each row: of its prompt, or decoded."""
    depth: int = 0
    """Tokens that are in each row's cache before."""
    batch: int = 1

    @property
    def name(self) -> str:
        depth = f" d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.tokens}{depth}" + (f" x{self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of several measurements."""

    median: float
    least: float
    greatest: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """ValueError without samples."""
        if not samples:
            raise ValueError("no samples; expected at least one measurement")
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def text(self, digits: int = 2) -> str:
        """ "12.30 (12.10–12.60)", or only the median of one sample."""
        text = f"{self.median:.{digits}f}"
        if self.count == 1:
            return text
        return f"{text} ({self.least:.{digits}f}–{self.greatest:.{digits}f})"


def cases(
    prompts: Sequence[int], decoded: Sequence[int], depths: Sequence[int], batches: Sequence[int]
) -> list[Case]:
    """All combinations, prefill first; 0 tokens leave a kind out. ValueError for none at all."""
    for name, values, least in (
        ("-p", prompts, 0), ("-n", decoded, 0), ("-d", depths, 0), ("-b", batches, 1),
    ):  # fmt: skip
        for value in values:
            if value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")
    chosen = [
        Case(kind, tokens, depth, batch)
        for depth in depths
        for batch in batches
        for kind, lengths in (("pp", prompts), ("tg", decoded))
        for tokens in lengths
        if tokens
    ]
    if not chosen:
        raise ValueError("-p and -n are 0; expected something to measure, such as -p 512 -n 128")
    return chosen


class Runner:
    """Runs cases on a loaded model. The cache of a depth is filled once and forked for each run."""

    def __init__(self, model: Model, seed: int = 0, chunk: int = _core.DEFAULT_CHUNK) -> None:
        self.model = model
        self._chunk = chunk
        self._random = np.random.default_rng(seed)
        self._caches: dict[int, _core.KvCache] = {}

    def seconds(self, case: Case) -> float:
        """Runs a case once and returns the seconds of what it measures.

        ValueError or MemoryError where the context is longer than the model's, or does not fit.
        """
        limit = self.model.config.text.max_position_embeddings
        if case.depth + case.tokens + 1 > limit:
            raise ValueError(
                f"{case.name} needs a context of {case.depth + case.tokens + 1} tokens; expected "
                f"at most {limit}, the model's max_position_embeddings"
            )
        base = self._cache(case.depth)
        session = _core.Session(self.model.core, self._chunk)
        for _ in range(case.batch):
            request = self.model.new_request()
            request.cache = base.fork()
            # Greedy; the first token of a decoding row comes from reading its one id.
            request.ids = self.ids(case.tokens if case.kind == "pp" else 1)
            request.max_new_tokens = 1 if case.kind == "pp" else case.tokens + 1
            request.sampling.temperature = 0.0
            session.submit(request)
        if case.kind == "tg":
            for _ in range(case.batch):
                session.step()
        begin = time.perf_counter()
        while session.active:
            session.step()
        return time.perf_counter() - begin

    def rate(self, case: Case) -> float:
        """Tokens a second of all rows together."""
        return case.batch * case.tokens / self.seconds(case)

    def ids(self, count: int) -> list[int]:
        vocab = self.model.config.text.vocab_size
        return self._random.integers(min(_FIRST_ID, vocab // 2), vocab, count).tolist()

    def _cache(self, depth: int) -> _core.KvCache:
        if depth not in self._caches:
            cache = self.model.new_cache().core
            if depth:
                session = _core.Session(self.model.core, self._chunk)
                request = self.model.new_request()
                request.cache, request.ids, request.max_new_tokens = cache, self.ids(depth), 1
                session.submit(request)
                while session.active:
                    session.step()
            self._caches = {depth: cache}  # One depth at a time: they may be large.
        return self._caches[depth]


def measure(
    model: Model,
    chosen: Sequence[Case],
    repetitions: int = 5,
    seed: int = 0,
    advance: Callable[[Case], object] = lambda case: None,
) -> Iterator[tuple[Case, list[float]]]:
    """Yields each case with its rates in tokens a second, after one run that is not counted."""
    if repetitions < 1:
        raise ValueError(f"-r is {repetitions}; expected 1 or more")
    runner = Runner(model, seed)
    for case in chosen:
        warm = Case(case.kind, min(case.tokens, 8), case.depth, case.batch)
        runner.seconds(warm if case.kind == "tg" else case)
        rates = []
        for _ in range(repetitions):
            advance(case)
            rates.append(runner.rate(case))
        yield case, rates


def weight_bytes_per_pass(
    text: TextConfig, tensors: Iterable[tuple[str, Sequence[int], int]], rows: int = 1
) -> float:
    """Bytes of weights that decoding one token in each of `rows` rows reads.

    `tensors` are (name without prefix, shape, bytes). Of experts those count that the rows are
    expected to use if each chooses at random; the per-layer table, a row at a time, does not.
    """
    total = 0.0
    for name, shape, nbytes in tensors:
        if name == recipe.TABLE:
            continue
        share = 1.0
        if ".experts." in name and len(shape) > 2:
            share = 1.0 - (1.0 - text.top_k_experts / text.num_experts) ** rows
        total += share * nbytes
    return total


def kv_bytes_read(
    text: TextConfig, context: int, kv_dtype: str, *, separate_keys: bool = False
) -> int:
    """Bytes of keys and values that one token reads after `context` tokens, in all layers.

    Where values are keys only the rotated dims of keys are stored, but with `separate_keys`.
    """
    total = 0
    for layer in text.layers:
        keys = layer.head_dim
        if text.layers[layer.kv_source].values_are_keys and not separate_keys:
            keys = min(2 * layer.rotary_pairs, layer.head_dim)
        row = (layer.head_dim + keys) * sizes.KV_BYTES[kv_dtype] + 8 * (kv_dtype == "int8")
        total += min(context, layer.window or context) * layer.num_kv_heads * row
    return total


def bytes_per_token(model: Model, case: Case) -> float:
    """Bytes that a decoded token reads halfway through a "tg" case, its share of each pass."""
    text = model.config.text
    tensors = ((name, info.shape, info.nbytes) for name, info in model.weights.items())
    context = case.depth + case.tokens // 2 + 1
    weights = weight_bytes_per_pass(text, tensors, case.batch) / case.batch
    return weights + kv_bytes_read(text, context, model.kv_dtype)


def peak_rss() -> int:
    """VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM; expected a Linux kernel's")


def read_bandwidth(threads: int) -> float:
    """Bytes a second that all threads together read, measured in another process.

    It reads half a gigabyte and more, which would count as this one's memory.
    """
    code = f"from gemloupe import _core; print(_core.measure_bandwidth({int(threads)}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"the read bandwidth could not be measured: {last}")
    return 1e9 * float(done.stdout)


def commit() -> str:
    """The checkout's commit that this package lies in, marked if its code differs; "" outside."""
    package = Path(__file__).resolve().parent
    root = package.parent.parent
    if not (root / "csrc").is_dir():  # Installed, perhaps inside somebody's repository.
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "python")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def environment(threads: int) -> dict[str, Any]:
    """What a figure needs beside it: machine, instruction set, versions, date."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "cpu": _core.cpu_model(),
        "isa": _core.isa(),
        "threads": threads,
        "gemloupe": _core.__version__,
        "commit": commit(),
        "onednn": _core.onednn_version(),
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def bench(
    source: str,
    chosen: Sequence[Case],
    *,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    threads: int | None = None,
    adapter: Mapping[str, float] | None = None,
    repetitions: int = 5,
    advance: Callable[[Case], object] = lambda case: None,
) -> list[dict[str, Any]]:
    """Loads a model, measures the cases and returns one record each, as `--json` prints them."""
    begin = time.perf_counter()
    model = load(source, dtype, threads=threads, kv_dtype=kv_dtype, adapter=adapter)
    seconds = time.perf_counter() - begin
    common = {
        "model": source,
        "dtype": model.dtype,
        "kv_dtype": model.kv_dtype,
        **environment(model.threads),
        "load_seconds": seconds,
        **({"adapter": dict(adapter)} if adapter else {}),
    }
    bandwidth = read_bandwidth(model.threads)
    measured = list(measure(model, chosen, repetitions, advance=advance))
    bandwidth = max(bandwidth, read_bandwidth(model.threads))
    peak = peak_rss()
    return [record(model, case, rates, common, bandwidth, peak) for case, rates in measured]


def record(
    model: Model,
    case: Case,
    rates: Sequence[float],
    common: dict[str, Any],
    bandwidth: float,
    peak: int,
) -> dict[str, Any]:
    """One line of `--json`: rates in tokens a second, sizes in bytes, times in seconds."""
    spread = Spread.of(rates)
    result = {
        "test": case.name,
        **asdict(case),
        "tokens_per_second": spread.median,
        "least": spread.least,
        "greatest": spread.greatest,
        "samples": list(rates),
        **common,
        "bandwidth": bandwidth,
        "peak_rss": peak,
    }
    if case.kind == "tg":
        size = bytes_per_token(model, case)
        result["bytes_per_token"] = size
        result["share_of_bandwidth"] = spread.median * size / bandwidth
    return result


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as text for a terminal."""
    first = records[0]
    at = f" at {first['commit']}" if first["commit"] else ""
    lines = [
        f"{first['model']}, {first['dtype']}, KV {first['kv_dtype']}, {first['threads']} threads",
        f"{first['cpu']}, {first['isa']}, reads {first['bandwidth'] / 1e9:.1f} GB/s",
        f"gemloupe {first['gemloupe']}{at}, loaded in {first['load_seconds']:.3f} s, "
        f"peak RSS {first['peak_rss'] / 2**30:.2f} GiB",
        "",
        f"{'test':<20}{'tokens/s':>12}{'from':>12}{'to':>12}{'GB/token':>12}{'bandwidth':>12}",
    ]
    for entry in records:
        size = share = "-"
        if "bytes_per_token" in entry:
            size = f"{entry['bytes_per_token'] / 1e9:.3f}"
            share = f"{100 * entry['share_of_bandwidth']:.0f} %"
        rates = (entry["tokens_per_second"], entry["least"], entry["greatest"])
        lines.append(
            f"{entry['test']:<20}"
            + "".join(f"{x:>12.2f}" for x in rates)
            + f"{size:>12}{share:>12}"
        )
    return "\n".join(lines)
