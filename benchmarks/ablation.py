"""What each part of gemloupe's speed is worth: one thing switched off at a time.

    python benchmarks/ablation.py MODEL [--prompt 512] [--new 32] [--rounds 5] [--json FILE]

MODEL is what gemloupe.load takes, best a packed int4 folder (random_packed.py). Each line is a
process of its own that stays loaded; each round runs them in another order. Where neighbours are
busy, --cpu-seconds with one thread compares the time that the process had a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from workers import Worker, cell, markdown, progress, random_ids, undisturbed

from gemloupe import _core, bench
from gemloupe.checkpoint import open_checkpoint

_PLAIN = ("float32", "bfloat16", "float16")
_ISAS = ["avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]


@dataclass
class Line:
    """The base, or the base with one difference."""

    name: str
    load: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    prefill: list[float] = field(default_factory=list)  # tokens a second
    decode: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)  # CPUs that others kept busy meanwhile
    peak_rss: int = 0
    huge_pages: float = 0.0  # share of the process's memory that lies in 2 MiB pages


def choose_lines(model: str, threads: int) -> list[Line]:
    """The base and every difference that this model and this machine can show."""
    checkpoint = open_checkpoint(model)
    text = checkpoint.config.text
    quantised = any(t.dtype not in _PLAIN for t in checkpoint.text_tensors.values())
    lines = [Line("base")]
    if any(layer.kv_source != i for i, layer in enumerate(text.layers)):
        lines.append(Line("all rows in layers that share keys", {"all_rows": True}))
    if any(layer.values_are_keys for layer in text.layers):
        lines.append(Line("keys stored beside values", context={"separate_keys": True}))
    if quantised:
        lines.append(Line("float32 activations", {"activations": "float32"}))
    lines.append(Line("no 2 MiB pages", {"huge_pages": False}))
    lines.append(Line("weights copied to memory", {"residency": "resident"}))
    lines += [Line(f"KV {kind}", {"kv_dtype": kind}) for kind in ("float32", "bfloat16", "int8")]
    lines += [Line(f"{count} thread", {"threads": count}) for count in (1,) if count < threads]
    lines.append(Line("invariant", {"invariant": True}))
    for isa in _ISAS[: _ISAS.index(_core.isa())] if _core.isa() in _ISAS else []:
        lines.append(Line(f"ISA {isa}", env={"GEMLOUPE_ISA": isa}))
    return lines


def seconds(
    line: Line, worker: Worker, arguments: argparse.Namespace, work: Callable[[], float]
) -> float:
    """Returns what `work` says that it took, or its CPU time."""
    if not arguments.cpu_seconds:
        taken, others = undisturbed(worker, work)
        line.others.append(others)
        return taken
    before = worker.cpu_seconds()
    work()
    return worker.cpu_seconds() - before


def measure(
    line: Line, worker: Worker, arguments: argparse.Namespace, vocab: int, number: int
) -> None:
    if not worker.is_loaded:
        worker.load()
        worker.ask("context", **line.context)
        worker.prefill(random_ids(arguments.prompt, vocab, [arguments.seed, 1]))
        worker.decode(random_ids(2, vocab, [arguments.seed, 2]))
    ids = random_ids(arguments.prompt, vocab, [arguments.seed, 3, number])
    line.prefill.append(len(ids) / seconds(line, worker, arguments, lambda: worker.prefill(ids)))
    new = random_ids(arguments.new, vocab, [arguments.seed, 4, number])
    decode = seconds(line, worker, arguments, lambda: sum(worker.decode(new)))
    line.decode.append(len(new) / decode)
    memory = worker.ask("memory")
    line.peak_rss = max(line.peak_rss, memory["VmHWM"])
    line.huge_pages = memory["huge_pages"] / memory["Rss"]


def ablate(arguments: argparse.Namespace) -> dict[str, Any]:
    vocab = open_checkpoint(arguments.model).config.text.vocab_size
    lines = choose_lines(arguments.model, arguments.threads)
    if arguments.only:
        lines = [line for line in lines if line.name in ("base", *arguments.only)]
    workers = {}
    for line in lines:
        load = {"engine": "gemloupe", "path": arguments.model, "threads": arguments.threads}
        load |= {"dtype": arguments.dtype, **line.load}
        workers[line.name] = Worker(line.name, sys.executable, load, line.env)
    bandwidths = []
    try:
        for number in range(arguments.rounds):
            bandwidths.append(bench.read_bandwidth(arguments.threads))
            # Shuffled: the base would always be first or last of so many.
            for index in np.random.default_rng([arguments.seed, number]).permutation(len(lines)):
                line, name = lines[index], lines[index].name
                measure(line, workers[name], arguments, vocab, number)
                progress(
                    f"round {number + 1}: {name}: pp {line.prefill[-1]:.2f}, "
                    f"tg {line.decode[-1]:.2f}"
                )
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "model": arguments.model,
        "dtype": arguments.dtype,
        **bench.environment(arguments.threads),
        "prompt": arguments.prompt,
        "new": arguments.new,
        "rounds": arguments.rounds,
        "cpu_seconds": arguments.cpu_seconds,
        "busy_cpus": [others for line in lines for others in line.others],
        "bandwidths": bandwidths,
        "lines": [asdict(line) for line in lines],
    }


def report_text(report: dict[str, Any]) -> str:
    base = report["lines"][0]
    rows = []
    for line in report["lines"]:
        row = [line["name"]]
        for kind in ("prefill", "decode"):
            share = statistics.median(line[kind]) / statistics.median(base[kind])
            row += [cell(line[kind]), f"{100 * share:.0f} %"]
        rows.append([*row, f"{line['peak_rss'] / 2**30:.2f}", f"{line['huge_pages']:.0%}"])
    head = ["switched", f"prefill {report['prompt']}, tok/s", "of base"]
    head += ["decode, tok/s", "of base", "peak RSS, GiB", "in 2 MiB pages"]
    return "\n".join(
        [
            f"### {report['model']}: one thing at a time",
            "",
            f"- {report['cpu']}, {report['threads']} threads, ISA {report['isa']}, read bandwidth "
            f"{cell([b / 1e9 for b in report['bandwidths']], 1)} GB/s, gemloupe "
            f"{report['gemloupe']} at commit {report['commit'] or '-'}, {report['date']}",
            f"- decoded {report['new']} tokens after the prompt; median (minimum–maximum) of "
            f"{report['rounds']} rounds; "
            + (
                "by CPU time of the process, since the machine was busy"
                if report["cpu_seconds"]
                else f"CPUs that others kept busy meanwhile {cell(report['busy_cpus'])}"
            ),
            "",
            markdown(head, rows),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="one thing switched off at a time")
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt", type=int, default=512, metavar="N")
    parser.add_argument("--new", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=_core.available_cpus(), metavar="N")
    parser.add_argument("--cpu-seconds", action="store_true", help="CPU time, not the clock's")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these lines, and the base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.threads, arguments.new) < 1 or arguments.prompt < 2:
        parser.error("--rounds, --threads and --new are at least 1, --prompt at least 2")
    if arguments.cpu_seconds and arguments.threads != 1:
        parser.error("--cpu-seconds needs --threads 1: threads that wait take CPU time, too")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    report = ablate(arguments)
    print(report_text(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(f"ablation: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
