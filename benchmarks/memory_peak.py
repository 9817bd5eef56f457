"""Peak memory of a process that is given ids, beside what gemloupe.estimate said before.

    python benchmarks/memory_peak.py E2B=FOLDER 31B=FOLDER [--context 4096] [--json FILE]
    python benchmarks/memory_peak.py E2B E4B --folder DIR       # makes random packed files

The process loads the model, reads a prompt that fills the context but for 8 tokens in chunks of
512, and decodes these. Peak is VmHWM: Python, mapped pages of the file and the KV cache are in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import random_packed
from workers import Worker, markdown, progress, random_ids

import gemloupe as gl
from gemloupe import _core, bench
from gemloupe.checkpoint import open_checkpoint
from gemloupe.variants import VARIANTS

NEW = 8
# GiB to stay below: 16-bit KV, chunk 512, 4096 tokens, int4.
GOALS = {"E2B": 1.5, "E4B": 2.9, "26B-A4B": 15.0, "31B": 18.5}
GOAL_CONTEXT = 4096
ESTIMATE_GOAL = 0.05


def measure(variant: str, source: str, arguments: argparse.Namespace) -> dict[str, Any]:
    checkpoint = open_checkpoint(source)
    vocab = checkpoint.config.text.vocab_size
    estimate = gl.estimate(source, context=arguments.context, kv_dtype=arguments.kv_dtype)
    load = {
        "engine": "gemloupe",
        "path": source,
        "threads": arguments.threads,
        "kv_dtype": arguments.kv_dtype,
        "residency": arguments.residency,
    }
    with Worker(f"gemloupe {variant}", sys.executable, load) as worker:
        load_seconds = worker.load()
        after_load = worker.ask("memory")
        worker.ask("context", max_tokens=arguments.context)
        progress(f"{variant}: loaded in {load_seconds:.2f} s, reading {arguments.context} tokens")
        prefill = worker.prefill(random_ids(arguments.context - NEW, vocab, [arguments.seed]))
        decode = worker.decode(random_ids(NEW, vocab, [arguments.seed, 1]))
        memory = worker.ask("memory")
    peak, total = memory["VmHWM"], int(estimate)
    uncut = checkpoint.config.text == VARIANTS[variant].config.text
    goal = GOALS.get(variant) if uncut and arguments.context == GOAL_CONTEXT else None
    return {
        "variant": variant,
        "source": source,
        "dtype": checkpoint.dtype if checkpoint.provenance is None else checkpoint.provenance.dtype,
        "kv_dtype": arguments.kv_dtype,
        "context": arguments.context,
        "peak_rss": peak,
        "after_load": after_load,
        "at_the_end": memory,
        "estimate": total,
        "estimate_parts": {
            "weights": estimate.weights,
            "kv_cache": estimate.kv_cache,
            "scratch": estimate.scratch,
            "converting": estimate.converting,
            "process": estimate.process,
        },
        "estimate_error": total / peak - 1,
        "estimate_met": abs(total / peak - 1) <= ESTIMATE_GOAL,
        "goal_gib": goal,
        "goal_met": None if goal is None else peak <= goal * 2**30,
        "load_seconds": load_seconds,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
    }


def report_text(report: dict[str, Any]) -> str:
    rows = []
    for entry in report["models"]:
        goal = "-"
        if entry["goal_gib"] is not None:
            goal = f"{entry['goal_gib']:.1f}, {'met' if entry['goal_met'] else 'MISSED'}"
        rows.append(
            [
                f"{entry['variant']} {entry['dtype']}",
                f"{entry['peak_rss'] / 2**30:.2f}",
                f"{entry['at_the_end']['RssAnon'] / 2**30:.2f}",
                goal,
                f"{entry['estimate'] / 2**30:.2f}",
                f"{100 * entry['estimate_error']:+.1f} %",
                f"{entry['after_load']['VmHWM'] / 2**30:.2f}",
                f"{entry['load_seconds']:.3f}",
            ]
        )
    head = ["model", "peak RSS, GiB", "its own", "goal", "estimate, GiB", "off by"]
    head += ["after load, GiB", "load, s"]
    return "\n".join(
        [
            f"### Memory of {report['context']} tokens, KV {report['kv_dtype']}, chunk 512",
            "",
            f"- {report['cpu']}, {report['threads']} threads, ISA {report['isa']}, gemloupe "
            f"{report['gemloupe']} at commit {report['commit'] or '-'}, {report['date']}",
            "",
            markdown(head, rows),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="peak memory beside the estimate")
    parser.add_argument("models", nargs="+", metavar="VARIANT[=FOLDER]")
    parser.add_argument("--folder", type=Path, help="where files that are not given are made")
    parser.add_argument("--vocab", type=int, metavar="N", help="cut files that are made")
    parser.add_argument("--layers", type=int, metavar="N")
    parser.add_argument("--context", type=int, default=GOAL_CONTEXT, metavar="N")
    parser.add_argument("--kv-dtype", default="float16")
    parser.add_argument("--residency", choices=["mapped", "resident"], default="mapped")
    parser.add_argument("--threads", type=int, default=_core.available_cpus(), metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args(argv)
    if arguments.context <= NEW + 1:
        parser.error(f"--context is {arguments.context}; expected more than {NEW + 1}")
    for model in arguments.models:
        variant, _, source = model.partition("=")
        if variant not in VARIANTS:
            parser.error(f"{variant!r} is no released model; expected one of {', '.join(VARIANTS)}")
        if not source and arguments.folder is None:
            parser.error(f"{variant} has no folder; give {variant}=FOLDER, or --folder to make it")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    models = []
    for model in arguments.models:
        variant, _, source = model.partition("=")
        if not source:
            path = arguments.folder / f"{variant}-int4"
            if not path.exists():
                cut = {"vocab": arguments.vocab, "layers": arguments.layers}
                random_packed.write_packed(variant, path, **cut)
            source = str(path)
        models.append(measure(variant, source, arguments))
    report = {
        **bench.environment(arguments.threads),
        "context": arguments.context,
        "kv_dtype": arguments.kv_dtype,
        "residency": arguments.residency,
        "models": models,
    }
    print(report_text(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(f"memory_peak: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
