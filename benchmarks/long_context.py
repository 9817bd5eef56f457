"""Prefill, decoding and KV bytes of one model in short and long contexts.

    python benchmarks/long_context.py MODEL [--context 512 4096 32768 131072] [--kv-dtype int8]

MODEL is anything that gemloupe.load takes: a packed folder, a GGUF file, a checkpoint. Prompts are
random ids. Contexts of up to --prefill tokens are really read; the cache of a longer one is filled
with normally distributed keys and values instead, which decoding reads at the same speed, and its
prefill is the rate of the last --rows tokens only, on top of the filled ones. Such lines say
"filled". Beside each decoding time stands the one that its bytes would take at the read bandwidth
measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workers import markdown, progress, random_ids

import gemloupe as gl
from gemloupe import _core, bench, sizes

DEFAULT_CONTEXTS = [512, 4096, 32768]


@dataclass(frozen=True)
class Line:
    """What one context measured, and what the configuration says about it."""

    context: int
    """Tokens at the end, the decoded ones included."""
    filled: int
    """Of its positions, those that hold random values."""
    prefill_tokens: int
    prefill_seconds: float
    decode_seconds: float
    """Of one token, the median."""
    kv_held: int
    kv_expected: int
    weights_read: float
    """Bytes of one decoded token; so are these of keys and values."""
    kv_read: float
    bandwidth: float

    @property
    def predicted_seconds(self) -> float:
        """Of one decoded token, if reading were all."""
        return (self.weights_read + self.kv_read) / self.bandwidth

    @property
    def share(self) -> float:
        """Of the bandwidth that decoding reaches."""
        return self.predicted_seconds / self.decode_seconds


def split(context: int, prefill: int, rows: int) -> tuple[int, int]:
    """Returns (positions to fill with random values, tokens to read) of so many positions."""
    if context <= prefill:
        return 0, context
    tokens = min(rows, prefill)
    return context - tokens, tokens


def bytes_read(model: gl.Model, context: int) -> tuple[float, float]:
    """Returns bytes of (weights, keys and values) that a token reads after `context` tokens."""
    kv = bench.kv_bytes_read(model.config.text, context + 1, model.kv_dtype)
    return bench.bytes_per_token(model, bench.Case("tg", 1, context)) - kv, float(kv)


def read(model: gl.Model, cache: _core.KvCache, ids: Sequence[int]) -> float:
    """Appends ids to the cache and draws one token; returns the seconds."""
    session = _core.Session(model.core, _core.DEFAULT_CHUNK)
    request = model.new_request()
    request.cache, request.ids, request.max_new_tokens = cache, list(ids), 1
    request.sampling.temperature = 0.0
    session.submit(request)
    begin = time.perf_counter()
    while session.active:
        session.step()
    return time.perf_counter() - begin


def measure(model: gl.Model, context: int, arguments: argparse.Namespace, bandwidth: float) -> Line:
    text = model.config.text
    before = context - arguments.new - 1
    filled, tokens = split(before, arguments.prefill, arguments.rows)
    ids = random_ids(context, text.vocab_size, [arguments.seed])
    cache = model.new_cache(max_tokens=context).core
    if filled:
        cache.append_random(ids[:filled], arguments.seed)
    prefill = read(model, cache, ids[filled:before])
    # The first one after a prefill is slower: caches hold the prefill's data.
    samples = [read(model, cache, [one]) for one in ids[before:]][1:]
    held = cache.nbytes
    weights, kv = bytes_read(model, context - arguments.new // 2 - 1)
    return Line(
        context=context,
        filled=filled,
        prefill_tokens=tokens,
        prefill_seconds=prefill,
        decode_seconds=bench.Spread.of(samples).median,
        kv_held=held,
        kv_expected=sizes.kv_allocated(text, context, model.kv_dtype, _core.DEFAULT_CHUNK),
        weights_read=weights,
        kv_read=kv,
        bandwidth=bandwidth,
    )


def report_text(report: dict[str, Any], lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        rows.append(
            [
                f"{line.context}",
                f"{line.prefill_tokens}" + (f" after {line.filled} filled" if line.filled else ""),
                f"{line.prefill_tokens / line.prefill_seconds:.1f}",
                f"{line.kv_held / 2**20:.1f}",
                f"{line.kv_expected / 2**20:.1f}",
                f"{line.weights_read / 1e6:.1f} + {line.kv_read / 1e6:.1f}",
                f"{1e3 * line.predicted_seconds:.2f}",
                f"{1e3 * line.decode_seconds:.2f}",
                f"{100 * line.share:.0f} %",
            ]
        )
    head = ["context", "read", "prefill, tok/s", "KV held, MiB", "expected at most, MiB"]
    head += ["MB a token, weights + KV", "ms at the bandwidth", "ms measured", "share"]
    return "\n".join(
        [
            f"### Contexts of {report['model']}, KV {report['kv_dtype']}",
            "",
            f"- {report['cpu']}, {report['threads']} threads, ISA {report['isa']}, gemloupe "
            f"{report['gemloupe']} at commit {report['commit'] or '-'}, {report['date']}",
            f"- read bandwidth {report['bandwidth'] / 1e9:.2f} GB/s in this run",
            "- filled: positions that hold random keys and values, which no prefill computed",
            "",
            markdown(head, rows),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="speed and KV bytes by context")
    parser.add_argument("model", help="what gemloupe.load takes")
    parser.add_argument("--context", type=int, nargs="+", default=DEFAULT_CONTEXTS, metavar="N")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--prefill", type=int, default=4096, metavar="N", help="longest read whole")
    parser.add_argument("--rows", type=int, default=512, metavar="N", help="read after a fill")
    parser.add_argument("--new", type=int, default=8, metavar="N", help="tokens timed")
    parser.add_argument("--threads", type=int, default=_core.available_cpus(), metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args(argv)
    for name in ("prefill", "rows", "new", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; expected 1 or more")
    least = arguments.new + 2
    if min(arguments.context) < least:
        parser.error(
            f"--context has {min(arguments.context)}; expected --new + 2 = {least} or more"
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    model = gl.load(
        arguments.model,
        dtype=arguments.dtype,
        kv_dtype=arguments.kv_dtype,
        threads=arguments.threads,
    )
    bandwidth = bench.read_bandwidth(arguments.threads)
    read(model, model.new_cache(max_tokens=64).core, [1] * 8)  # touches the mapped pages
    lines = []
    for context in sorted(arguments.context):
        progress(f"context {context}")
        lines.append(measure(model, context, arguments, bandwidth))
    report = {
        **bench.environment(arguments.threads),
        "model": arguments.model,
        "kv_dtype": model.kv_dtype,
        "bandwidth": bandwidth,
    }
    print(report_text(report, lines))
    if arguments.json:
        figures = [
            {**asdict(line), "predicted_seconds": line.predicted_seconds, "share": line.share}
            for line in lines
        ]
        arguments.json.write_text(json.dumps({**report, "contexts": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(f"long_context: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
