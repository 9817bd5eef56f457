"""One model in llama.cpp and in gemloupe: the same Q4_0 file, and gemloupe's own int4 file.

    python -m venv llama && llama/bin/pip install numpy llama-cpp-python     # about ten minutes
    python benchmarks/compare_llama_cpp.py E2B --llama-python llama/bin/python [--json FILE]

Files with random weights are made in --folder unless given. Each engine has its own process, fed
with the same random ids; rounds alternate, and only one computes at a time. llama.cpp first tries
its settings, and runs with the fastest for each figure. benchmarks/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import random_gguf
import random_packed
from workers import (
    MOST_TRIES,
    Worker,
    cell,
    in_turns,
    markdown,
    progress,
    random_ids,
    ratio,
    undisturbed,
)

from gemloupe import _core, bench, recipe, sizes
from gemloupe.checkpoint import open_checkpoint
from gemloupe.variants import VARIANTS

SPARE_BYTES = 2 << 30
# What llama.cpp's tries read and decode; another figure wins only if it is this much better.
TRY_PROMPT, TRY_NEW, CLEARLY = 128, 6, 1.03


@dataclass
class Line:
    """One engine on one file, and what its rounds measured."""

    name: str
    path: str
    python: str
    load: dict[str, Any]
    # llama.cpp's settings for reading a prompt and for decoding.
    contexts: dict[str, dict[str, Any]] = field(default_factory=dict)
    load_seconds: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)  # tokens a second
    decode: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)  # CPUs that others kept busy meanwhile
    bandwidths: list[float] = field(default_factory=list)  # right after each slice of decoding
    peak_rss: list[int] = field(default_factory=list)
    bytes_per_token: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    system_info: str = ""  # what llama.cpp was built with

    @property
    def is_peer(self) -> bool:
        return self.load["engine"] != "gemloupe"


def settings(threads: int, prompt: int) -> list[dict[str, Any]]:
    """What llama.cpp is tried with: flash attention, physical batch, threads."""
    counts = [threads] if threads < 4 else [threads, threads // 2]
    batches = [512] if prompt < TRY_PROMPT else [512, 64]
    return [
        {"flash_attn": flash, "n_ubatch": batch, "threads": count}
        for count in counts
        for flash in (0, 1)
        for batch in batches
    ]


def fastest(tries: Sequence[tuple[dict[str, Any], float, float]]) -> dict[str, dict[str, Any]]:
    """Settings for "prefill" and "decode" of (settings, prefill rate, decode rate).

    One setting for both unless another is clearly faster: contexts cost memory.
    """
    prefill = max(tries, key=lambda entry: entry[1])
    decode = max(tries, key=lambda entry: entry[2])
    if prefill[2] * CLEARLY >= decode[2]:
        decode = prefill
    elif decode[1] * CLEARLY >= prefill[1]:
        prefill = decode
    return {"prefill": prefill[0], "decode": decode[0]}


def try_settings(line: Line, arguments: argparse.Namespace, vocab: int) -> tuple[float, float]:
    """Chooses line.contexts; returns the best rates (prefill, decode)."""
    prompt = min(arguments.prompt, arguments.try_prompt)
    candidates = settings(arguments.threads, prompt)
    rates = [[(0.0, 0.0)] for _ in candidates]
    with Worker(line.name, line.python, line.load) as worker:
        worker.load()
        # The best of several passes over all: a neighbour who is busy for a moment decides nothing.
        for _ in range(arguments.tries):
            for options, found in zip(candidates, rates, strict=True):
                worker.ask("context", n_ctx=arguments.prompt + arguments.new + 8, **options)
                worker.prefill(random_ids(8, vocab, [arguments.seed, 7]))  # Maps the file's pages.
                seconds = worker.prefill(random_ids(prompt, vocab, [arguments.seed, 8]))
                each = worker.decode(random_ids(TRY_NEW, vocab, [arguments.seed, 9]))
                found.append((prompt / seconds, 1 / statistics.median(each)))
    tries = [
        (options, max(rate for rate, _ in found), max(rate for _, rate in found))
        for options, found in zip(candidates, rates, strict=True)
    ]
    for options, prefill, decode in tries:
        shown = ", ".join(f"{name} {value}" for name, value in options.items())
        progress(f"{line.name}, {shown}: pp {prefill:.2f}, tg {decode:.2f} tok/s")
    line.contexts = fastest(tries)
    return max(entry[1] for entry in tries), max(entry[2] for entry in tries)


def choose_peers(
    gguf: Path, arguments: argparse.Namespace, vocab: int, notes: list[str]
) -> list[Line]:
    """Returns llama.cpp's lines: with and without repacking, or the better one of both."""
    wanted = {"on": [True], "off": [False]}.get(arguments.repack, [True, False])
    size = gguf.stat().st_size
    if arguments.repack == "auto" and 2 * size + SPARE_BYTES > _core.available_memory():
        notes.append(
            "llama.cpp's repacking was left out: the file and its copy do not fit in memory "
            "(--repack both tries it anyway)"
        )
        wanted = [False]
    lines, rates = [], []
    for repack in wanted:
        load = {"engine": "llama.cpp", "path": str(gguf), "threads": arguments.threads}
        name = "llama.cpp" if repack else "llama.cpp --no-repack"
        line = Line(name, str(gguf), arguments.llama_python, {**load, "repack": repack})
        try:
            rates.append(try_settings(line, arguments, vocab))
        except RuntimeError as error:
            notes.append(f"left out: {error}")
            progress(notes[-1])
            continue
        lines.append(line)
    if not lines:
        raise RuntimeError(f"llama.cpp ran in none of the ways tried: {'; '.join(notes)}")
    if arguments.repack != "auto" or len(lines) == 1:
        return lines
    kept = contenders(rates)
    for index in {0, 1} - kept:
        notes.append(
            f"{lines[index].name} was clearly slower in both: pp {rates[index][0]:.2f}, "
            f"tg {rates[index][1]:.2f} tok/s in its tries"
        )
    return [lines[index] for index in sorted(kept)]


