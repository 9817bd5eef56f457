"""What looking into a model and changing it costs, alone and beside libraries made for it.

    python benchmarks/hooks.py FOLDER                                        gemloupe alone
    python benchmarks/hooks.py FOLDER --peers sdpa eager nnsight transformer_lens
                               --peer-python /tmp/peers/bin/python

FOLDER is a checkpoint (random_checkpoint.py writes one). Peers run with `--peer-python`, which has
torch, transformers and the libraries. Each engine gets a new process in every round; rounds run the
engines in turn, every second one backwards. Prompts are random ids, the same for all. What the
tasks are and what the columns mean stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from text_speed import busy_cpus, describe, spread, warm
from workers import Worker, cell, in_turns, markdown, progress, random_ids, ratio

from gemloupe import _core, bench
from gemloupe.checkpoint import open_checkpoint
from gemloupe.config import TextConfig

TASKS = {
    "a": "all resid_post of {prompts} x {length} tokens",
    "b": "patching grid of resid_post, {layers} layers x {grid} positions",
    "c": "{new} tokens generated with a steering vector",
    "d": "resid_post of layer {dump_layer} of {dump} x {dump_length} tokens, to disk",
    "e": "{ablations} single-expert ablations over {expert_prompts} x {expert_length} tokens",
}
COSTS = {
    "unhooked": "no hooks, beside a build without them",
    "capture": "all resid_post of {cost_length} tokens",
    "function": "a Python edit at each layer, decoding",
    "trace": 'routing="experts", decoding',
}
# How many times faster than the fastest peer.
GOALS = {
    "float32": {"a": 1.6, "b": 4.0},
    "int8": {"a": 4.5, "b": 8.0, "c": 4.5},
    "int4": {"c": 8.0},
}
CAPTURE_GOAL, FUNCTION_GOAL, TRACE_GOAL = 0.03, 50e-6, 0.02
PEERS = {
    "sdpa": {"engine": "transformers", "attention": "sdpa"},
    "eager": {"engine": "transformers", "attention": "eager"},
    "nnsight": {"engine": "nnsight", "attention": "sdpa"},
    "transformer_lens": {"engine": "transformer_lens", "attention": "eager"},
}
QUICK = {
    "prompts": 2, "length": 16, "grid": 4, "sample": 3, "new": 4, "dump": 2, "dump_length": 16,
    "expert_prompts": 2, "expert_length": 8, "ablations": 2, "cost_length": 16, "cost_new": 4,
    "cost_rounds": 2,
}  # fmt: skip


class HookWorker(Worker):
    script = "hook_engines.py"


@dataclass
class Line:
    """One engine and what its rounds measured, by task."""

    name: str
    dtype: str
    load: dict[str, Any]
    is_peer: bool
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    clock: str = "seconds"

    def seconds(self, task: str) -> list[float]:
        """What engines are compared by."""
        return [scaled(result, self.clock) for result in self.results.get(task, [])]


def scaled(result: dict[str, Any], kind: str = "seconds") -> float:
    """Seconds of a task ("cpu": of all CPUs); of a sampled grid what all its cells would take."""
    if "each" not in result:
        return float(result[kind])
    whole = result["before"] + statistics.mean(result["each"]) * result["all_cells"]
    return float(whole * result[kind] / result["seconds"])


def sample_cells(layers: int, positions: int, count: int) -> list[list[int]]:
    """`count` cells of a grid, spread evenly over layers and positions."""
    cells = [[layer, position] for layer in range(layers) for position in range(positions)]
    count = min(count, len(cells))
    return [cells[(2 * i + 1) * len(cells) // (2 * count)] for i in range(count)]


def command(task: str, text: TextConfig, sizes: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What hook_engines.py is asked for."""

    def prompts(count: int, length: int, kind: int) -> list[list[int]]:
        return [
            [2, *random_ids(length - 1, text.vocab_size, [sizes.seed, kind, i])]
            for i in range(count)
        ]

    layers = text.num_hidden_layers
    if task == "a":
        return {"op": "residuals", "prompts": prompts(sizes.prompts, sizes.length, 0)}
    if task == "b":
        clean, corrupted = prompts(2, sizes.grid, 1)
        cells = sample_cells(layers, sizes.grid, sizes.sample)
        return {"op": "grid", "clean": clean, "corrupted": corrupted, "cells": cells}
    if task == "c":
        [prompt] = prompts(1, 32, 2)
        return {"op": "steer", "prompt": prompt, "new": sizes.new, "layer": layers // 2}
    if task == "d":
        return {
            "op": "dump", "prompts": prompts(sizes.dump, sizes.dump_length, 3),
            "layer": sizes.dump_layer, "folder": folder,
        }  # fmt: skip
    pairs = [
        [(2 * i + 1) * layers // (2 * sizes.ablations) % layers, (7 * i + 3) % text.num_experts]
        for i in range(sizes.ablations)
    ]
    return {
        "op": "experts", "prompts": prompts(sizes.expert_prompts, sizes.expert_length, 4),
        "pairs": pairs,
    }  # fmt: skip


def measure(line: Line, arguments: argparse.Namespace, text: TextConfig) -> None:
    """One round of one engine: loads, warms up, and does each task; failures are kept."""
    python = arguments.peer_python if line.is_peer else sys.executable
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        with HookWorker(line.name, python, line.load) as worker:
            try:
                worker.load()
            except RuntimeError as error:
                line.failed.update(dict.fromkeys(arguments.tasks, str(error)))
                return
            line.versions = worker.about["versions"]
            for task in arguments.tasks:
                asked = command(task, text, arguments, folder)
                op = asked.pop("op")
                try:
                    if task == arguments.tasks[0]:
                        # The first pass maps pages and compiles; it is none of a task's business.
                        begin = [2, *random_ids(127, text.vocab_size, [arguments.seed, 5])]
                        worker.ask("residuals", prompts=[begin])
                    result = worker.ask(op, **asked)
                except RuntimeError as error:
                    line.failed[task] = str(error)
                    if not worker.is_loaded:
                        return
                    continue
                if "each" in result:
                    result["all_cells"] = text.num_hidden_layers * arguments.grid
                line.results.setdefault(task, []).append(result)


def measure_costs(dtype: str, arguments: argparse.Namespace, text: TextConfig) -> dict[str, Any]:
    """Pairs of seconds [without, with] hooks, by name of COSTS."""
    load = own_load(dtype, arguments)
    prompt = [2, *random_ids(arguments.cost_length - 1, text.vocab_size, [arguments.seed, 6])]
    new, rounds = arguments.cost_new, arguments.cost_rounds
    found: dict[str, Any] = {}
    kinds = [name for name in arguments.costs if name != "unhooked"]
    with HookWorker(f"gemloupe {dtype}", sys.executable, load) as worker:
        worker.load()
        for what in kinds:
            if what == "trace" and not text.num_experts:
                continue
            progress(f"{dtype}: {what}")
            asked = {"what": what, "prompt": prompt, "new": new, "rounds": rounds,
                     "clock": arguments.clock}  # fmt: skip
            found[what] = worker.ask("cost", **asked)["pairs"]
        if "unhooked" in arguments.costs and arguments.unhooked:
            progress(f"{dtype}: unhooked")
            env = {"PYTHONPATH": str(arguments.unhooked)}
            with HookWorker(f"unhooked {dtype}", sys.executable, load, env) as other:
                other.load()
                plain = {"prompt": prompt, "new": new, "clock": arguments.clock}
                found |= beside_unhooked(other, worker, plain, rounds)
    return found


def beside_unhooked(
    unhooked: Worker, hooked: Worker, plain: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """The same calls in two processes in turn; the first of each is a warm-up."""
    pairs: dict[str, Any] = {"unhooked prefill": [], "unhooked decode": []}
    for number in range(rounds + 1):
        order = in_turns([0, 1], number)
        found = {i: (unhooked, hooked)[i].ask("plain", **plain) for i in order}
        if number:
            for part in ("prefill", "decode"):
                pairs[f"unhooked {part}"].append([found[0][part], found[1][part]])
    return pairs


def cost_row(dtype: str, what: str, pairs: list[list[float]], layers: int) -> list[str]:
    """dtype, what, seconds without and with, ratio of the medians, and beside its goal."""
    without, with_hooks = ([pair[i] for pair in pairs] for i in (0, 1))
    share = statistics.median(b / a for a, b in pairs) - 1
    cost, goal = f"{100 * share:+.1f} %", "1 within noise"
    if what == "capture":
        goal = verdict(share, CAPTURE_GOAL, "3 %")
    elif what == "trace":
        goal = verdict(share, TRACE_GOAL, "2 %")
    elif what == "function":
        each = statistics.median(b - a for a, b in pairs) / layers
        cost, goal = f"{1e6 * each:.0f} µs each", verdict(each, FUNCTION_GOAL, "50 µs")
    milli = [cell([1e3 * x for x in part], 1) for part in (without, with_hooks)]
    return [what, dtype, *milli, cost, goal]


def verdict(value: float, goal: float, text: str) -> str:
    return f"≤ {text}: {'met' if value <= goal else 'missed'}"


def against_peers(lines: Sequence[Line], task: str) -> dict[str, tuple[float, str]]:
    """gemloupe's lines by name: how many times faster than the fastest peer, and which it is."""
    peers = [line for line in lines if line.is_peer and line.seconds(task)]
    if not peers:
        return {}
    best = min(peers, key=lambda line: statistics.median(line.seconds(task)))
    found = {}
    for line in lines:
        times = ratio(best.seconds(task), line.seconds(task))
        if not line.is_peer and times is not None:
            found[line.name] = (times, best.name)
    return found


def task_table(report: dict[str, Any], lines: Sequence[Line], task: str) -> str:
    ratios = against_peers(lines, task)
    rows = []
    for line in lines:
        if line.is_peer and task in line.failed:
            rows.append([line.name, "failed", "-", "-", "-", "-"])
        results = line.results.get(task)
        if not results:
            continue
        peak = max(result["peak_rss"] for result in results) / (1 << 30)
        times, goal = "", ""
        if line.name in ratios:
            times = f"{ratios[line.name][0]:.1f}x"
            wanted = GOALS.get(line.dtype, {}).get(task)
            if wanted:
                goal = f"{wanted}x: {'met' if ratios[line.name][0] >= wanted else 'missed'}"
        seconds = [scaled(result) for result in results]
        digits = 2 if min(seconds) >= 1 else 4
        cpu = cell([scaled(result, "cpu") for result in results], digits)
        rows.append([line.name, cell(seconds, digits), cpu, f"{peak:.2f}", times, goal])
    title = f"**{task}: {TASKS[task].format(**report['sizes'])}**"
    head = ["engine", "seconds", "CPU seconds", "peak RSS, GiB", "against the fastest peer", "goal"]
    return f"{title}\n\n{markdown(head, rows)}"


def notes(lines: Sequence[Line], tasks: Sequence[str]) -> list[str]:
    """What a reader must know: samples, cells left out, short answers, failures."""
    found = []
    for line in lines:
        for task in tasks:
            if task in line.failed:
                found.append(f"{line.name}, {task}: {line.failed[task]}")
        for result in line.results.get("b", [])[:1]:
            if "each" in result:
                found.append(
                    f"{line.name}, b: {len(result['each'])} of {result['all_cells']} cells were "
                    f"run ({statistics.mean(result['each']):.3f} s each), scaled to all"
                )
            else:
                found.append(
                    f"{line.name}, b: {result['computed']} of {result['cells']} cells can matter "
                    "and were run; the others are known to change nothing"
                )
        short = {result["tokens"] for result in line.results.get("c", [])}
        if short:
            found.append(f"{line.name}, c: {', '.join(map(str, sorted(short)))} tokens")
    return found


def report_text(report: dict[str, Any], lines: Sequence[Line]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        f"- model: {report['model']}",
        f"- machine: {report['cpu']}, {report['threads']} threads, ISA {report['isa']}",
        f"- {report['date']}, gemloupe {report['gemloupe']} at commit {report['commit']}; "
        f"{versions}",
        f"- median (minimum–maximum) of {report['rounds']} rounds (peers {report['peer_rounds']}); "
        f"CPUs that others kept busy before them {spread(report['busy_cpus'], 1)}; compared by "
        f"{'CPU time' if report['clock'] == 'cpu' else 'time'}",
        *(f"- {note}" for note in notes(lines, report["tasks"])),
    ]
    tables = ["\n".join(parts)]
    if report["costs"]:
        rows = [
            cost_row(dtype, what, pairs, report["sizes"]["layers"])
            for dtype, found in report["costs"].items()
            for what, pairs in found.items()
        ]
        for row in rows:
            kind, _, part = row[0].partition(" ")
            row[0] = COSTS[kind].format(**report["sizes"]) + (f", {part}" if part else "")
        head = ["hooks", "dtype", "without, ms", "with, ms", "cost", "goal"]
        tables.append(markdown(head, rows))
    return "\n\n".join([*tables, *(task_table(report, lines, task) for task in report["tasks"])])


def own_load(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loads the converted folder where there is one, so that nothing is packed at loading."""
    load = {"engine": "gemloupe", "path": arguments.checkpoint, "threads": arguments.threads}
    packed = dict(entry.split("=", 1) for entry in arguments.packed)
    return {**load, "path": packed[dtype]} if dtype in packed else {**load, "dtype": dtype}


def choose_lines(arguments: argparse.Namespace) -> list[Line]:
    shared = {"path": arguments.checkpoint, "threads": arguments.threads}
    lines = [
        Line(f"gemloupe {dtype}", dtype, own_load(dtype, arguments), False, clock=arguments.clock)
        for dtype in arguments.dtype
    ]
    for peer in arguments.peers:
        for dtype in arguments.peer_dtype:
            name = f"transformers {peer}" if peer in ("sdpa", "eager") else peer
            load = {**PEERS[peer], "dtype": dtype, **shared}
            lines.append(Line(f"{name} {dtype}", dtype, load, True, clock=arguments.clock))
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="costs of hooks, alone and beside other libraries")
    parser.add_argument("checkpoint", help="a checkpoint folder, or demo:edge and the like")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE",
                        help="only report what --json wrote in several runs")  # fmt: skip
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=None)
    parser.add_argument("--costs", nargs="*", choices=[*COSTS], default=None, help="own costs")
    parser.add_argument("--peers", nargs="*", choices=[*PEERS], default=[])
    parser.add_argument("--peer-python", default=sys.executable, metavar="FILE")
    parser.add_argument("--dtype", nargs="+", default=["float32", "int8", "int4"])
    parser.add_argument("--packed", nargs="*", default=[], metavar="DTYPE=FOLDER",
                        help="the checkpoint as gemloupe convert wrote it")  # fmt: skip
    parser.add_argument("--peer-dtype", nargs="+", default=["float32"])
    parser.add_argument("--unhooked", type=Path, metavar="FOLDER",
                        help="holds a gemloupe package from before hooks")  # fmt: skip
    parser.add_argument("--clock", choices=["seconds", "cpu"], default="seconds",
                        help="cpu: CPU time, for busy machines (--threads 1)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work at all?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8, help="of task a")
    parser.add_argument("--length", type=int, default=256, help="of these")
    parser.add_argument("--grid", type=int, default=24, help="positions of task b")
    parser.add_argument("--sample", type=int, default=12, help="cells that peers run of it")
    parser.add_argument("--new", type=int, default=128, help="generated tokens of task c")
    parser.add_argument("--dump", type=int, default=8, help="prompts of task d")
    parser.add_argument("--dump-length", type=int, default=512)
    parser.add_argument("--dump-layer", type=int, default=12)
    parser.add_argument("--ablations", type=int, default=6, help="of task e")
    parser.add_argument("--expert-prompts", type=int, default=32)
    parser.add_argument("--expert-length", type=int, default=64)
    parser.add_argument("--cost-length", type=int, default=512, help="tokens of a costed pass")
    parser.add_argument("--cost-new", type=int, default=32, help="decoded tokens of a costed call")
    parser.add_argument("--cost-rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=_core.available_cpus())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the dump; else the system's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(QUICK, rounds=1, peer_rounds=1)
    if strange := [entry for entry in arguments.packed if "=" not in entry]:
        parser.error(f"--packed has {strange[0]}; expected DTYPE=FOLDER")
    counts = ("rounds", "peer_rounds", "new", "sample", "cost_new", "cost_rounds", "threads")
    for name in counts:
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; expected 1 up")
    arguments.peer_rounds = min(arguments.rounds, arguments.peer_rounds)
    return arguments


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Line]]:
    checkpoint = open_checkpoint(arguments.checkpoint)
    text = checkpoint.config.text
    # The peers know no demo: names.
    arguments.checkpoint = str(checkpoint.folder)
    if arguments.tasks is None:
        arguments.tasks = ["a", "b", "c", "d"] + (["e"] if text.num_experts else [])
    if arguments.costs is None:
        arguments.costs = list(COSTS)
    if "e" in arguments.tasks and not text.num_experts:
        raise ValueError(f"task e needs a model with experts; {arguments.checkpoint} has none")
    arguments.dump_layer = min(arguments.dump_layer, text.num_hidden_layers - 1)
    environment = bench.environment(arguments.threads)
    warm(checkpoint)
    busy = [busy_cpus()]
    costs = {}
    if arguments.costs:
        costs = {dtype: measure_costs(dtype, arguments, text) for dtype in arguments.dtype}
    lines = choose_lines(arguments) if arguments.tasks else []
    for number in range(arguments.rounds if lines else 0):
        busy.append(busy_cpus())
        for i in in_turns(range(len(lines)), number):
            if lines[i].is_peer and number >= arguments.peer_rounds:
                continue
            progress(f"round {number + 1}: {lines[i].name}")
            measure(lines[i], arguments, text)
    versions: dict[str, str] = {}
    for line in lines:
        versions |= line.versions
    versions.pop("gemloupe", None)
    report = {
        **environment,
        "model": describe(checkpoint),
        "versions": versions,
        "clock": arguments.clock,
        "rounds": arguments.rounds,
        "peer_rounds": arguments.peer_rounds,
        "busy_cpus": busy,
        "tasks": arguments.tasks,
        "costs": costs,
        "sizes": {
            "layers": text.num_hidden_layers,
            **{name: getattr(arguments, name) for name in [*QUICK, "dump_layer"]},
        },
    }
    return report, lines


def merged(paths: Sequence[Path]) -> tuple[dict[str, Any], list[Line]]:
    """One report of several runs of the same model and sizes, made in pieces.

    ValueError for pieces that differ in more than tasks, rounds and costs.
    """
    pieces = [json.loads(path.read_text()) for path in paths]
    report = pieces[0]
    lines: dict[str, Line] = {}
    for path, piece in zip(paths, pieces, strict=True):
        for name in ("model", "cpu", "isa", "threads", "sizes", "clock", "gemloupe"):
            if piece[name] != report[name]:
                raise ValueError(
                    f"{path}: {name} is {piece[name]}; expected {report[name]}, as in {paths[0]}"
                )
        for entry in piece["lines"]:
            line = lines.setdefault(entry["name"], Line(**{**entry, "results": {}, "failed": {}}))
            for task, results in entry["results"].items():
                line.results.setdefault(task, []).extend(results)
            line.failed |= entry["failed"]
        if piece is report:
            continue
        report["tasks"] += [task for task in piece["tasks"] if task not in report["tasks"]]
        report["busy_cpus"] += piece["busy_cpus"]
        report["versions"] |= piece["versions"]
        for dtype, found in piece["costs"].items():
            report["costs"].setdefault(dtype, {}).update(found)
    report["tasks"].sort()
    counts = {peer: [len(results) for line in lines.values() if line.is_peer is peer
                     for results in line.results.values()] for peer in (False, True)}  # fmt: skip
    report["rounds"] = min(counts[False], default=report["rounds"])
    report["peer_rounds"] = min(counts[True], default=report["peer_rounds"])
    return report, list(lines.values())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    report, lines = merged(arguments.merge) if arguments.merge else run(arguments)
    print(report_text(report, lines))
    if arguments.json:
        everything = {**report, "lines": [asdict(line) for line in lines]}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(f"hooks: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
