"""Speed and memory of text generation, gemloupe beside transformers, as a Markdown table.

    python benchmarks/text_speed.py CHECKPOINT [--peers transformers] [--prompt 128 512] [--new 32]

Every engine runs in a process of its own, started anew in each round; rounds alternate between the
engines, so that a busy neighbour meets all of them. Prompts are random ids: no tokenizer is needed.
What each column means stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemloupe import __version__, _core, bench, recipe
from gemloupe.checkpoint import Checkpoint, open_checkpoint
from gemloupe.sizes import KV_BYTES, count_parameters, weight_targets

HERE = Path(__file__).resolve().parent
SPARE_BYTES = 2 << 30


@dataclass
class Line:
    """One engine and what its rounds measured."""

    engine: str
    dtype: str
    attention: str = ""
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.engine, self.dtype, self.attention) if part)

    def kv_dtype(self) -> str:
        if self.engine == "gemloupe":
            return "float32" if self.dtype == "float32" else "float16"
        return self.dtype

    def values(self, measure: Callable[[dict[str, Any]], float]) -> list[float]:
        return [measure(result) for result in self.rounds]

    def first_tokens(self, length: int) -> list[float]:
        """Seconds to the first token after a prompt of `length`."""
        return self.values(lambda r: r["first_tokens"][str(length)])

    def decode_rates(self) -> list[float]:
        return self.values(lambda r: len(r["decode_seconds"]) / sum(r["decode_seconds"]))


def bytes_per_token(line: Line, checkpoint: Checkpoint, prompt: int, new: int) -> float:
    """Returns bytes read for one token, halfway through the decoding: weights, keys and values."""
    text, context = checkpoint.config.text, prompt + new // 2
    if line.engine == "gemloupe":
        targets = weight_targets(checkpoint, line.dtype)
        tensors = [
            (name, t.shape, recipe.nbytes(targets.get(name, "float32"), t.shape))
            for name, t in checkpoint.text_tensors.items()
        ]
        weights = bench.weight_bytes_per_pass(text, tensors)
        return weights + bench.kv_bytes_read(text, context, line.kv_dtype())
    weights = count_parameters(checkpoint).active * KV_BYTES[line.dtype]
    return weights + bench.kv_bytes_read(text, context, line.kv_dtype(), separate_keys=True)


def run_worker(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs engine_worker.py to its end; RuntimeError with its last words if it fails."""
    done = subprocess.run(
        [sys.executable, str(HERE / "engine_worker.py"), json.dumps(spec)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{spec['engine']} {spec.get('dtype', '')} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def warm(checkpoint: Checkpoint) -> float:
    """Reads the files once, so that they are in the page cache; returns seconds of a second read.

    MemoryError where they can't all stay there.
    """
    size = sum(path.stat().st_size for path in checkpoint.files)
    if size + SPARE_BYTES > _core.available_memory():
        raise MemoryError(
            f"{checkpoint.folder}: the files have {size / 1e9:.1f} GB and memory has "
            f"{_core.available_memory() / 1e9:.1f} GB free; they would not stay in the page "
            "cache. Measure a smaller model, or one cut by random_checkpoint.py."
        )
    buffer = bytearray(16 << 20)
    for _ in range(2):
        begin = time.perf_counter()
        for path in checkpoint.files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return time.perf_counter() - begin


def busy_cpus(seconds: float = 1.0) -> float:
    """Returns how many CPUs others keep busy, while this process waits."""

    def times() -> tuple[int, int]:
        values = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(values), values[3] + values[4]  # All; idle and waiting for a disk.

    total, idle = times()
    time.sleep(seconds)
    total, idle = times()[0] - total, times()[1] - idle
    return (os.cpu_count() or 1) * (total - idle) / max(total, 1)


def fits(line: Line, checkpoint: Checkpoint) -> str:
    """Returns "" or why a peer is left out: it would swap, or push the files out of memory."""
    if line.engine == "gemloupe":
        return ""
    elements = sum(tensor.info.elements for tensor in checkpoint.tensors.values())
    weights = elements * KV_BYTES[line.dtype]
    # transformers maps weights of the stored type; others are a copy beside the files.
    copied = line.dtype != checkpoint.dtype
    files = sum(path.stat().st_size for path in checkpoint.files) if copied else 0
    available = _core.available_memory()
    if weights + files + SPARE_BYTES <= available:
        return ""
    beside = f" beside {files / 1e9:.1f} GB of files" if copied else ""
    return (
        f"{line.name} was left out: its weights would take {weights / 1e9:.1f} GB{beside}, and "
        f"{available / 1e9:.1f} GB are free"
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Returns the median, with minimum and maximum where there are several."""
    if not values:
        return "-"
    text = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(lines: list[Line], report: dict[str, Any]) -> str:
    """Returns the Markdown table, one row an engine."""
    prompts, bandwidth = report["prompts"], report["bandwidth"]
    head = ["engine", "load, s", "first call, s"]
    for length in prompts:
        head += [f"first token of {length}, s", f"prefill {length}, tok/s"]
    head += ["decode, tok/s", "GB/token", "share of bandwidth", "peak RSS, GB", "RssAnon, GB"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for line in lines:
        cells = [
            line.name,
            spread(line.values(lambda r: r["load_seconds"]), 3),
            spread(line.values(lambda r: r["first_call_seconds"]), 2),
        ]
        for length in prompts:
            seconds = line.first_tokens(length)
            cells.append(spread(seconds, 3))
            cells.append(spread([length / s for s in seconds], 1))
        size = report["bytes_per_token"][line.name]
        share = [100 * rate * size / bandwidth for rate in line.decode_rates()]
        cells += [
            spread(line.decode_rates(), 2),
            f"{size / 1e9:.3f}",
            f"{spread(share, 0)} %" if share else "-",
            f"{max(line.values(lambda r: r['peak_rss'])) / 1e9:.2f}",
            f"{max(line.values(lambda r: r['rss_anon'])) / 1e9:.2f}",
        ]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ratios(lines: list[Line], prompts: Sequence[int]) -> str:
    """Compares gemloupe's first line with the fastest peer, for each figure anew."""
    ours = [line for line in lines if line.engine == "gemloupe"]
    peers = [line for line in lines if line.engine != "gemloupe"]
    if not ours or not peers:
        return ""
    texts = []
    for length in prompts:

        def rate(line: Line, length: int = length) -> float:
            return length / statistics.median(line.first_tokens(length))

        best = max(peers, key=rate)
        texts.append(f"prefill {length} {rate(ours[0]) / rate(best):.1f}x {best.name}")

    def decode(line: Line) -> float:
        return statistics.median(line.decode_rates())

    best = max(peers, key=decode)
    texts.append(f"decode {decode(ours[0]) / decode(best):.1f}x {best.name}")
    return f"{ours[0].name} against the fastest peer: {', '.join(texts)}."


def heading(report: dict[str, Any]) -> str:
    """Says what the table was measured on."""
    busy = spread(report["busy_cpus"], 1)
    return "\n".join(
        [
            f"- model: {report['model']}",
            f"- machine: {report['cpu']}, {report['threads']} threads, ISA {report['isa']}, "
            f"read bandwidth {report['bandwidth'] / 1e9:.1f} GB/s "
            f"({min(report['bandwidths']) / 1e9:.1f}–{max(report['bandwidths']) / 1e9:.1f} between "
            "the rounds)",
            f"- {report['date']}, gemloupe {report['version']} at commit {report['commit']}; "
            f"{report['versions']}",
            f"- load average at the start {report['load_average'][0]:.2f}; CPUs that others kept "
            f"busy before the rounds {busy}",
            f"- decoded {report['new']} tokens (peers {report['peer_new']}) after "
            f"{report['prompts'][0]} of prompt; median (minimum–maximum) of {report['repeat']} "
            f"rounds (peers {report['peer_repeat']})",
            *(f"- {note}" for note in report["notes"]),
        ]
    )


def describe(checkpoint: Checkpoint) -> str:
    text = checkpoint.config.text
    size = sum(path.stat().st_size for path in checkpoint.files)
    return (
        f"{checkpoint.config.architecture}, {text.num_hidden_layers} layers of {text.hidden_size}, "
        f"vocabulary {text.vocab_size:,}, {checkpoint.dtype}, {size / 1e9:.2f} GB on disk"
    )


def choose_lines(arguments: argparse.Namespace) -> list[Line]:
    lines = [Line("gemloupe", dtype) for dtype in arguments.dtype]
    for peer in arguments.peers:
        for dtype in arguments.peer_dtype:
            lines += [Line(peer, dtype, attention) for attention in arguments.attention]
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="speed and memory of text generation")
    parser.add_argument("checkpoint", help="a checkpoint folder")
    parser.add_argument("--peers", nargs="*", choices=["transformers"], default=[])
    parser.add_argument("--dtype", nargs="+", default=["auto", "float32"], help="of gemloupe")
    parser.add_argument("--peer-dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"], help="of transformers")
    parser.add_argument("--prompt", nargs="+", type=int, default=[128, 512], metavar="N")
    parser.add_argument("--new", type=int, default=32, metavar="N", help="decoded tokens")
    parser.add_argument("--peer-new", type=int, metavar="N", help="the same of peers")
    parser.add_argument("--threads", type=int, default=_core.available_cpus())
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds")
    parser.add_argument("--peer-repeat", type=int, metavar="N", help="rounds with the peers")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args(argv)
    arguments.peer_new = arguments.peer_new or arguments.new
    arguments.peer_repeat = min(arguments.repeat, arguments.peer_repeat or arguments.repeat)
    least = min(arguments.new, arguments.peer_new)
    if min(arguments.prompt) < 2 or least < 2 or arguments.repeat < 1 or arguments.threads < 1:
        parser.error("--prompt and --new are at least 2, --repeat and --threads at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    checkpoint = open_checkpoint(arguments.checkpoint)
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    load_average, at_commit = os.getloadavg(), bench.commit() or "unknown"
    seconds = warm(checkpoint)
    notes = [f"the files were in the page cache: a second read took {seconds:.1f} s"]
    lines = choose_lines(arguments)
    for line in list(lines):
        if reason := fits(line, checkpoint):
            notes.append(reason)
            lines.remove(line)
    bandwidths, busy = [], []
    for number in range(arguments.repeat):
        busy.append(busy_cpus())
        measured = run_worker({"engine": "bandwidth", "threads": arguments.threads})
        bandwidths.append(measured["bytes_per_second"])
        # Every second round backwards: nobody always runs after the same neighbour.
        for line in lines if number % 2 == 0 else lines[::-1]:
            is_peer = line.engine != "gemloupe"
            if is_peer and number >= arguments.peer_repeat:
                continue
            print(f"round {number + 1}: {line.name}", file=sys.stderr, flush=True)
            spec = {
                "engine": line.engine,
                "checkpoint": os.fspath(checkpoint.folder),
                "dtype": line.dtype,
                "attention": line.attention,
                "threads": arguments.threads,
                "prompts": arguments.prompt,
                "seed": arguments.seed,
                "new": arguments.peer_new if is_peer else arguments.new,
            }
            line.rounds.append(run_worker(spec))
    versions = {
        name: line.rounds[0][name]
        for line in lines
        for name in ("onednn", "transformers", "torch")
        if name in line.rounds[0]
    }
    report = {
        "model": describe(checkpoint),
        "cpu": _core.cpu_model(),
        "isa": _core.isa(),
        "threads": arguments.threads,
        "date": date,
        "version": __version__,
        "commit": at_commit,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "load_average": load_average,
        "busy_cpus": busy,
        "bandwidths": bandwidths,
        "bandwidth": max(bandwidths),
        "prompts": arguments.prompt,
        "new": arguments.new,
        "peer_new": arguments.peer_new,
        "repeat": arguments.repeat,
        "peer_repeat": arguments.peer_repeat,
        "notes": notes,
        "bytes_per_token": {
            line.name: bytes_per_token(
                line,
                checkpoint,
                arguments.prompt[0],
                arguments.new if line.engine == "gemloupe" else arguments.peer_new,
            )
            for line in lines
        },
    }
    parts = [heading(report), table(lines, report), ratios(lines, arguments.prompt)]
    print("\n\n".join(part for part in parts if part))
    if arguments.json:
        everything = {**report, "lines": [asdict(line) for line in lines]}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError, MemoryError, RuntimeError) as error:
        sys.exit(f"text_speed: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