def contenders(rates: Sequence[tuple[float, float]]) -> set[int]:
    """Those that come within a tenth of the best in prefill or in decode: the rounds decide."""
    kept = set()
    for kind in range(2):
        best = max(rate[kind] for rate in rates)
        kept |= {i for i, rate in enumerate(rates) if rate[kind] >= 0.9 * best}
    return kept


def token_bytes(line: Line, arguments: argparse.Namespace) -> float:
    """Bytes that a decoded token reads of a file as it is stored, halfway through."""
    checkpoint = open_checkpoint(line.path)
    text = checkpoint.config.text
    targets = sizes.weight_targets(checkpoint, "auto")
    tensors = [
        (name, t.shape, recipe.nbytes(targets.get(name, "float32"), t.shape))
        for name, t in checkpoint.text_tensors.items()
    ]
    context = arguments.prompt + arguments.new // 2
    weights = bench.weight_bytes_per_pass(text, tensors)
    return weights + bench.kv_bytes_read(text, context, "float16", separate_keys=line.is_peer)


def measure_prefill(
    line: Line, worker: Worker, arguments: argparse.Namespace, vocab: int, number: int
) -> None:
    """Loads the engine where it is not, and reads the round's prompt; decoding goes on from it."""
    if not worker.is_loaded:
        line.load_seconds.append(worker.load())
        line.versions = worker.about.get("versions", {})
        line.system_info = worker.about.get("system_info", "")
        # The first passes map pages, choose kernels and compile oneDNN's.
        prepare(line, worker, arguments, "prefill")
        worker.prefill(random_ids(arguments.warm, vocab, [arguments.seed, 1]))
        worker.decode(random_ids(2, vocab, [arguments.seed, 2]))
    ids = random_ids(arguments.prompt, vocab, [arguments.seed, 3, number])
    prepare(line, worker, arguments, "prefill")
    seconds, others = undisturbed(worker, lambda: worker.prefill(ids))
    line.prefill.append(len(ids) / seconds)
    line.others.append(others)
    if line.contexts and line.contexts["decode"] != line.contexts["prefill"]:
        prepare(line, worker, arguments, "decode")
        worker.prefill(ids)


def measure_decode(
    line: Line, worker: Worker, arguments: argparse.Namespace, vocab: int, turn: int
) -> None:
    """One slice of a round's decoded tokens."""
    ids = random_ids(arguments.new // arguments.slices, vocab, [arguments.seed, 4, turn])
    seconds, others = undisturbed(worker, lambda: worker.decode(ids))
    line.decode.append(len(seconds) / sum(seconds))
    line.others.append(others)
    line.bandwidths.append(bench.read_bandwidth(arguments.threads))
    line.peak_rss.append(worker.peak_rss())


def prepare(line: Line, worker: Worker, arguments: argparse.Namespace, kind: str) -> None:
    if line.contexts:
        n_ctx = arguments.prompt + MOST_TRIES * arguments.new + 8
        worker.ask("context", n_ctx=n_ctx, **line.contexts[kind])


def stay_loaded(gguf: Path, packed: Path, arguments: argparse.Namespace) -> bool:
    """Whether all engines fit in memory together: the file, two copies of it, and ours."""
    if arguments.keep != "auto":
        return arguments.keep == "yes"
    ours = sum(path.stat().st_size for path in packed.iterdir())
    return 3 * gguf.stat().st_size + ours + SPARE_BYTES <= _core.available_memory()


def roofline(native: Path | None, threads: int) -> dict[str, float]:
    """Operations a second of oneDNN's products, from the native gemloupe_quant_bench."""
    if native is None:
        return {}
    done = subprocess.run(
        [str(native), str(threads)],
        env={**os.environ, "ONLY": "none"},  # Of ours: nothing.
        capture_output=True,
        text=True,
        check=True,
    )
    return parse_roofline(done.stdout)


def parse_roofline(text: str) -> dict[str, float]:
    """{"u8s8": operations a second, …} of lines such as "oneDNN u8s8  512 rows  890.0 Gop/s"."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 6 and words[0] == "oneDNN" and words[-1] == "Gop/s":
            found[words[1]] = 1e9 * float(words[-2])
    return found


def make_files(arguments: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    cut = {"vocab": arguments.vocab, "layers": arguments.layers}
    gguf, packed = arguments.gguf, arguments.packed
    if gguf is None:
        gguf = folder / f"{arguments.variant}-Q4_0.gguf"
        if not gguf.exists():
            random_gguf.write_gguf(arguments.variant, gguf, **cut)
    if packed is None:
        packed = folder / f"{arguments.variant}-int4"
        if not packed.exists():
            random_packed.write_packed(arguments.variant, packed, **cut)
    return gguf, packed


def read_once(path: Path) -> None:
    """Brings files into the page cache."""
    buffer = bytearray(16 << 20)
    for file_path in [path] if path.is_file() else sorted(path.iterdir()):
        with file_path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    gguf, packed = make_files(arguments, folder)
    vocab = open_checkpoint(gguf).config.text.vocab_size
    notes: list[str] = []
    read_once(gguf)
    peers = choose_peers(gguf, arguments, vocab, notes)
    ours = {"engine": "gemloupe", "threads": arguments.threads, "dtype": "auto"}
    python = sys.executable
    lines = [
        *peers,
        Line("gemloupe, same file", str(gguf), python, {**ours, "path": str(gguf)}),
        Line("gemloupe int4", str(packed), python, {**ours, "path": str(packed)}),
    ]
    keep = stay_loaded(gguf, packed, arguments)
    workers = {line.name: Worker(line.name, line.python, line.load) for line in lines}
    by_name = {line.name: line for line in lines}
    peaks = roofline(arguments.native_bench, arguments.threads)
    for number in range(arguments.rounds):
        turns = in_turns(list(workers), number)
        for name in turns:
            if not keep:
                read_once(Path(by_name[name].path))
            measure_prefill(by_name[name], workers[name], arguments, vocab, number)
            if not keep:
                for turn in range(arguments.slices):
                    measure_decode(by_name[name], workers[name], arguments, vocab, turn)
                workers[name].close()
        # The memory's speed drifts within seconds where others share it: engines take short turns.
        for turn in range(arguments.slices if keep else 0):
            for name in in_turns(turns, turn):
                measure_decode(by_name[name], workers[name], arguments, vocab, turn)
        for line in lines:
            rates = ", ".join(f"{rate:.2f}" for rate in line.decode[-arguments.slices :])
            progress(f"round {number + 1}: {line.name}: pp {line.prefill[-1]:.2f}, tg {rates}")
    for worker in workers.values():
        worker.close()
    for line in lines:
        line.bytes_per_token = token_bytes(line, arguments)
    if not keep:
        notes.append("engines were loaded anew in each round: together they do not fit in memory")
    active = sizes.count_parameters(open_checkpoint(gguf)).active
    return {
        "variant": arguments.variant,
        "layers": arguments.layers,
        "vocab": arguments.vocab,
        **bench.environment(arguments.threads),
        "gguf_bytes": gguf.stat().st_size,
        "packed_bytes": sum(path.stat().st_size for path in packed.iterdir()),
        "prompt": arguments.prompt,
        "new": arguments.new,
        "rounds": arguments.rounds,
        "slices": arguments.slices,
        "bandwidths": [rate for line in lines for rate in line.bandwidths],
        "onednn_peaks": peaks,
        "busy_cpus": [others for line in lines for others in line.others],
        "operations_per_token": 2 * active,
        "notes": notes,
        "lines": [asdict(line) for line in lines],
        "ratios": {line.name: against_peers(line, peers) for line in lines if not line.is_peer},
    }


def against_peers(line: Line, peers: Sequence[Line]) -> dict[str, float | None]:
    """Times faster than the fastest peer, and shares of its memory and loading time."""

    def best(figures: Sequence[Sequence[float]], least: bool) -> Sequence[float]:
        return (min if least else max)(figures, key=statistics.median)

    return {
        "prefill": ratio(line.prefill, best([peer.prefill for peer in peers], False)),
        "decode": ratio(line.decode, best([peer.decode for peer in peers], False)),
        "peak_rss": ratio(line.peak_rss, best([peer.peak_rss for peer in peers], True)),
        "load": ratio(line.load_seconds, best([peer.load_seconds for peer in peers], True)),
    }


def report_text(report: dict[str, Any]) -> str:
    """Heading, table and the row for the README."""
    lines, bandwidths = report["lines"], report["bandwidths"]
    cut = "".join(
        f", cut to {report[name]} {what}"
        for name, what in (("layers", "layers"), ("vocab", "tokens"))
        if report[name]
    )
    peaks = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in report["onednn_peaks"].items())
    heading = [
        f"### {report['variant']}{cut}, random weights: llama.cpp and gemloupe",
        "",
        f"- files: Q4_0 {report['gguf_bytes'] / 1e9:.2f} GB, "
        f"int4 {report['packed_bytes'] / 1e9:.2f} GB",
        f"- machine: {report['cpu']}, {report['threads']} threads, ISA {report['isa']}, read "
        f"bandwidth {cell([b / 1e9 for b in bandwidths], 1)} GB/s"
        + (f", oneDNN peaks in Gop/s: {peaks}" if peaks else ""),
        f"- {report['date']}, gemloupe {report['gemloupe']} at commit {report['commit'] or '-'}; "
        + ", ".join(f"{name} {v}" for line in lines[:1] for name, v in line["versions"].items()),
        f"- prompt {report['prompt']}, then {report['new']} decoded; median (minimum–maximum) of "
        f"{report['rounds']} rounds, decoding in {report['slices']} turns a round; CPUs that "
        f"others kept busy meanwhile {cell(report['busy_cpus'])}",
        *(
            f"- {line['name']} ran with {flags(line['contexts'])}; "
            + built_with(line["system_info"])
            for line in lines
            if line["contexts"]
        ),
        *(f"- {note}" for note in report["notes"]),
    ]
    head = ["engine", "load, s", "prefill, tok/s", "as-if Gop/s", "decode, tok/s", "GB/token"]
    head += ["share of bandwidth", "peak RSS, GiB"]
    rows = []
    for line in lines:
        size = line["bytes_per_token"]
        operations = statistics.median(line["prefill"]) * report["operations_per_token"]
        share = 100 * statistics.median(
            rate * size / read
            for rate, read in zip(line["decode"], line["bandwidths"], strict=True)
        )
        rows.append(
            [
                line["name"],
                cell(line["load_seconds"], 3),
                cell(line["prefill"]),
                f"{operations / 1e9:.0f}",
                cell(line["decode"]),
                f"{size / 1e9:.3f}",
                f"{share:.0f} %",
                f"{max(line['peak_rss']) / 2**30:.2f}",
            ]
        )
    ratios = [
        f"{name} against the fastest llama.cpp: "
        + ", ".join(f"{kind} {value:.2f}x" for kind, value in values.items() if value)
        for name, values in report["ratios"].items()
    ]
    summary = [f"Row: {summary_row(report)}"]
    return "\n".join([*heading, "", markdown(head, rows), "", *ratios, "", *summary])


def flags(contexts: dict[str, dict[str, Any]]) -> str:
    def shown(options: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in options.items())

    if contexts["prefill"] == contexts["decode"]:
        return shown(contexts["prefill"])
    return f"{shown(contexts['prefill'])} for prefill; {shown(contexts['decode'])} for decode"


def built_with(system_info: str) -> str:
    """The features of llama.cpp's "CPU : SSE3 = 1 | AVX = 1 | …" that are there."""
    parts = system_info.partition(":")[2].split("|")
    return "built with " + " ".join(p.split("=")[0].strip() for p in parts if "= 1" in p)


def summary_row(report: dict[str, Any]) -> str:
    """model | prefill: llama.cpp, same file, int4 | decode: the same | ratios of the int4 file."""
    peers = [line for line in report["lines"] if line["load"]["engine"] != "gemloupe"]
    ours = [line for line in report["lines"] if line["load"]["engine"] == "gemloupe"]
    cells = [report["variant"]]
    for kind in ("prefill", "decode"):
        best = max(statistics.median(line[kind]) for line in peers)
        cells.append(f"{best:.2f}")
        for line in ours:
            rate = statistics.median(line[kind])
            cells.append(f"{rate:.2f} ({rate / best:.2f}x)")
    return f"| {' | '.join(cells)} |"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="llama.cpp and gemloupe on one model")
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="a Q4_0 file of the variant")
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="its packed int4 checkpoint")
    parser.add_argument("--folder", type=Path, help="where files are made, and stay")
    parser.add_argument("--vocab", type=int, metavar="N", help="cut files that are made")
    parser.add_argument("--layers", type=int, metavar="N")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--repack", choices=["auto", "both", "on", "off"], default="auto")
    parser.add_argument("--keep", choices=["auto", "yes", "no"], default="auto", help="loaded")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--prompt", type=int, metavar="N", help="default: 512, 128 of 31B")
    parser.add_argument("--try-prompt", type=int, metavar="N", help="of llama.cpp's tries")
    parser.add_argument("--tries", type=int, default=3, metavar="N", help="of each setting")
    parser.add_argument("--warm", type=int, metavar="N", help="tokens before the first round")
    parser.add_argument("--new", type=int, metavar="N", help="default: 64, 12 of 31B")
    parser.add_argument("--slices", type=int, metavar="N", help="turns in which a round decodes")
    parser.add_argument("--threads", type=int, default=_core.available_cpus(), metavar="N")
    parser.add_argument("--native-bench", type=Path, metavar="FILE", help="gemloupe_quant_bench")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args(argv)
    large = arguments.variant == "31B" and arguments.layers is None
    arguments.prompt = arguments.prompt or (128 if large else 512)
    arguments.new = arguments.new or (12 if large else 64)
    arguments.try_prompt = arguments.try_prompt or (32 if large else TRY_PROMPT)
    arguments.slices = arguments.slices or min(4, arguments.new)
    arguments.warm = arguments.warm or (16 if large else arguments.prompt)
    if (
        min(arguments.rounds, arguments.threads, arguments.new, arguments.tries) < 1
        or arguments.prompt < 2
    ):
        parser.error("--rounds, --threads, --new and --tries are at least 1, --prompt at least 2")
    if not 1 <= arguments.slices <= arguments.new:
        parser.error(f"--slices is {arguments.slices}; expected 1 to --new = {arguments.new}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.folder is None:
        with tempfile.TemporaryDirectory(prefix="gemloupe-compare-", dir=".") as folder:
            report = compare(arguments, Path(folder))
    else:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        report = compare(arguments, arguments.folder)
    print(report_text(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(f"compare_llama_cpp: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
